"""Makes the content of images/*.Dockerfile from what is installed here, without a registry, a network or a daemon.

    python -m tests.kit.images operator -o build/images/operator.tar
    python -m tests.kit.images engine   -o build/images/engine.tar

Tests and the demo use it; images for any other use come from the Dockerfiles. An archive that was made from the same is kept.

Run it with the interpreter of an environment that holds the part's dependencies. The interpreter goes to its own
absolute path in the image, so that the environment's links, scripts and `pyvenv.cfg` hold there too.

operator   the interpreter, the closure of `sere[operator]` and the sere packages.
engine     the interpreter, system libraries and the sere packages; NOT the environment with torch and vLLM (4.5 GB, two
           minutes to pack and import): a pod mounts that read-only at its own path, which `--print-environment` prints.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

from tests.kit import ROOT

PACK = ROOT / "tests" / "kit" / "image"
PACKAGES = ("sere_ext/sere_ext", "autotune/sere_autotune", "operator/sere_operator")
APP = "/opt/sere"  # the sere packages, first on PYTHONPATH: an editable install in the environment must not win
SCRIPTS = {"sere": "sere_ext.cli.main", "kubectl-sere": "sere_operator.cli.kubectl"}
USER = 10001  # the operator's pods run as this user too (`sere_operator/plan/objects/pods.py`)

# Programs that vLLM, Ray and ctypes run: `lscpu` lists the cores to bind to, `ldconfig -p` finds libraries.
ENGINE_PROGRAMS = ("sh", "lscpu", "ldconfig", "uname", "cat")
# Debian's data that the interpreter or the C library reads by name.
DATA = ("/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/openssl.cnf", "/usr/share/zoneinfo/UTC")
# Parts of the standard library that no server needs, and what the base interpreter has installed besides.
STDLIB_LEFT_OUT = ("test", "tests", "site-packages", "dist-packages", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3")
STDLIB_LEFT_OUT_GLOBS = ("config-*", "*.opt-?.pyc", "_tkinter*.so", "*.a")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["operator", "engine"])
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--name", help="image name; default sere-KIND:dev")
    parser.add_argument("--print-environment", action="store_true", help="print the environment's path and stop")
    options = parser.parse_args()
    if options.print_environment:
        print(sys.prefix)
        return 0
    if options.out is None:
        parser.error("name the archive with -o FILE.tar")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder below goes too
    name = options.name or f"sere-{options.kind}:dev"
    mark, made_from = options.out.with_name(options.out.name + ".of"), content(name)
    if options.out.exists() and mark.exists() and mark.read_text() == made_from:
        return 0
    mark.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:
        root = Path(folder) / "root"
        stage(root, options.kind)
        pack(root, options.kind, name, options.out)
    mark.write_text(made_from)
    return 0


def content(name: str) -> str:
    """Digest of what an image is made from: this tree's packages, this module, and what is installed. The same digest, the same image.

    Args:
        name: of the image.
    """
    found = hashlib.sha256(f"{name} {sys.version} {sys.prefix} {sys.base_prefix}".encode())
    for file in sorted([Path(__file__), PACK, *(path for package in PACKAGES for path in (ROOT / package).rglob("*"))]):
        if file.is_file() and not {"__pycache__", "built"} & set(file.parts):
            found.update(f"{file}\n".encode() + file.read_bytes())
    for installed in sorted(f"{one.name} {one.version}" for one in distributions()):
        found.update(installed.encode())
    return found.hexdigest()


def stage(root: Path, kind: str) -> None:
    """Lay the image's tree out under `root`, an empty folder to be made."""
    for folder in ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "etc", "tmp", "run", "proc", "sys", "dev"):
        (root / folder).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):  # merged, as in Debian: libraries are found under either name
        (root / name).symlink_to(f"usr/{name}")
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text(f"root:x:0:0:root:/:/sbin/nologin\nsere:x:{USER}:{USER}:sere:/tmp:/sbin/nologin\n")
    (root / "etc/group").write_text(f"root:x:0:\nsere:x:{USER}:\n")
    (root / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
    for data in DATA:
        if Path(data).exists():
            copy(Path(data), root)

    copy_interpreter(root)
    left_out = shutil.ignore_patterns("__pycache__", "built")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / APP.lstrip("/") / Path(package).name, ignore=left_out)
    if kind == "engine":
        build_kernels(root)
    if not compile_missing(root / APP[1:], root):
        raise SystemExit("build: a module of the sere packages does not compile")

    # Its metadata holds the entry points of `sere` and of vLLM's plug-ins.
    copy_metadata(distribution("sere"), root)
    interpreter = f"{sys.prefix if kind == 'engine' else sys.base_prefix}/bin/python3"
    for script, module in SCRIPTS.items():
        place = root / APP.lstrip("/") / "bin" / script
        place.parent.mkdir(exist_ok=True)
        place.write_text(f"#!{interpreter}\nimport sys\n\nfrom {module} import main\n\nsys.exit(main())\n")
        place.chmod(0o755)

    binaries = set(elf_files(root))
    if kind == "operator":
        for dist in closure("sere", "operator"):
            copy_distribution(dist, root)
        compile_missing(root / APP[1:], root)
        binaries |= set(elf_files(root))
    else:
        for name in ENGINE_PROGRAMS:
            if found := shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin"):
                binaries.add(copy(Path(found).resolve(), root, f"usr/bin/{name}"))
        binaries |= set(elf_files(Path(sys.prefix)))
        binaries |= {Path(sys.prefix, p) for p in Path(sys.prefix).glob("lib/python*/site-packages/ray/core/src/ray/*/*[a-z]")}
    for library in libraries(binaries):
        copy(library, root, merged(library))
    subprocess.run(["/sbin/ldconfig", "-r", str(root)], check=False, stderr=subprocess.DEVNULL)


