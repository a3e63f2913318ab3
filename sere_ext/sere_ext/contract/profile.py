"""The tuning result: a policy, what it holds for, and the evidence. Written as a `SereProfile` manifest.

The same text is `profile.json` of `sere tune`, the input of `SERE_PROFILE`, and a Kubernetes object, so that a
profile can be reviewed, committed and applied elsewhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sere_ext.contract.answers import AnswerMetric, right
from sere_ext.contract.errors import PolicyError, ProfileError
from sere_ext.contract.files import write_whole
from sere_ext.contract.model_config import names_folder
from sere_ext.contract.names import API_VERSION
from sere_ext.contract.policy import Policy
from sere_ext.contract.record import Record, canonical_json, content_digest
from sere_ext.contract.validation import explain

_POLICY_EXAMPLE = '{"buckets": [{"minTokens": 8, "kind": "topk", "S": 2}]}'


class ProfileKey(Record):
    """What the profile was measured on. Any difference means PolicyStale and exact routing."""

    model_name: Annotated[str, Field(description="as the tuner was given it")]
    model_revision: Annotated[str, Field(description="commit, tag or branch")] = ""
    config_digest: Annotated[str, Field(description="sha256 of what of the model's config.json decides")]
    engine_version: Annotated[str, Field(description="vLLM's")]
    plugin_version: Annotated[str, Field(description="sere's")]
    device: Annotated[str, Field(description="such as NVIDIA H100 80GB HBM3, or cpu")]
    tensor_parallel_size: Annotated[int, Field(description="devices per engine")] = 1
    weight_format: Annotated[
        str, Field(description="how weights are held: bfloat16, or the quantisation and a hash of its settings")
    ] = ""

    def mismatch(self, running: ProfileKey) -> str | None:
        """One sentence on the first difference between what was measured and what runs, or None: `profile was made for engine 0.31.0, this pod runs 0.32.0`."""
        folders = names_folder(self.model_name) or names_folder(running.model_name)  # whose names say nothing of the model
        for field, label in _KEY_LABELS.items():
            made, runs = getattr(self, field), getattr(running, field)
            if made != runs and not (field == "model_name" and folders):
                return f"profile was made for {label} {made or '(none)'}, this pod runs {runs or '(none)'}"
        return None


_KEY_LABELS = {
    "model_name": "model", "weight_format": "weight format", "engine_version": "engine", "plugin_version": "plug-in", "device": "device", "config_digest": "model configuration",
    "model_revision": "model revision", "tensor_parallel_size": "tensor parallel size",
}  # fmt: skip


class SimilarityRef(Record):
    """Where the similarity artefact is. `uri` is file://, pvc://claim/path or configmap://name/key."""

    uri: Annotated[str, Field(description="file://, pvc://claim/path or configmap://name/key")]
    digest: Annotated[str, Field(description="sha256 of the artefact")]


class Paired(Record):
    """One quantity as measured with exact routing and with the chosen policy."""

    exact: Annotated[float, Field(description="with exact routing")]
    chosen: Annotated[float, Field(description="with the chosen policy")]
    limit: Annotated[float | None, Field(description="that had to be kept")] = None


class Ratio(Record):
    """How many times smaller a quantity is with the chosen policy, with a confidence interval from paired blocks."""

    value: Annotated[float, Field(description="exact divided by chosen")]
    low: Annotated[float | None, Field(description="lower end of the confidence interval")] = None
    high: Annotated[float | None, Field(description="upper end of the confidence interval")] = None
    pairs: Annotated[int, Field(description="paired blocks that it comes from")] = 0
    condition: Annotated[str, Field(description="at equal what, such as equal concurrency 16")]


class AccuracyEvidence(Record):
    """Shares in [0, 1]; drops in points (percent of items)."""

    exact: Annotated[float, Field(description="share of items answered rightly with exact routing")]
    chosen: Annotated[float, Field(description="share of items answered rightly with the policy")]
    items: Annotated[int, Field(description="held-out items per arm")]
    max_drop_points: Annotated[float, Field(description="the limit, in points")]
    confidence: Annotated[float, Field(description="of the certificate")]
    drop_points: Annotated[float, Field(description="measured drop, in points")]
    upper_bound_points: Annotated[float | None, Field(description="of the drop, one-sided at `confidence`")] = None
    p_value: Annotated[float | None, Field(description="of the test that the drop is above the limit")] = None
    discordant_share: Annotated[float, Field(description="share of items on which the arms differ")]
    noise_floor: Annotated[float, Field(description="share of items on which exact differs from exact under the same load")]


