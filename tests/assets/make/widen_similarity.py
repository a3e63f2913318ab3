"""The similarity file of a widened model, from that of the small one: ``python -m tests.assets.make.widen_similarity NARROW MODEL DESTINATION``.

Widened experts compute what the small ones do, so that the small model's similarities hold as they are; only the digest of the
model's config changes. Calibrating the widened model itself would take minutes for the same figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sere_ext.contract.model_config import model_config_digest
from sere_ext.similarity.file import read_similarity, write_similarity
from sere_ext.similarity.hub import model_config_dict


def widen_similarity(narrow: Path, model: Path, destination: Path) -> Path:
    """Write the similarity of ``narrow`` to ``destination`` as that of the widened model in ``model``; returns the destination."""
    found = read_similarity(narrow)
    meta = found.meta.model_copy(update={"config_digest": model_config_digest(model_config_dict(str(model)))})
    write_similarity(destination, meta, found.matrices)
    return destination


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("narrow", type=Path, help="what `sere calibrate` made of the small model")
    parser.add_argument("model", type=Path, help="the widened model's directory")
    parser.add_argument("destination", type=Path)
    given = parser.parse_args()
    print(widen_similarity(given.narrow, given.model, given.destination))


if __name__ == "__main__":
    main()
