"""Bring vLLM to a GPU machine that has no network and is reached by commands that take along at most so many MiB of files each.

    python benchmarks/gpu/carry.py pack --have have.txt --out build/carry      # where there is a network
    python carry.py join DIR --at /tmp/carry                                    # there, in each call, with what came along
    python carry.py install --at /tmp/carry --into /tmp/site                    # there, when all pieces have come

`pack` resolves vLLM and what it needs for the other machine's Python, leaves out what stands in `--have` (names, one a line, as
`pip list --format=freeze` prints there; torch and what comes with it belong in it), takes out of vLLM's wheel what these benchmarks
never load (`DROPPED`), and cuts everything into pieces. Each piece is one file; `join` checks each by its digest, so a call can be
repeated and the order does not matter. `install` unpacks with pip, offline. Docs: docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

PIECE_MIB = 48  # the source tree travels too
PYTHON = "3.12"
PLATFORMS = (*(f"manylinux_2_{n}_x86_64" for n in range(39, 4, -1)), "manylinux2014_x86_64", "linux_x86_64")
# FlashAttention 2 is nearly half of vLLM's wheel, and on Hopper version 3 is used; the rest belongs to other servers, Pythons or GPUs.
DROPPED = (
    "vllm/vllm_flash_attn/_vllm_fa2_C*", "vllm/vllm-rs", "vllm/_rust_*", "vllm/_qutlass*",
    "vllm/third_party/deep_gemm/include/*", "vllm/third_party/fmha_sm100/*", "vllm/third_party/deep_gemm/_C.cpython-31[!2]*",
)  # fmt: skip
# Needed by features that these benchmarks do not use; vLLM imports them when those are asked for. CUDA itself is there already.
UNUSED = (
    "nvidia-*", "cuda-*", "opentelemetry-*", "torchcodec", "pynvvideocodec", "fastsafetensors", "tilelang", "z3-solver", "quack-kernels",
    "tokenspeed-*", "humming-kernels", "pyelftools", "flashinfer-*", "torch-c-dlpack-ext", "anthropic", "googleapis-common-protos",
    "fastapi-cloud-cli", "fastapi-cli", "sentry-sdk", "rignore", "rich-toolkit", "detect-installer", "agent-detector",
)  # fmt: skip
MANIFEST = "manifest.json"


def name_of(text: str) -> str:
    """A distribution's normalised name, from a wheel's file name or a line of requirements."""
    for mark in ("==", ">=", "<", ">", "~", "!", "[", ";", " ", "@"):
        text = text.partition(mark)[0]
    name = text.strip().rpartition("/")[2]
    name = name.split("-")[0] if name.endswith(".whl") else name
    return name.lower().replace("_", "-").replace(".", "-")


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def slimmed(wheel: Path, into: Path, dropped: Iterable[str] = DROPPED) -> Path:
    """A copy of a wheel without the members that match; its RECORD loses their lines."""
    target = into / wheel.name
    patterns = tuple(dropped)
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as kept:
        for member in source.infolist():
            if matches(member.filename, patterns):
                continue
            content = source.read(member)
            if member.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not matches(line.rsplit(",", 2)[0], patterns)).encode()
            kept.writestr(member, content)
    return target


def cut(files: list[Path], out: Path, piece_bytes: int) -> int:
    """Write the files' bytes, one after the other, as pieces and a manifest; returns how many."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("piece-*"):
        old.unlink()
    pieces: list[dict[str, object]] = []
    entries = []
    rest = bytearray()

    def write(limit: int) -> None:
        while len(rest) >= max(limit, 1):
            part = bytes(rest[:piece_bytes])
            del rest[:piece_bytes]
            name = f"piece-{len(pieces):02d}"
            (out / name).write_bytes(part)
            pieces.append({"name": name, "bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()})

    for file in files:
        entries.append({"name": file.name, "bytes": file.stat().st_size})
        rest += file.read_bytes()
        write(piece_bytes)
    write(1)
    (out / MANIFEST).write_text(json.dumps({"pieces": pieces, "files": entries}, indent=1) + "\n")
    return len(pieces)


def join(source: Path, at: Path) -> list[str]:
    """Keep what came along and is whole; returns the names of pieces that are still missing.

    Raises:
        SystemExit: no manifest has come yet.
    """
    at.mkdir(parents=True, exist_ok=True)
    if (source / MANIFEST).exists():
        (at / MANIFEST).write_bytes((source / MANIFEST).read_bytes())
    if not (at / MANIFEST).exists():
        raise SystemExit(f"{MANIFEST} has not come yet; take it along with the first piece")
    missing = []
    for piece in json.loads((at / MANIFEST).read_text())["pieces"]:
        for place in (at, source):
            found = place / piece["name"]
            if found.exists() and hashlib.sha256(found.read_bytes()).hexdigest() == piece["sha256"]:
                (at / piece["name"]).write_bytes(found.read_bytes())
                break
        else:
            missing.append(piece["name"])
    return missing


def assembled(at: Path) -> list[Path]:
    """The files again, from all pieces, in `at`/files.

    Raises:
        SystemExit: a piece is missing.
    """
    if missing := join(at, at):
        raise SystemExit(f"missing: {', '.join(missing)}")
    manifest, target = json.loads((at / MANIFEST).read_text()), at / "files"
    target.mkdir(exist_ok=True)
    content = b"".join((at / piece["name"]).read_bytes() for piece in manifest["pieces"])
    made, begin = [], 0
    for entry in manifest["files"]:
        made.append(target / entry["name"])
        made[-1].write_bytes(content[begin : begin + entry["bytes"]])
        begin += entry["bytes"]
    return made


def resolved(requirements: list[str], have: set[str], folder: Path) -> list[Path]:
    """Wheels of the requirements for the other machine and of what they need, but for what it has and what is unused."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--report", str(folder / "report.json"),
               "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", "--target", str(folder / "none")]  # fmt: skip
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    subprocess.run([*command, *platforms, *requirements], check=True)
    wanted = []
    for item in json.loads((folder / "report.json").read_text())["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if name_of(name) not in have and not matches(name_of(name), UNUSED):
            wanted.append(f"{name}=={version}")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", PYTHON,
             "--implementation", "cp", "--dest", str(folder / "wheels")]  # fmt: skip
    subprocess.run([*fetch, *platforms, *wanted], check=True)
    return sorted((folder / "wheels").glob("*.whl"))


def pack(args: argparse.Namespace) -> None:
    have = {name_of(line) for line in args.have.read_text().split("\n") if line.strip()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        wheels = resolved(args.requirement, have, folder)
        own = folder / "own"
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(own), str(args.project)], check=True
        )
        (folder / "slim").mkdir()
        files = [slimmed(wheel, folder / "slim") if name_of(wheel.name) == "vllm" else wheel for wheel in wheels]
        files += sorted(own.glob("*.whl"))
        for file in files:
            print(f"{file.stat().st_size / 2**20:8.1f} MiB  {file.name}")
        count = cut(files, args.out, args.piece_mib << 20)
    print(f"{count} pieces of at most {args.piece_mib} MiB in {args.out}; take {MANIFEST} along with the first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    what = parser.add_subparsers(dest="what", required=True)
    packing = what.add_parser("pack", help="fetch, slim and cut")
    packing.add_argument("--have", type=Path, required=True, help="names of what the other machine has")
    packing.add_argument("--requirement", nargs="+", default=["vllm==0.26.0", "structlog>=25"])
    packing.add_argument("--project", type=Path, default=Path(__file__).resolve().parents[2])
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--piece-mib", type=int, default=PIECE_MIB)
    joining = what.add_parser("join", help="keep the pieces of this call")
    joining.add_argument("source", type=Path)
    installing = what.add_parser("install", help="put the wheels together and install them")
    installing.add_argument("--into", type=Path, required=True, help="folder for PYTHONPATH")
    for one in (joining, installing):
        one.add_argument("--at", type=Path, required=True, help="folder there that outlives a call")
    args = parser.parse_args()
    if args.what == "pack":
        pack(args)
    elif args.what == "join":
        print(f"still missing: {', '.join(join(args.source, args.at)) or 'nothing'}")
    else:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--target",
            str(args.into),
        ]
        subprocess.run([*command, *map(str, assembled(args.at))], check=True)
        print(f"installed; export PYTHONPATH={args.into}")


if __name__ == "__main__":
    main()