def compile_missing(folder: Path, root: Path) -> bool:
    """Byte code for every module below `folder` that has none. False if one does not compile (test data, templates).

    An image's root is read-only: what is missing would be compiled anew at every start, and the operator's start would
    take three times as long. By content, so that no time stamp can make it stale.
    """
    command = [sys.executable, "-m", "compileall", "-qq", "--invalidation-mode", "unchecked-hash"]
    paths = ["-s", str(root), "-p", "/", str(folder)]  # as they will be in the image, for tracebacks
    return subprocess.run([*command, *paths], check=False).returncode == 0


def build_kernels(root: Path) -> None:
    """Build the CPU kernel into the image's own package: a pod has no compiler and may not write its root file system."""
    package = root / APP.lstrip("/") / "sere_ext"
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "sere_ext.routing.build", "--out", str(package / "built")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)


def copy_interpreter(root: Path) -> None:
    """Copy the base interpreter (not the virtual environment) to its own path, without modules that no server loads."""
    base, version = Path(sys.base_prefix), f"python{sys.version_info.major}.{sys.version_info.minor}"
    real = (base / "bin" / version).resolve()
    copy(real, root, base / "bin" / version)
    for alias in ("python3", "python"):
        (root / str(base).lstrip("/") / "bin" / alias).symlink_to(version)
    for library in (base / "lib").glob(f"lib{version}*.so.*"):
        copy(library, root)
    for key in dict.fromkeys(("stdlib", "platstdlib")):
        source = Path(sysconfig.get_path(key, vars={"base": str(base), "installed_base": str(base)}))
        shutil.copytree(
            source,
            root / str(source).lstrip("/"),
            symlinks=True,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(*STDLIB_LEFT_OUT, *STDLIB_LEFT_OUT_GLOBS),
        )
        compile_missing(root / str(source).lstrip("/"), root)


