"""Write items as JSONL: ``python -m tests.assets.make.items --model rows_moe --split eval --count 8000 --out items.jsonl``.

One object per line, ``{"prompt": ..., "answer": ..., "task": ...}``. Any number from 1 on; the same arguments give the same
bytes, a larger count the same beginning, and no split ever shares a prompt with another.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.assets.make.models import RECIPES, Recipe
from tests.assets.make.tasks import BUCKETS, Split


def lines(recipe: Recipe, split: Split, count: int, seed: int) -> str:
    """The JSONL text of ``count`` items of the model's tasks."""
    return "".join(json.dumps(item.as_dict()) + "\n" for item in recipe.tasks.items(split, count, seed))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(RECIPES), default="tiny_moe", help="whose tasks")
    parser.add_argument("--split", choices=sorted(BUCKETS), required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to write; standard output when not given")
    given = parser.parse_args()
    if given.count < 1:
        parser.error(f"--count is a number of items, 1 or more, not {given.count}")
    text = lines(RECIPES[given.model], given.split, given.count, given.seed)
    if given.out:
        given.out.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
