"""Checking a similarity artefact from its bytes (format: `sere_ext.contract.similarity`), torch-free and without a file."""

from __future__ import annotations

import json
import struct
from typing import Any

from pydantic import ValidationError
from sere_ext.contract.errors import SimilarityError
from sere_ext.contract.similarity import SimilarityMeta, similarity_digest
from sere_ext.contract.validation import explain


def verified_digest(data: bytes) -> str:
    """The digest of an artefact, recomputed from its matrices.

    Args:
        data: the whole file.

    Raises:
        SimilarityError: no artefact, truncated, or content that its own digest does not fit.
    """
    try:
        length = struct.unpack("<Q", data[:8])[0]
        header: dict[str, Any] = json.loads(data[8 : 8 + length])
        meta = SimilarityMeta.model_validate(json.loads(header.pop("__metadata__")["sere"]))
        body = data[8 + length :]
        spans = {int(name.removeprefix("layer.")): entry["data_offsets"] for name, entry in header.items()}
    except ValidationError as error:
        raise SimilarityError(
            f"the similarity artefact is not of this release's form: {explain(error, SimilarityMeta)}"
        ) from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SimilarityError(f"this is no similarity artefact ({error}); make one with `sere calibrate`") from error
    if max((end for _, end in spans.values()), default=0) != len(body):
        raise SimilarityError("the similarity artefact is truncated; make it again with `sere calibrate`")
    digest = similarity_digest(meta, {layer: body[begin:end] for layer, (begin, end) in spans.items()})
    if digest != meta.digest:
        raise SimilarityError(f"the similarity artefact says it is {meta.digest}, its content is {digest}; make it again")
    return digest
