"""Where a run's similarity artefact comes from: as given, left by an earlier run, or calibrated first, and on what."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sere_autotune.trial.items import Item
from sere_autotune.tuning.spec import TuningSpec
from sere_ext.contract.errors import UsageError
from sere_ext.contract.policy import Policy
from sere_ext.contract.similarity import read_meta


class Origin(StrEnum):
    """Where an artefact comes from."""

    UNUSED = "unused"  # no kind of routing that is tried compares experts
    GIVEN = "given"
    EARLIER = "earlier"  # made in this folder by an earlier run of the same model
    CALIBRATED = "calibrated"  # made by this run before its engine starts


@dataclass(frozen=True)
class Source:
    """The similarity artefact of a run: `--dry-run` describes it, `provide` makes it."""

    origin: Origin
    path: Path | None = None  # of the artefact; the file does not exist yet where it is to be calibrated
    data: str | None = None  # file to calibrate on; None: the search items

    def describe(self, search_items: int) -> str:
        """The artefact in words for the dry run, with the number of items that the search may see."""
        if self.origin is Origin.UNUSED:
            return "not needed by what is tried"
        if self.origin is Origin.GIVEN:
            return str(self.path)
        if self.origin is Origin.EARLIER:
            return f"{self.path}, calibrated by an earlier run"
        texts = self.data or f"prompts and answers of the {search_items:,} search items (calibrate.data names others)"
        return f"none given; calibrated first, on {texts}; the time for it is not in the estimate of time"

    def to_dict(self) -> dict[str, str | None]:
        """The artefact as `--dry-run --json` has it."""
        data = (self.data or "search items") if self.origin is Origin.CALIBRATED else None
        return {"origin": self.origin.value, "path": str(self.path) if self.path else None, "calibratedOn": data}


def find(spec: TuningSpec, config_digest: str, only: Policy | None = None) -> Source:
    """Which artefact a run will use.

    Args:
        config_digest: the model's; an artefact of another model is not used again.
        only: the policy to certify, where nothing is searched.
    """
    if spec.similarity:
        return Source(Origin.GIVEN, Path(spec.similarity).resolve())
    kinds = spec.search.policies
    if not (only.needs_similarity() if only is not None else any(kind.needs_similarity for kind in kinds)):
        return Source(Origin.UNUSED)
    made = Path(spec.out).resolve() / "similarity.safetensors"
    if made.exists() and read_meta(made).config_digest == config_digest:
        return Source(Origin.EARLIER, made)
    return Source(Origin.CALIBRATED, made, spec.calibrate.data if spec.calibrate else None)


def provide(source: Source, spec: TuningSpec, items: Sequence[Item]) -> Path | None:
    """The artefact, calibrated now if it has to be; None where none is needed.

    Args:
        items: the search items; never the items for certification, which nothing may see before.

    Raises:
        UsageError: calibration failed.
    """
    if source.origin is not Origin.CALIBRATED or source.path is None:
        return source.path
    source.path.unlink(missing_ok=True)  # of another model
    data = source.data
    if data is None:
        texts = Path(spec.out) / "calibration.jsonl"
        texts.write_text("".join(json.dumps(_calibration_row(item)) + "\n" for item in items))
        data = str(texts)
    command = [sys.executable, "-m", "sere_ext.cli.main", "calibrate", spec.model, "--data", data, "--out", str(source.path)]
    if spec.revision:
        command += ["--revision", spec.revision]
    if spec.trust_remote_code:
        command.append("--trust-remote-code")
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UsageError(f"calibration failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return source.path


def _calibration_row(item: Item) -> dict[str, object]:
    """An item with its answer, as a conversation where it is sent as one."""
    if item.messages:
        return {"messages": [*item.messages, {"role": "assistant", "content": item.answer}]}
    return {"prompt": item.prompt, "answer": item.answer}


def make_publishable(path: Path, origin: Origin, limit_bytes: int, settled: str | None = None) -> None:
    """Pack an artefact that this run made, before anything is measured with it, since packing changes its digest.

    Args:
        limit_bytes: largest artefact that the published result can hold.
        settled: digest of an artefact that must not change, since trials were measured with it or a given policy names it.

    Raises:
        UsageError: the packed artefact is larger all the same. No engine has been started yet.
    """
    from sere_ext.similarity.file import packed_meta, read_similarity, write_similarity

    meta = read_meta(path)
    packed = meta.packing is not None
    if not packed and origin is not Origin.GIVEN and meta.digest != settled:
        plain = read_similarity(path)
        write_similarity(path, packed_meta(plain), plain.matrices)
        packed = True
    if (size := path.stat().st_size) > limit_bytes:
        way_out = ", though packed" if packed else "; name one that `sere similarity pack` made"
        raise UsageError(
            f"similarity: {path} has {size:,} bytes, of which {limit_bytes:,} fit into the published result{way_out}"
        )


def checked_digest(path: Path, measured: str | None, out: Path) -> str:
    """The digest of the artefact at `path`.

    Args:
        measured: digest of the artefact that the study in `out` was measured with, None before its first trial.

    Raises:
        UsageError: the two differ, so that the certificate would be about another artefact than the published one.
    """
    digest = read_meta(path).digest
    if measured not in (None, digest):
        raise UsageError(
            f"similarity: {path} is not the one that {out} was measured with ({digest[:19]}, it was {measured[:19]}); "
            "put that back, name another `out`, or add --fresh to begin anew"
        )
    return digest
