"""Items that are one question in other words: they would be counted as independent evidence, which they are not. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from sere_autotune.trial.items import Item, normalised

_GRAM = 13  # words in a row, as contamination of training sets is looked for (Brown et al. 2020, appendix C)
_TEMPLATE = 0.1  # share of items above which shared words are a template of all prompts, not one item's text
_MANY = 0.05


def near_duplicates(items: Sequence[Item]) -> str | None:
    """A warning where many items share 13 words in a row with another item, None where few do.

    Words that more than a tenth of all items share are taken for the prompts' template.
    """
    grams: dict[int, list[int]] = {}
    for index, item in enumerate(items):
        words = normalised(item.prompt).split()
        for gram in {hash(tuple(words[i : i + _GRAM])) for i in range(len(words) - _GRAM + 1)}:
            grams.setdefault(gram, []).append(index)
    most = max(2, _TEMPLATE * len(items))
    alike = {index for indices in grams.values() if 2 <= len(indices) <= most for index in indices}
    if len(alike) <= _MANY * len(items):
        return None
    return (
        f"{len(alike):,} of {len(items):,} items share {_GRAM} words in a row with another item; if they are variants of one question, "
        'give such items the same "group", so that they are not counted as independent evidence'
    )
