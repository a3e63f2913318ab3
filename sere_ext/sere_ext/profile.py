"""The tuning result: a policy, what it holds for, and the evidence. Written as a `SereProfile` manifest.

The same text is `profile.json` of `sere tune`, the input of `SERE_PROFILE`, and a Kubernetes object, so that a
profile can be reviewed, committed and applied elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from sere_ext.errors import ProfileError
from sere_ext.policy import Policy, Record, canonical_json, explain

API_VERSION: Final = "serving.sere.dev/v1alpha1"


class ProfileKey(Record):
    """What the profile was measured on. Any difference means PolicyStale and exact routing."""

    model_name: str
    model_revision: str = ""
    config_digest: str
    engine_version: str  # vLLM's
    plugin_version: str  # sere's
    device: str  # e.g. "NVIDIA H100 80GB HBM3" or "cpu"
    tensor_parallel_size: int = 1

    def mismatch(self, running: ProfileKey) -> str | None:
        """One sentence on the first difference, or None: `profile was made for engine 0.31.0, this pod runs 0.32.0`."""
        for field, label in _KEY_LABELS.items():
            made, runs = getattr(self, field), getattr(running, field)
            if made != runs:
                return f"profile was made for {label} {made or '(none)'}, this pod runs {runs or '(none)'}"
        return None


_KEY_LABELS = {
    "engine_version": "engine", "plugin_version": "plug-in", "device": "device", "config_digest": "model configuration",
    "model_revision": "model revision", "tensor_parallel_size": "tensor parallel size",
}  # fmt: skip


class SimilarityRef(Record):
    """Where the similarity artefact is. `uri` is file://, pvc://claim/path or configmap://name/key."""

    uri: str
    digest: str


class Paired(Record):
    """One quantity measured on both arms of one run."""

    exact: float
    chosen: float
    limit: float | None = None


class Ratio(Record):
    """exact / chosen with a confidence interval from paired blocks; the condition says at equal what."""

    value: float
    low: float | None = None
    high: float | None = None
    pairs: int = 0
    condition: str  # e.g. "equal concurrency 16"


class AccuracyEvidence(Record):
    """Shares in [0, 1]; drops in points (percent of items)."""

    exact: float
    chosen: float
    items: int
    max_drop_points: float
    confidence: float
    drop_points: float
    upper_bound_points: float | None = None  # of the drop, one-sided at `confidence`
    p_value: float | None = None
    discordant_share: float
    noise_floor: float  # share of items on which exact differs from exact under the same load


class Evidence(Record):
    """What was measured for the chosen policy. `certified` is False for advisory profiles."""

    certified: bool
    tpot_ms: Paired  # at the percentile that the SLO limits
    tpot_mean_ms: Paired | None = None
    ttft_ms: Paired | None = None
    e2el_ms: Paired | None = None
    speedup: Ratio  # of tpot_ms
    speedup_mean: Ratio | None = None
    accuracy: AccuracyEvidence
    active_experts: Paired | None = None  # mean per layer and step
    rung: int = 0
    rungs: int = 0
    trials: int = 0
    device_hours: float = 0.0
    workload: str = ""
    study: str = ""
    created: str = ""  # RFC 3339


class GoldenPrompt(Record):
    """A labelled prompt that a canary answers and that must not get worse."""

    prompt: str
    answer: str
    max_tokens: Annotated[int, Field(ge=1, le=512)] = 32


class ProfileSpec(Record):
    """`spec` of a SereProfile."""

    policy: Policy
    key: ProfileKey
    similarity: SimilarityRef | None = None
    evidence: Evidence
    golden_prompts: Annotated[tuple[GoldenPrompt, ...], Field(max_length=64)] = ()

    @property
    def digest(self) -> str:
        """Content address of the whole spec: `sha256:` and 64 hex digits."""
        return "sha256:" + hashlib.sha256(canonical_json(self.to_json_dict())).hexdigest()


class Profile(Record):
    """A SereProfile manifest. Its name holds the policy's digest unless the caller gives one."""

    api_version: Literal["serving.sere.dev/v1alpha1"] = API_VERSION
    kind: Literal["SereProfile"] = "SereProfile"
    metadata: dict[str, Any] = Field(default_factory=dict)
    spec: ProfileSpec

    @classmethod
    def parse(cls, data: str | bytes | dict[str, Any]) -> Profile:
        """Raises ProfileError with one sentence per problem."""
        try:
            return cls.model_validate(data) if isinstance(data, dict) else cls.model_validate_json(data)
        except ValidationError as error:
            raise ProfileError("profile: " + explain(error)) from error

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        try:
            return cls.parse(Path(path).read_bytes())
        except OSError as error:
            raise ProfileError(f"cannot read the profile {path}: {error.strerror}") from error

    def write(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json_dict(), indent=2) + "\n")
