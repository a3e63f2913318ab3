"""The sentences of `kubectl sere explain`, for each way things can stand."""

from __future__ import annotations

from typing import Any

import pytest

from sere_operator.api import meta
from sere_operator.cli.explain import explain

STABLE, NEWER = "sere-9f3c01d2", "sere-77ab4e10"
MAP = {"data": {"stable": STABLE}}


def deployment(
    mode: str = "Tuned", annotations: dict[str, str] | None = None, generation: int = 1, **status: Any
) -> dict[str, Any]:
    return {
        "metadata": {"name": "qwen3", "generation": generation, "annotations": annotations or {}},
        "spec": {"routing": {"mode": mode, **({"profileRef": {"name": "p"}} if mode == "Profile" else {})}},
        "status": {"observedGeneration": 1, **status},
    }


def condition(kind: str, status: str, reason: str, message: str = "") -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def pod(name: str, ready: bool = True, policy: str | None = None) -> dict[str, Any]:
    annotations = {meta.POLICY_ANNOTATION: policy} if policy else {}
    conditions = [{"type": "Ready", "status": str(ready)}]
    return {"metadata": {"name": name, "annotations": annotations}, "status": {"conditions": conditions}}


def told(resource: dict[str, Any], config_map: dict[str, Any] | None = MAP, job: dict[str, Any] | None = None) -> list[str]:
    return explain(resource, [pod("a"), pod("b", ready=False)], config_map, job)


def test_a_certified_policy() -> None:
    status = {
        "policy": {"stable": STABLE, "profile": "qwen3-8ccc", "description": "sere S=2 rho=0.30 for 8-64 tokens, exact elsewhere"},
        "speedup": "1.35x", "accuracy": "-0.2", "tpotP95": "17.9ms",
        "conditions": [condition("Tuned", "True", "Certified", "profile qwen3-8ccc is certified")],
    }  # fmt: skip
    assert told(deployment(**status)) == [
        f"qwen3 runs policy {STABLE} (sere S=2 rho=0.30 for 8-64 tokens, exact elsewhere), because tuning made profile qwen3-8ccc.",
        "Its certificate measured: accuracy changed by -0.2 points, TPOT p95 17.9ms, 1.35x the speed of exact routing.",
        "Tuned is True (Certified): profile qwen3-8ccc is certified.",
        "1 of 2 pods pass their readiness probe.",
    ]


def test_a_rollout_that_waits_for_its_tuning() -> None:
    held = condition(
        "Progressing", "True", "TuningFirst", "search, 3/8 trials; to replace them now, set rollout.requireProfile: false"
    )
    assert (
        "Progressing is True (TuningFirst): search, 3/8 trials; to replace them now, set rollout.requireProfile: false."
        in told(deployment(conditions=[held]))
    )


def test_the_kill_switch_on_the_resource() -> None:
    first = told(deployment(annotations={meta.OVERRIDE_ANNOTATION: "exact"}))[0]
    assert "because the kill switch is on" in first
    assert "`kubectl sere exact qwen3 --off` lifts it." in first


def test_the_kill_switch_in_the_config_map_alone_is_seen() -> None:
    assert "kill switch is on" in told(deployment(), {"data": {"stable": STABLE, "override": "exact"}})[0]


@pytest.mark.parametrize(
    ("mode", "because"),
    [
        ("Static", "nothing certifies a static policy"),
        ("Profile", "spec.routing.profileRef names profile p"),
        ("Exact", "on its way out"),
    ],
)
def test_other_sources(mode: str, because: str) -> None:
    assert because in told(deployment(mode))[0]


def test_exact_as_asked_and_exact_for_want_of_better() -> None:
    exact = {"data": {"stable": "exact"}}
    assert told(deployment("Exact"), exact)[0] == "qwen3 routes exactly, because spec.routing asks for it."
    assert told(deployment("Tuned"), None)[0] == "qwen3 routes exactly, although spec.routing.mode is Tuned."


def test_a_canary_on_its_way_awaiting_approval() -> None:
    sentences = told(
        deployment(
            rollout={"candidate": NEWER, "stage": "AwaitingApproval", "canaryPods": ["a"], "message": "the canary passed"},
            conditions=[condition("PolicyApplied", "False", "AwaitingApproval")],
        )
    )
    assert f"Policy {NEWER} is on its way: stage AwaitingApproval, on a. The canary passed." in sentences
    waiting = next(sentence for sentence in sentences if sentence.startswith("PolicyApplied"))
    assert waiting.endswith("`kubectl sere approve qwen3` promotes it.")
    assert "nobody has approved yet" in waiting, "a condition without a message is told by its reason's sentence"