class Evidence(Record):
    """What was measured for the chosen policy. `certified` is False for advisory profiles."""

    certified: Annotated[bool, Field(description="false for an advisory profile, which is never promoted by itself")]
    tpot_ms: Annotated[Paired, Field(description="time per output token, ms, at the percentile that the SLO limits")]
    tpot_mean_ms: Annotated[Paired | None, Field(description="mean time per output token, ms")] = None
    ttft_ms: Annotated[Paired | None, Field(description="time to the first token, ms")] = None
    e2el_ms: Annotated[Paired | None, Field(description="time from request to last token, ms")] = None
    speedup: Annotated[Ratio, Field(description="of tpotMs")]
    speed_verdict: Annotated[
        Literal["faster", "slower", "undecided"] | None,
        Field(description="of mean TPOT over all pairs of blocks; only a profile shown to be faster is promoted by itself"),
    ] = None
    speedup_mean: Annotated[Ratio | None, Field(description="of tpotMeanMs")] = None
    accuracy: Annotated[AccuracyEvidence, Field(description="on held-out items, under load")]
    active_experts: Annotated[Paired | None, Field(description="mean per layer and step")] = None
    rung: Annotated[int, Field(description="of the ladder of candidates that was chosen")] = 0
    rungs: Annotated[int, Field(description="candidates on the ladder")] = 0
    trials: Annotated[int, Field(description="search trials")] = 0
    device_hours: Annotated[float, Field(description="device time spent")] = 0.0
    workload: Annotated[str, Field(description="the traffic, in words")] = ""
    study: Annotated[str, Field(description="where the study is")] = ""
    created: Annotated[str, Field(description="RFC 3339")] = ""

    @property
    def shortfall(self) -> str | None:
        """What a profile lacks to be promoted without a person's approval, in words; None where it lacks nothing."""
        if not self.certified:
            return "advisory, not certified"
        return None if self.speed_verdict == "faster" else "not shown to be faster than exact routing"


class ChatMessage(Record):
    """One message of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64, description="system, user or assistant")]
    content: Annotated[str, Field(description="text")]


class GoldenPrompt(Record):
    """A labelled prompt that a canary answers and that must not get worse."""

    prompt: Annotated[str, Field(description="text; of a conversation the last question")]
    messages: Annotated[
        tuple[ChatMessage, ...] | None,
        Field(max_length=64, description="conversation that is sent to /v1/chat/completions in place of the prompt"),
    ] = None
    answer: Annotated[str, Field(description="the right answer")]
    max_tokens: Annotated[int, Field(ge=1, le=512, description="answer length limit")] = 32
    metric: Annotated[AnswerMetric, Field(description="how an answer is judged, as in the tuning that chose the prompt")] = (
        "exact"
    )
    pattern: Annotated[str | None, Field(max_length=1024, description="regex: its first group is compared with the answer")] = (
        None
    )
    stop: Annotated[tuple[str, ...], Field(max_length=16, description="strings that end an answer")] = ()

    @model_validator(mode="after")
    def _pattern_for_regex(self) -> Self:
        if (self.metric == "regex") != (self.pattern is not None):
            raise ValueError("metric regex needs pattern, and pattern is for metric regex only")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern is no regular expression ({error}); correct it") from error
        return self

    def right(self, text: str) -> bool:
        """Whether a generated text answers the prompt rightly."""
        return right(self.metric, self.pattern, text, self.answer, self.stop)


class ProfileSpec(Record):
    """`spec` of a SereProfile."""

    policy: Annotated[Policy, Field(description="the chosen policy")]
    key: Annotated[ProfileKey, Field(description="what it was measured on; any difference means exact routing")]
    similarity: Annotated[SimilarityRef | None, Field(description="the artefact that `sere` buckets go by")] = None
    evidence: Annotated[Evidence, Field(description="what was measured")]
    golden_prompts: Annotated[
        tuple[GoldenPrompt, ...], Field(max_length=64, description="that a canary answers and that must not get worse")
    ] = ()

    @property
    def digest(self) -> str:
        """Content address of the whole spec: `sha256:` and 64 hex digits."""
        return content_digest(canonical_json(self.to_json_dict()))


class Profile(Record):
    """A SereProfile manifest."""

    api_version: Literal["serving.sere.dev/v1alpha1"] = API_VERSION
    kind: Literal["SereProfile"] = "SereProfile"
    metadata: dict[str, Any] = Field(default_factory=dict)
    spec: ProfileSpec

    @classmethod
    def parse(cls, data: str | bytes | dict[str, Any]) -> Profile:
        """Read a profile from JSON text or a decoded object.

        Raises:
            ProfileError: with one sentence per problem, each naming the field.
        """
        try:
            return cls.model_validate(data) if isinstance(data, dict) else cls.model_validate_json(data)
        except ValidationError as error:
            raise ProfileError("profile: " + explain(error, cls)) from error

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """Read a profile from a file. Raises ProfileError."""
        try:
            return cls.parse(Path(path).read_bytes())
        except OSError as error:
            raise ProfileError(f"cannot read the profile {path}: {error.strerror}") from error

    def write(self, path: str | Path) -> None:
        """Write the manifest as JSON, whole or not at all."""
        write_whole(path, json.dumps(self.to_json_dict(), indent=2) + "\n")


def read_policy_file(path: str | Path) -> Policy:
    """A policy from a JSON file: a policy itself or a SereProfile manifest."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise PolicyError(f"cannot read the policy {path}: {error.strerror}") from error
    try:
        decoded = json.loads(text)
    except ValueError as error:
        raise PolicyError(
            f"{path} cannot be read as JSON ({error}); write a policy like {_POLICY_EXAMPLE}, or give a profile"
        ) from error
    if isinstance(decoded, dict) and decoded.get("kind") == "SereProfile":
        return Profile.parse(decoded).spec.policy
    if not isinstance(decoded, dict):
        raise PolicyError(f"{path}: a policy is a JSON object like {_POLICY_EXAMPLE}")
    return Policy.parse(decoded)
