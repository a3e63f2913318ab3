"""The resources' models: samples parse, bad specs are refused as the API server refuses them, defaults are as documented."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sere_ext.contract.errors import SpecError
from sere_ext.contract.profile import Profile
from sere_operator.api import common, meta
from sere_operator.api.common import duration_seconds, parse_pvc, parse_spec
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.api.profile import profile_name
from sere_operator.api.tuning import SereTuningJobSpec
from tests.kit import ROOT

SAMPLES = ROOT / "manifests" / "samples"


def cases(name: str) -> list[Any]:
    loaded = yaml.safe_load((ROOT / "tests" / "assets" / "resources" / f"{name}.yaml").read_text())
    return [pytest.param(case, id=case["name"]) for case in loaded]


def spec_of(name: str) -> dict[str, Any]:
    objects = yaml.safe_load_all((SAMPLES / f"{name}.yaml").read_text())
    return dict(next(o for o in objects if o["kind"] == "SereDeployment")["spec"])


def merged(into: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(into)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result[key], value) if isinstance(value, dict) and isinstance(result.get(key), dict) else value
    return result


SAMPLE_OBJECTS = [
    pytest.param(o, id=f"{path.stem}-{o['kind']}")
    for path in sorted(SAMPLES.glob("*.yaml"))
    for o in yaml.safe_load_all(path.read_text())
    if o["apiVersion"] == meta.API_VERSION
]


@pytest.mark.parametrize("resource", SAMPLE_OBJECTS)
def test_samples_parse(resource: dict[str, Any]) -> None:
    if resource["kind"] == "SereProfile":
        Profile.parse(resource)
    else:
        model = {"SereDeployment": SereDeploymentSpec, "SereTuningJob": SereTuningJobSpec}[resource["kind"]]
        parse_spec(model, resource["spec"])


@pytest.mark.parametrize("case", cases("refused"))
def test_what_the_server_refuses_the_models_refuse(case: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"^spec[.:]") as told:
        parse_spec(SereDeploymentSpec, merged(spec_of(case["sample"]), case["patch"]))
    if "buckets overlap" in case["told"]:
        assert case["told"].split("Invalid value: ")[-1] in str(told.value), "in the same words"


@pytest.mark.parametrize("case", cases("accepted"))
def test_what_the_server_accepts_the_models_accept(case: dict[str, Any]) -> None:
    parse_spec(SereDeploymentSpec, merged(spec_of(case["sample"]), case["patch"]))


def test_a_bad_spec_is_told_by_path_one_sentence_per_problem() -> None:
    bad = merged(spec_of("tuned"), {"replicsa": 2, "slo": {"tpotMs": {"p95": -1}}})
    with pytest.raises(SpecError) as told:
        parse_spec(SereDeploymentSpec, bad)
    assert str(told.value) == (
        "spec.slo.tpotMs.p95: Input should be greater than 0 (got -1); spec.replicsa: unknown field; did you mean replicas?"
    )


def test_the_sample_profile_is_named_and_pinned_by_its_content() -> None:
    profile, deployment = yaml.safe_load_all((SAMPLES / "profile.yaml").read_text())
    spec = Profile.parse(profile).spec
    assert deployment["spec"]["routing"]["profileRef"] == {"name": profile["metadata"]["name"], "digest": spec.digest}
    assert profile["metadata"]["name"] == profile_name("qwen3", spec)


@pytest.mark.parametrize(
    ("patch", "surge", "unavailable"),
    [
        ({}, 1, 0),
        ({"strategy": "DrainFirst"}, 0, 1),
        ({"maxSurge": 2}, 2, 0),
        ({"maxSurge": 0, "maxUnavailable": 1}, 0, 1),
        ({"strategy": "DrainFirst", "maxUnavailable": 3}, 0, 3),
    ],
)
def test_rollout_defaults_follow_the_strategy(patch: dict[str, Any], surge: int, unavailable: int) -> None:
    rollout = parse_spec(SereDeploymentSpec, merged(spec_of("minimal"), {"rollout": patch})).rollout
    assert (rollout.surge, rollout.unavailable) == (surge, unavailable)


def test_replicas_default_to_one_and_are_nobodys_where_an_autoscaler_decides() -> None:
    minimal = spec_of("minimal")
    assert parse_spec(SereDeploymentSpec, minimal).wanted_replicas == 1
    assert parse_spec(SereDeploymentSpec, {**minimal, "replicas": 0}).wanted_replicas == 0
    assert parse_spec(SereDeploymentSpec, {**minimal, "autoscaling": {"max": 3}}).wanted_replicas is None


def test_a_profile_is_required_by_default_only_when_tuned() -> None:
    assert not parse_spec(SereDeploymentSpec, spec_of("minimal")).profile_required
    assert parse_spec(SereDeploymentSpec, spec_of("tuned")).profile_required
    waived = merged(spec_of("tuned"), {"rollout": {"requireProfile": False}})
    assert not parse_spec(SereDeploymentSpec, waived).profile_required


def test_a_tuning_job_is_an_exact_copy_of_what_is_tuned() -> None:
    spec = parse_spec(SereDeploymentSpec, spec_of("tuned")).to_json_dict()
    kept = {key: spec[key] for key in ("model", "engine", "resources", "slo", "accuracy", "tuning", "volumes", "tolerations")}
    assert parse_spec(SereTuningJobSpec, {"deployment": "qwen3", **kept}).to_json_dict() == {
        "deployment": "qwen3",
        "suspend": False,
        **kept,
    }


def test_models_are_frozen() -> None:
    spec = parse_spec(SereDeploymentSpec, spec_of("minimal"))
    with pytest.raises(ValidationError, match="frozen"):
        spec.replicas = 3  # type: ignore[misc]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("2h0m5s", 7205)])
def test_durations(text: str, seconds: int) -> None:
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m30", "1.5h", "30m1h", "-5s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(SpecError, match="write it like 90s, 30m or 1h30m"):
        duration_seconds(text)


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("pvc://data/a/b.jsonl", ("data", "a/b.jsonl")),
        ("pvc://models", ("models", "")),
        ("pvc://models/", ("models", "")),
        ("file:///a", None),
    ],
)
def test_pvc_uris(uri: str, parts: tuple[str, str] | None) -> None:
    assert parse_pvc(uri) == parts


names = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,250}[a-z0-9])?", fullmatch=True)


@given(names, st.sampled_from(["policy", "tuning", "pdb", "a" * 20]), st.sampled_from([45, 63, 253]))
def test_child_names_fit_end_well_and_keep_the_suffix(parent: str, suffix: str, limit: int) -> None:
    name = meta.child_name(parent, suffix, limit)
    assert len(name) <= limit
    assert name.endswith(f"-{suffix}")
    assert name[0].isalnum()
    if len(parent) + 1 + len(suffix) <= limit:
        assert name == f"{parent}-{suffix}"


def test_long_names_that_differ_at_the_end_stay_apart() -> None:
    one, two = ("a" * 80 + "1", "a" * 80 + "2")
    assert meta.fit_name(one) != meta.fit_name(two)
    assert meta.child_name(one, "policy", 63) != meta.child_name(two, "policy", 63)
    assert len(meta.label_value(one)) == 63


@pytest.mark.parametrize(("path", "free"), [("/tmp/project/env", True), ("/tmp", False), ("/etc/sere/x", False), ("/mnt", False)])
def test_a_volume_below_tmp_hides_nothing(path: str, free: bool) -> None:
    assert common._is_free(path) is free
