"""Tells models apart whose opened items are counted apart: by their weights, not by their folder or shape.

Fine-tunes of one base share its configuration and answer otherwise, so a certificate of one opens nothing for another. The same
weights in another folder, or cut into other files, are the same model still.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sere_ext.contract.model_config import WEIGHT_FILES

_TENSOR_BYTES = 256  # read from the middle of each tensor: training changes nearly every number of a tensor that it changes
_BLOCK_BYTES, _BLOCKS = 65_536, 16  # read of a file in another format
_LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it


def model_key(model: str, config_digest: str) -> str:
    """A digest of a model's configuration and weights, `sha256:` and 64 hex digits.

    Of a folder, a part of every tensor is read. A model of the hub is known by its name, whatever the revision: its files may not
    be here yet, and a new revision that changed a text file only must not restore the level.

    Args:
        model: folder, or name on the hub.
        config_digest: of the model's configuration.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        files = sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern)})
        parts = sorted(part for path in files for part in _parts(path))
    else:
        parts = [model]
    return "sha256:" + hashlib.sha256("\n".join([config_digest, *parts]).encode()).hexdigest()


def _parts(path: Path) -> Iterator[str]:
    """A line for each tensor of a safetensors file, or one line for a file of another format."""
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        try:
            if not 0 < length <= min(size - 8, _LONGEST_HEADER):
                raise ValueError("no header of safetensors")
            header = json.loads(file.read(length))
            places = {
                name: (about["data_offsets"], f"{about['dtype']} {about['shape']}")
                for name, about in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            steps = sorted({max(0, (size - _BLOCK_BYTES) * i // (_BLOCKS - 1)) for i in range(_BLOCKS)})
            yield f"{size} " + hashlib.sha256(b"".join(_read(file, at, _BLOCK_BYTES) for at in steps)).hexdigest()
            return
        for name, ((begin, end), form) in places.items():
            at = 8 + length + max(begin, (begin + end - _TENSOR_BYTES) // 2)
            yield f"{name} {form} {_read(file, at, min(_TENSOR_BYTES, end - begin)).hex()}"


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)