def closure(name: str, extra: str) -> list[Distribution]:
    """The installed distributions that `name[extra]` needs, itself left out. Raises if one is not installed."""
    from packaging.requirements import Requirement  # only the operator's image needs it

    found: dict[str, Distribution] = {}

    def walk(name: str, extras: Iterable[str]) -> None:
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            return
        try:
            found[key] = dist = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"build: {name} is not installed here; pip install 'sere[{extra}]' first") from None
        for text in dist.requires or []:
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate({"extra": one}) for one in ("", *extras)):
                walk(need.name, need.extras)

    walk(name, [extra])
    return [dist for key, dist in found.items() if key != name]


def copy_distribution(dist: Distribution, root: Path) -> None:
    """Copy one installed distribution's files into the image's application folder."""
    for file in dist.files or []:
        source = Path(str(dist.locate_file(file)))
        if ".." in file.parts or not source.is_file():  # scripts; byte code that was never written
            continue
        target = root / APP.lstrip("/") / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def copy_metadata(dist: Distribution, root: Path) -> None:
    for file in dist.files or []:
        if file.parent.name.endswith(".dist-info") and (source := Path(str(dist.locate_file(file)))).is_file():
            copy(source, root, f"{APP}/{file}")


def elf_files(folder: Path) -> Iterator[Path]:
    """Shared objects, and executables in a `bin` folder, below `folder`."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        if ".so" in path.suffixes or (path.parent.name == "bin" and path.stat().st_mode & 0o100):
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield path


def libraries(binaries: Iterable[Path]) -> set[Path]:
    """The system libraries (and the loader) that the binaries are linked with: what `ldd` finds outside the environment."""
    names, found = sorted(map(str, binaries)), set()
    for start in range(0, len(names), 100):
        listing = subprocess.run(["ldd", *names[start : start + 100]], capture_output=True, text=True, check=False).stdout
        found |= {Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", listing, flags=re.MULTILINE)}
    # Loaded by name at run time: name resolution, and the libraries of threads that are cancelled.
    found |= {
        p
        for p in (Path(f"/lib/x86_64-linux-gnu/{n}") for n in ("libnss_files.so.2", "libnss_dns.so.2", "libgcc_s.so.1"))
        if p.exists()
    }
    environments = tuple({str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix) if prefix != "/usr"})
    return {path for path in found if not str(path.resolve()).startswith(environments) and not is_gui(path.name)}


@functools.cache
def is_gui(name: str) -> bool:
    """Libraries that only the standard library's Tk bindings pull in."""
    return name.startswith(("libX", "libtk", "libtcl", "libxcb", "libfont", "libfreetype", "libpng"))


def merged(path: Path) -> Path:
    """`/lib/...` as `/usr/lib/...`: the image's /lib is a link."""
    return Path("/usr", *path.parts[1:]) if path.parts[1] in {"lib", "lib64", "bin", "sbin"} else path


def copy(source: Path, root: Path, target: str | Path | None = None) -> Path:
    """Copy one file, links followed, to the same or the given absolute path in the image. Returns the source."""
    place = root / str(target or source).lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, place)
    return source


def pack(root: Path, kind: str, name: str, out: Path) -> None:
    """Turn the tree into an image archive with a non-root user and the part's environment."""
    path = [f"{APP}/bin", f"{sys.prefix}/bin", f"{sys.base_prefix}/bin", "/usr/bin", "/bin"]
    if kind == "operator":  # the environment is not there
        path.remove(f"{sys.prefix}/bin")
    environment = {
        "PATH": ":".join(path),
        "PYTHONPATH": APP,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HOME": "/tmp",  # the one place that is writable under a read-only root
        "LANG": "C.UTF-8",
    }
    entrypoint = ["python3", "-m", "sere_operator.runtime.main"] if kind == "operator" else ["sere"]
    subprocess.run(
        [
            sys.executable, PACK, name, "--rootfs", root, "-o", out, "--user", str(USER),
            *(word for pair in environment.items() for word in ("--env", "=".join(pair))),
            *(word for arg in entrypoint for word in (f"--entrypoint={arg}",)),
        ],
        check=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