def test_a_rejected_policy_is_told_with_its_evidence() -> None:
    message = "canary TPOT p95 above the limit of 20 ms (9.4 % of 2,310 requests over it)"
    sentences = told(deployment(rejected=[{"digest": NEWER, "message": message}]))
    assert f"Policy {NEWER} is not tried again for this model and engine: {message}" in sentences


def test_tuning_that_found_nothing_says_what_would_have_to_give() -> None:
    conditions = [condition("Tuned", "False", "Infeasible", "closest was topk 4: TPOT p95 20.8 ms, limit 20 ms")]
    sentence = next(s for s in told(deployment(conditions=conditions)) if s.startswith("Tuned"))
    assert sentence == (
        "Tuned is False (Infeasible): closest was topk 4: TPOT p95 20.8 ms, limit 20 ms. "
        "Widen the limit that the message names, or give more items or budget: a changed spec is tuned anew."
    )


def test_tuning_under_way() -> None:
    job = {"metadata": {"name": "qwen3-tune-1"}, "status": {"progress": "12/60"}}
    assert "Tuning job qwen3-tune-1 has done 12/60 trials." in told(deployment(), job=job)
    assert "Tuning job qwen3-tune-1 has not begun its trials." in told(deployment(), job={"metadata": job["metadata"]})


def test_pods_on_a_policy_of_their_own() -> None:
    sentences = explain(deployment(), [pod("a", policy=NEWER), pod("b")], MAP, None)
    assert f"Pod a has orders to run policy {NEWER}, whatever the others run." in sentences
    assert explain(deployment(), [], MAP, None)[-1] == "There is no pod."


def test_an_operator_that_is_behind_or_absent() -> None:
    behind = told(deployment(generation=3, operator="sere-system/sere-operator"))[-1]
    assert behind.startswith("The current spec (generation 3) has not been judged yet, only generation 1: operator sere-system/")
    fresh = {**deployment(), "status": {}}
    assert told(fresh, None)[-1] == "No operator has judged this resource yet; check that one runs and manages this namespace."


def failing(name: str, state: dict[str, Any], last: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    container = {"image": "e:9", "restartCount": 4, "state": state, "lastState": last or {}}
    made = pod(name, ready=False)
    made["status"] |= {"containerStatuses": [container], **status}
    return made


CRASH = failing(
    "a",
    {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container"}},
    {"terminated": {"exitCode": 1, "reason": "Error", "message": "OSError: /mnt/pvc/models/qwen3\n  is no folder"}},
)
IMAGE = failing("b", {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "e:9"'}})
NODE = pod("c", ready=False)
NODE["status"]["conditions"].append(
    {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: Insufficient nvidia.com/gpu."}
)


@pytest.mark.parametrize(
    ("pods", "sentence"),
    [
        (
            [CRASH],
            "Pod a cannot run: CrashLoopBackOff, exit code 1, 4 restarts: OSError: /mnt/pvc/models/qwen3 is no folder. "
            "Its last log lines: `kubectl logs a --previous`.",
        ),
        ([IMAGE], 'Pod b cannot run: ImagePullBackOff: Back-off pulling image "e:9".'),
        ([NODE], "Pod c cannot run: no node takes it: 0/3 nodes: Insufficient nvidia.com/gpu."),
        (
            [NODE, {**NODE, "metadata": {"name": "d"}}],
            "2 pods (c and others) cannot run: no node takes it: 0/3 nodes: Insufficient nvidia.com/gpu.",
        ),
    ],
    ids=["crash", "image", "node", "two of one cause"],
)
def test_why_pods_cannot_run_comes_right_after_what_runs(pods: list[dict[str, Any]], sentence: str) -> None:
    conditions = [condition("PolicyApplied", "False", "PolicyPending", "1 of 1 pods do not show exact yet")]
    sentences = explain(deployment(conditions=conditions), pods, MAP, None)
    assert sentences[1] == sentence


def test_a_pod_that_loads_its_model_is_not_called_failing() -> None:
    for state in ({"waiting": {"reason": "ContainerCreating"}}, {"running": {}}):
        assert not [s for s in explain(deployment(), [failing("a", state)], MAP, None) if "cannot run" in s]
    assert "cannot run" not in " ".join(explain(deployment(), [pod("a")], MAP, None))
