"""The profile: one text for a file, SERE_PROFILE and a Kubernetes object; refused when it is of something else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from sere_ext.contract.errors import PolicyError, ProfileError
from sere_ext.contract.model_config import model_config_digest, weight_format
from sere_ext.contract.policy import Policy
from sere_ext.contract.profile import Profile, ProfileKey

KEY = {
    "modelName": "m",
    "modelRevision": "r1",
    "configDigest": "sha256:1",
    "engineVersion": "0.32.0",
    "pluginVersion": "0.1.0",
    "device": "cpu",
}
POLICY = {"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "sere", "S": 2, "rho": 0.3}], "similarityDigest": "sha256:2"}
EVIDENCE = {
    "certified": True,
    "tpotMs": {"exact": 24.1, "chosen": 17.9, "limit": 20},
    "speedup": {"value": 1.35, "low": 1.28, "high": 1.42, "pairs": 12, "condition": "equal concurrency 16"},
    "accuracy": {
        "exact": 0.784, "chosen": 0.782, "items": 6450, "maxDropPoints": 1.0, "confidence": 0.95,
        "dropPoints": 0.2, "discordantShare": 0.01, "noiseFloor": 0.009,
    },
}  # fmt: skip


def manifest() -> dict[str, object]:
    return {
        "apiVersion": "serving.sere.dev/v1alpha1",
        "kind": "SereProfile",
        "metadata": {"name": "p"},
        "spec": {"policy": POLICY, "key": KEY, "evidence": EVIDENCE},
    }


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    profile = Profile.parse(manifest())
    profile.write(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json") == profile
    assert profile.spec.policy.digest == Policy.parse(POLICY).digest


def test_digest_is_of_the_content_not_of_the_name() -> None:
    one, other = Profile.parse(manifest()), Profile.parse({**manifest(), "metadata": {"name": "q"}})
    assert one.spec.digest == other.spec.digest
    changed = manifest()
    changed["spec"] = {**changed["spec"], "key": {**KEY, "device": "NVIDIA H200"}}  # type: ignore[dict-item]
    assert Profile.parse(changed).spec.digest != one.spec.digest


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("engine_version", "0.31.0", "profile was made for engine 0.31.0, this pod runs 0.32.0"),
        ("device", "NVIDIA H200", "profile was made for device NVIDIA H200, this pod runs cpu"),
        ("model_revision", "", "profile was made for model revision (none), this pod runs r1"),
        ("plugin_version", "0.0.9", "profile was made for plug-in 0.0.9, this pod runs 0.1.0"),
        ("model_name", "org/other", "profile was made for model org/other, this pod runs m"),
        (
            "weight_format",
            "fp8-1a2b3c4d of bfloat16",
            "profile was made for weight format fp8-1a2b3c4d of bfloat16, this pod runs (none)",
        ),
        ("tensor_parallel_size", 2, "profile was made for tensor parallel size 2, this pod runs 1"),
    ],
)
def test_a_profile_of_something_else_says_what_differs(field: str, value: object, sentence: str) -> None:
    running = ProfileKey.model_validate(KEY)
    assert running.mismatch(running) is None
    assert running.model_copy(update={field: value}).mismatch(running) == sentence


def test_the_names_of_folders_say_nothing_of_the_model() -> None:
    """A model is mounted where each cluster likes; its configuration, weights and revision are compared."""
    running = ProfileKey.model_validate({**KEY, "modelName": "/mnt/pvc/models/a"})
    for name in ("/models/b", "org/model"):
        assert running.model_copy(update={"model_name": name}).mismatch(running) is None


def test_models_of_one_shape_in_other_weights_are_told_apart() -> None:
    plain: dict[str, object] = {"hidden_size": 8}
    fp8: dict[str, object] = {**plain, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    other: dict[str, object] = {**plain, "quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}
    formats = [weight_format(config, "bfloat16", None) for config in (plain, fp8, other)]
    assert formats[0] == "bfloat16"
    assert formats[1].startswith("fp8-") and formats[1].endswith(" of bfloat16")
    assert len({*formats, weight_format(plain, "float16", None), weight_format(plain, "bfloat16", "fp8")}) == 5
    assert model_config_digest(plain) == model_config_digest(fp8), "similarity is that of the unquantised twin"


def test_bad_profiles_name_the_field(tmp_path: Path) -> None:
    broken = manifest()
    broken["spec"] = {**broken["spec"], "polcy": {}}  # type: ignore[dict-item]
    with pytest.raises(ProfileError, match=r"spec.polcy: unknown field"):
        Profile.parse(broken)
    with pytest.raises(ProfileError, match="cannot read the profile"):
        Profile.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("layers", "refused"),
    [
        (range(4), None),
        ((1, 2, 3), None),
        ((4, 5, 7), "has buckets for layers 1-3, but this model has MoE layers 4-5, 7; layers count from 0"),
        (range(1), "has buckets for layers 1-3, but this model has MoE layers 0;"),
    ],
)
def test_a_layer_group_that_names_no_layer_of_the_model_is_refused(layers: Sequence[int], refused: str | None) -> None:
    policy = Policy.parse({"layerGroups": [{"firstLayer": 1, "lastLayer": 3, "buckets": []}]})
    if refused is None:
        policy.check_layers(layers)
        return
    with pytest.raises(PolicyError, match=refused):
        policy.check_layers(layers)


def test_a_policy_says_what_its_layer_groups_do() -> None:
    bucket = {"minTokens": 8, "maxTokens": 64, "kind": "topk"}
    policy = Policy.parse({
        "buckets": [{**bucket, "S": 3}],
        "layerGroups": [{"firstLayer": 1, "lastLayer": 3, "buckets": [{**bucket, "S": 2}]}, {"firstLayer": 5, "lastLayer": 5, "buckets": []}],
    })  # fmt: skip
    assert policy.describe() == (
        "topk 3 for 8-64 tokens, exact elsewhere; in layers 1-3 topk 2 for 8-64 tokens; in layer 5 exact"
    )
