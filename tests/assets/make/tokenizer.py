"""The character-level tokenizer, as plain files that transformers and vLLM load without any code of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.assets.make.tasks import DIGITS, LETTERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2

# Every character that a prompt or an answer of either model can hold, in a fixed order: token ids follow it.
ALPHABET = DIGITS + LETTERS + "RSCPEILABMX" + "+-*^,="

# Token id of each character.
IDS: dict[str, int] = {character: index + 3 for index, character in enumerate(ALPHABET)}

# Rows of the embedding: the next multiple of 64, as vLLM pads to.
VOCABULARY = 64


def build(model_max_length: int) -> PreTrainedTokenizerFast:
    """One token per character; decoding joins without spaces. No BOS, so a prompt's ids are its characters' ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {PAD: PAD_ID, EOS: EOS_ID, UNKNOWN: UNKNOWN_ID, **IDS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",  # what batched generation needs
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )


def save(directory: Path, model_max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    build(model_max_length).save_pretrained(directory)
