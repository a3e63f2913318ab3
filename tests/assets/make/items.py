"""Write items as JSONL: ``python tests/assets/make/items.py --split eval --count 8000 --seed 1 --out items.jsonl``.

One object per line, ``{"prompt": ..., "answer": ..., "task": ...}``. Any number from 1 on; the same arguments give the same
bytes, a larger count the same beginning, and no split ever shares a prompt with another.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tasks import BUCKETS, items


def lines(split: str, count: int, seed: int) -> str:
    """The JSONL text."""
    return "".join(json.dumps(item.as_dict()) + "\n" for item in items(split, count, seed))  # type: ignore[arg-type]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=sorted(BUCKETS), required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to write; standard output when not given")
    given = parser.parse_args()
    text = lines(given.split, given.count, given.seed)
    if given.out:
        given.out.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
