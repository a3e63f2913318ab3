"""`decide` on single snapshots: what is written, what is left alone, and what is said."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from sere_ext.contract.policy import Policy
from sere_ext.contract.volume import POLICY_SHARDS
from sere_operator.plan.decide import decide
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.rollout.aftermath import inconclusive
from sere_operator.plan.rollout.candidate import SETTLE_S, WATCH_S, candidates_turn
from sere_operator.plan.rollout.step import Step
from sere_operator.plan.snapshot import Similarity
from sere_operator.plan.times import seconds
from tests.kit.plan_world import DIGEST, POLICY, CrashError, Pod, World, profile_body
from tests.kit.states import engine_state

STATIC = {"mode": "Static", "policy": POLICY}
PROFILE = {"mode": "Profile", "profileRef": {"name": "p"}}
TUNED = {
    "routing": {"mode": "Tuned"},
    "accuracy": {"maxDropPoints": 1, "tasks": [{"uri": "pvc://data/items.jsonl"}]},
    "tuning": {
        "similarity": {"calibrate": {"uri": "pvc://data/c.jsonl"}},
        "workload": {"load": {"concurrency": [16]}},
    },
}


def settled(**spec: Any) -> World:
    world = World(2, **spec)
    world.settle()
    return world


def test_it_settles_and_then_writes_nothing() -> None:
    world = settled()
    assert world.condition("Ready")["message"] == "serving exact routing"
    plan = world.step()
    assert plan.writes == 0
    assert plan.events == []


def test_the_config_map_comes_before_what_points_into_it() -> None:
    plan = decide(World(2).observe(), Defaults())
    assert [body["kind"] for body in plan.apply] == ["ConfigMap", "Deployment", "Service", "PodDisruptionBudget"]


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"suspend": True}, "Suspended", "changes nothing"),
        ({"replicas": 1, "autoscaling": {"max": 2}}, "InvalidSpec", "replicas or autoscaling"),
        ({"nonsense": 1}, "InvalidSpec", "spec.nonsense"),
    ],
)
def test_what_cannot_be_carried_out_touches_nothing(change: dict[str, Any], reason: str, words: str) -> None:
    world = settled()
    world.edit(**change)
    world.children.pop("Service")
    plan = decide(world.observe(), Defaults()) if reason == "Suspended" else decide_raw(world)
    assert (plan.apply, plan.replace, plan.pods, plan.delete) == ([], [], [], [])
    assert plan.status is not None
    ready = next(c for c in plan.status["conditions"] if c["type"] == "Ready")
    assert (ready["reason"], ready["status"]) == (reason, "False")
    assert words in ready["message"]
    assert plan.status["observedGeneration"] == 2


def decide_raw(world: World) -> Any:
    """`observe` itself stops at a spec that it cannot read."""
    from sere_operator.plan.snapshot import Snapshot

    return decide(Snapshot(now=world.now, object=world.object), Defaults())


SCALED = {"replicas": None, "autoscaling": {"max": 4, "metric": {"name": "queue", "averageValue": "2"}}}


def test_replicas_are_handed_over_before_they_are_left_out_and_the_autoscaler_goes_again() -> None:
    world = settled()
    ours = {"manager": "sere-operator", "operation": "Apply", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
    world.children["Deployment"]["metadata"]["managedFields"] = [ours]
    world.edit(**SCALED)
    plan = decide(world.observe(), Defaults())
    assert [body["spec"] for body in plan.hand_over] == [{"replicas": 2}]
    assert [body["kind"] for body in plan.apply] == ["Deployment", "HorizontalPodAutoscaler"]
    (scaler,) = (body for body in plan.apply if body["kind"] == "HorizontalPodAutoscaler")
    world.children["HorizontalPodAutoscaler"] = {**scaler, "metadata": {**scaler["metadata"], "uid": "h"}}
    world.edit(replicas=2, autoscaling=None)
    assert [body["kind"] for body in decide(world.observe(), Defaults()).delete] == ["HorizontalPodAutoscaler"]


def test_an_autoscaler_that_the_user_brought_is_left_alone() -> None:
    world = settled()
    foreign = {"kind": "HorizontalPodAutoscaler", "metadata": {"name": "m", "namespace": "ns", "uid": "x"}}
    world.children["HorizontalPodAutoscaler"] = foreign
    world.edit(replicas=None, autoscaling={"max": 4})
    plan = decide(world.observe(), Defaults())
    assert plan.delete == []
    assert [body["kind"] for body in plan.apply] == ["Deployment"]
    world.edit(**SCALED)
    assert decide(world.observe(), Defaults()).apply == [], "its name is taken: said, nothing touched"


def test_a_resource_that_is_being_deleted_is_left_to_the_garbage_collector() -> None:
    world = settled()
    world.object["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert decide(world.observe(), Defaults()).writes == 0


def test_somebody_elses_object_of_that_name_is_not_taken() -> None:
    world = World(2)
    world.children["Service"] = {"kind": "Service", "metadata": {"name": "m", "namespace": "ns", "uid": "x"}, "spec": {}}
    plan = decide(world.observe(), Defaults())
    assert plan.apply == []
    assert plan.status is not None
    ready = next(c for c in plan.status["conditions"] if c["type"] == "Ready")
    assert "Service m exists and is not ours" in ready["message"]


def test_a_static_policy_goes_by_one_canary_first() -> None:
    world = settled()
    world.edit(routing=STATIC)
    world.settle()
    assert world.stable == DIGEST
    assert [pod.ran for pod in world.pods] == [[DIGEST], [DIGEST]], "a pod went back and forth"
    order = [reason for reason in world.events if reason.startswith(("Canary", "Policy"))]
    assert order == ["CanaryStarted", "CanaryPassed", "PolicyPromoted"]
    assert world.status["policy"]["previous"] == "exact"


@pytest.mark.parametrize(("tpot_ms", "reason"), [(19.0, "Applied"), (60.0, "Rejected")])
def test_a_static_policy_is_taken_back_only_for_flagrant_harm(tpot_ms: float, reason: str) -> None:
    world = settled()
    world.tpot_ms[DIGEST] = tpot_ms  # others: 15 ms
    world.edit(routing=STATIC)
    began = world.now
    while world.condition("PolicyApplied")["reason"] not in ("Rejected", "Applied"):
        world.step()
        world.tick()
    assert world.condition("PolicyApplied")["reason"] == reason
    assert world.now - began > (WATCH_S if reason == "Rejected" else SETTLE_S)


def canary_of(world: World) -> Pod:
    """Look until the canary is annotated; it has not applied the policy yet."""
    for _ in range(8):
        world.step()
        if any("serving.sere.dev/policy" in pod.annotations for pod in world.pods):
            break
        world.tick()
    (canary,) = (pod for pod in world.pods if "serving.sere.dev/policy" in pod.annotations)
    return canary


def look_for(world: World, seconds: int) -> None:
    for _ in range(seconds):
        world.step()
        world.tick()


def canary_of_last(world: World) -> str:
    """The pod that refuses policies."""
    (name,) = world.errors
    return name


PATIENT = {"canary": {"minRequests": 100, "deadline": "10m"}}


def test_a_canary_that_names_an_error_goes_back_after_a_grace_of_looking() -> None:
    world = settled(rollout=PATIENT)
    world.edit(routing=STATIC)
    world.errors[canary_of(world).name] = "policy needs a similarity artefact"
    look_for(world, 50)
    assert world.condition("PolicyApplied")["reason"] == "Canary"
    world.watching_since = world.now  # another operator: it has seen the error only now
    look_for(world, 50)
    assert world.condition("PolicyApplied")["reason"] == "Canary"
    look_for(world, 20)
    assert world.condition("PolicyApplied")["reason"] == "Inconclusive"
    message = world.condition("PolicyApplied")["message"]
    assert f"did not apply the policy; pod {canary_of_last(world)} says: policy needs a similarity artefact" in message


def test_a_pod_that_is_slow_to_answer_is_waited_for() -> None:
    world = settled(rollout=PATIENT)
    world.edit(routing=STATIC)
    canary = canary_of(world)
    canary.ready = False
    look_for(world, 200)
    assert world.condition("PolicyApplied")["reason"] == "Canary"
    canary.ready = True
    world.settle()
    assert {pod.digest for pod in world.pods} == {DIGEST}
    assert "PolicyInconclusive" not in world.events


def test_a_deadline_that_passed_while_nobody_looked_is_not_over_at_once() -> None:
    world = settled()
    world.profiles["p"] = profile_body(POLICY)
    world.rate = 0.0
    world.edit(routing=PROFILE)
    look_for(world, 10)
    assert world.status["rollout"]["stage"] == "Analysing"
    world.tick(3600)  # the operator was down; deadline: 60 s
    world.rate = 50.0
    world.settle()
    assert {pod.digest for pod in world.pods} == {DIGEST}
    assert "PolicyInconclusive" not in world.events


def test_a_canary_whose_ranks_disagree_for_a_moment_is_not_given_up() -> None:
    world = settled()
    world.profiles["p"] = profile_body(POLICY)
    world.edit(routing=PROFILE)
    look_for(world, 8)
    assert world.status["rollout"]["stage"] == "Analysing"
    snapshot = world.observe()
    split = tuple(
        replace(pod, state=engine_state(pod.digest or "", world.pods[0].key, ranks=(DIGEST, "exact"))) for pod in snapshot.pods
    )
    plan = decide(replace(snapshot, pods=split), Defaults())
    assert [event.reason for event in plan.events] == []


@pytest.mark.parametrize(("rate", "drift_ms"), [(3.0, 0.0), (50.0, 0.0), (50.0, 0.1)], ids=["quiet", "busy", "load rises"])
def test_on_one_pod_alone_the_policies_take_turns(rate: float, drift_ms: float) -> None:
    """A load that drifts meets both, where before and after would have blamed the policy. It stays Ready throughout."""
    world = World(1, routing={"mode": "Tuned"}, rollout=PATIENT, **{k: v for k, v in TUNED.items() if k != "routing"})
    world.settle(20)
    world.object["status"]["policy"]["profile"] = "p"
    world.profiles["p"] = profile_body(POLICY)
    world.rate = rate
    turns: list[str] = []
    ready: list[str] = []
    while world.condition("PolicyApplied")["reason"] != "Applied":
        for digest in ("exact", DIGEST):
            world.tpot_ms[digest] = 10 + drift_ms * len(turns)
        world.step()
        if "countedSince" in ((world.status.get("rollout") or {}).get("state") or {}):
            ready.append(world.condition("Ready")["status"])
        turns.append(world.pods[0].digest)
        world.tick()
        assert len(turns) < 300
    assert "PolicyInconclusive" not in world.events
    in_order = [digest for digest, _ in itertools.groupby(turns)]
    assert in_order[:3] == ["exact", DIGEST, "exact"]
    assert set(ready[:-2]) == {"True"}, "a turn is no reason not to be Ready; the promotion's switch is waited for"
    assert world.pods[0].digest == DIGEST


def test_turns_grow_so_that_long_requests_fit_into_one() -> None:
    mine = [candidates_turn(float(second), True, True) for second in range(0, 300)]
    assert [len(list(run)) for _, run in itertools.groupby(mine)] == [20, 20, 40, 40, 80, 80, 20]
    assert candidates_turn(25.0, True, False)
    assert not candidates_turn(5.0, False, True)


def test_ready_is_false_until_the_current_spec_answers() -> None:
    world = settled()
    world.edit(routing=STATIC)
    world.step()
    assert (world.condition("Ready")["status"], world.condition("Ready")["observedGeneration"]) == ("False", 2)
    world.settle()
    assert world.condition("Ready")["status"] == "True"


def test_the_kill_switch_reaches_pods_and_config_map_in_one_plan() -> None:
    world = settled(routing=STATIC)
    world.annotate("serving.sere.dev/override", "exact")
    plan = world.step()
    assert world.children["ConfigMap"]["data"]["override"] == "exact"
    assert [patch.annotations["serving.sere.dev/override"] for patch in plan.pods] == ["exact", "exact"]
    world.tick()
    world.tick()
    assert {pod.digest for pod in world.pods} == {"exact"}
    world.settle()
    assert world.stable == DIGEST, "the switch changes no decision"
    assert world.status["routing"] == "Exact"
    world.annotate("serving.sere.dev/override", None)
    world.settle()
    assert {pod.digest for pod in world.pods} == {DIGEST}


def test_a_person_gives_a_policy_up() -> None:
    world = settled(routing=STATIC)
    world.annotate("serving.sere.dev/rollback", DIGEST)
    world.settle()
    assert {pod.digest for pod in world.pods} == {"exact"}
    assert world.condition("PolicyApplied")["reason"] == "RolledBack"


def test_giving_up_goes_to_exact_where_the_policy_before_is_lost() -> None:
    world = settled(routing=STATIC)
    world.object["status"]["policy"]["previous"] = "sere-00000000"
    world.annotate("serving.sere.dev/rollback", DIGEST)
    world.settle()
    assert world.stable == "exact"
    assert {pod.digest for pod in world.pods} == {"exact"}


def test_a_missing_profile_keeps_what_is_stable() -> None:
    world = settled(routing=STATIC)
    world.edit(routing=PROFILE)
    world.settle(20)
    assert world.condition("PolicyApplied")["reason"] == "ProfileMissing"
    assert {pod.digest for pod in world.pods} == {DIGEST}


def test_a_pinned_profile_of_other_content_is_refused() -> None:
    world = World(2, routing={"mode": "Profile", "profileRef": {"name": "p", "digest": "sha256:" + "0" * 64}})
    world.profiles["p"] = profile_body(POLICY)
    world.settle(20)
    assert "asks for sha256:000" in world.condition("PolicyApplied")["message"]
    assert world.stable == "exact"


def test_a_stale_profile_means_exact_at_once() -> None:
    world = World(2, routing=PROFILE)
    world.profiles["p"] = profile_body(POLICY)
    world.settle()
    assert {pod.digest for pod in world.pods} == {DIGEST}
    world.profiles["p"]["spec"]["key"] = {**world.profiles["p"]["spec"]["key"], "device": "NVIDIA H100"}
    world.settle()
    assert {pod.digest for pod in world.pods} == {"exact"}
    assert world.condition("PolicyApplied")["reason"] == "PolicyStale"
    assert "device NVIDIA H100, this pod runs cpu" in world.condition("PolicyApplied")["message"]


def test_a_profile_of_another_model_of_the_same_shape_is_refused() -> None:
    world = World(2, routing=PROFILE)
    world.profiles["p"] = profile_body(POLICY)
    world.profiles["p"]["spec"]["key"] = {**world.profiles["p"]["spec"]["key"], "modelName": "org/instruct"}
    world.settle(40)
    assert {pod.digest for pod in world.pods} == {"exact"}
    assert "CanaryStarted" not in world.events
    assert "profile was made for model org/instruct, this pod runs m" in world.condition("PolicyApplied")["message"]


METRICS = [("contains", None, " It is a, I think."), ("regex", r"is (\w)", " It is a, I think."), ("exact", None, "a\nQ: next")]


@pytest.mark.parametrize(("metric", "pattern", "says"), METRICS, ids=[metric for metric, *_ in METRICS])
@pytest.mark.parametrize("harmful", [False, True], ids=["as good", "harmful"])
def test_a_canary_judges_answers_as_the_tuning_did(metric: str, pattern: str | None, says: str, harmful: bool) -> None:
    prompt = {"metric": metric, "stop": ["\n"], **({"pattern": pattern} if pattern else {})}
    world = World(2, routing=PROFILE)
    world.says, world.profiles["p"] = says, profile_body(POLICY, **prompt)
    if harmful:
        world.harmful.add(DIGEST)
    world.settle()
    assert world.condition("PolicyApplied")["reason"] == ("Rejected" if harmful else "Applied")
    assert world.stable == ("exact" if harmful else DIGEST)


@pytest.mark.parametrize(
    ("profile", "rollout"),
    [
        (profile_body(POLICY, certified=False), {}),
        (profile_body(POLICY, speed=None), {}),
        (profile_body(POLICY, speed="undecided"), {}),
        (profile_body(POLICY, golden=0), {}),
        (profile_body({"buckets": [{"minTokens": 300, "kind": "topk", "S": 2}]}), {}),
        (profile_body(POLICY), {"approval": "Manual"}),
    ],
    ids=[
        "advisory",
        "no word on speed",
        "not shown to be faster",
        "no golden prompts",
        "golden prompts that cannot meet the policy",
        "manual",
    ],
)
def test_what_needs_a_person_waits_for_one(profile: dict[str, Any], rollout: dict[str, Any]) -> None:
    world = World(2, routing=PROFILE, rollout={"canary": {"minRequests": 100}, **rollout})
    world.profiles["p"], digest = profile, Policy.parse(profile["spec"]["policy"]).digest
    for _ in range(100):
        world.step()
        world.tick()
    assert world.stable == "exact"
    assert world.condition("PolicyApplied")["reason"] == "AwaitingApproval"
    world.annotate("serving.sere.dev/approved", digest)
    world.settle()
    assert world.stable == digest


def test_a_quiet_night_bans_nothing_and_is_tried_again() -> None:
    world = World(2, routing=PROFILE)
    world.profiles["p"] = profile_body(POLICY)
    world.rate = 0.0
    for _ in range(100):
        world.step()
        world.tick()
    assert world.condition("PolicyApplied")["reason"] == "Inconclusive"
    assert {pod.digest for pod in world.pods} == {"exact"}
    assert "rejected" not in world.status
    world.rate = 50.0
    world.tick(310)
    world.settle()
    assert {pod.digest for pod in world.pods} == {DIGEST}


def test_a_policy_that_stays_inconclusive_is_tried_ever_more_seldom() -> None:
    base, known, waits = Step(stable="exact"), {"candidate": DIGEST}, []
    for _ in range(10):
        step = inconclusive(base, known, 0.0, "no traffic")
        assert step.rollout is not None
        known = step.rollout
        waits.append(seconds(known["nextAttemptAt"]))
    assert waits == [300, 600, 1200, 2400, 4800, 9600, 19_200, 21_600, 21_600, 21_600], "doubled up to 6 hours"


def test_tuning_begins_once_a_pod_answers_and_never_holds_ready() -> None:
    world = World(2, **TUNED)
    for pod in world.pods:
        pod.ready = False
    world.step()
    assert world.jobs == []
    for pod in world.pods:
        pod.ready = True
    world.settle()
    (job,) = world.jobs
    assert job["spec"]["deployment"] == "m"
    assert job["spec"]["tuning"]["similarity"] == {"calibrate": {"uri": "pvc://data/c.jsonl"}}
    assert world.condition("Ready")["status"] == "True"
    assert world.condition("Tuned")["reason"] == "Tuning"


def test_tuning_for_kinds_that_compare_no_experts_needs_no_similarity() -> None:
    tuning = {"policies": ["topk", "oea"], "workload": TUNED["tuning"]["workload"]}
    world = settled(**{**TUNED, "tuning": tuning})
    (job,) = world.jobs
    assert "similarity" not in job["spec"]["tuning"]
    assert job["spec"]["tuning"]["policies"] == ["topk", "oea"]
    assert world.condition("Tuned")["reason"] == "Tuning"


def test_a_profile_that_is_gone_is_said_and_not_taken_for_tuning() -> None:
    world = settled(**TUNED)
    world.jobs[0]["status"] = {"outcome": "Chosen", "profile": "p", "stage": "ended", "progress": "8/8"}
    world.profiles["p"] = profile_body(POLICY)
    world.settle()
    assert world.condition("Tuned")["reason"] == "Certified"
    del world.profiles["p"]
    world.settle()
    tuned = world.condition("Tuned")
    assert (tuned["status"], tuned["reason"]) == ("False", "ProfileMissing")
    assert f"serving.sere.dev/tune-again={world.jobs[0]['metadata']['name']}" in tuned["message"]
    assert {pod.digest for pod in world.pods} == {DIGEST}, "what serves stays"


def test_a_tuning_run_that_cannot_begin_is_said_and_warned_of_once() -> None:
    world = settled(**TUNED)
    blocked = {"type": "Complete", "status": "False", "reason": "TuningBlocked", "message": "ImagePullBackOff: no such image"}
    world.jobs[0]["status"] = {"stage": "waiting: ImagePullBackOff", "conditions": [blocked]}
    plan = world.step()
    assert [(event.type, event.reason, event.message) for event in plan.events] == [
        ("Warning", "TuningBlocked", "ImagePullBackOff: no such image")
    ]
    assert world.condition("Tuned")["message"] == "ImagePullBackOff: no such image"
    assert (world.step().events, world.condition("Ready")["status"]) == ([], "True")


def test_a_changed_spec_asks_for_another_run_and_ends_the_one_that_is_not_wanted() -> None:
    world = settled(**TUNED)
    (first,) = world.jobs
    world.edit(replicas=3)
    world.settle()
    world.edit(tuning={**TUNED["tuning"], "storage": {"claimName": "studies"}})
    world.settle()
    assert world.jobs == [first], "neither replicas nor where studies are kept are what is tuned"
    world.edit(slo={"tpotMs": {"p95": 10}})
    world.settle()
    (second,) = world.jobs
    assert second["metadata"]["name"] != first["metadata"]["name"]
    assert world.deleted == ["SereTuningJob"]


@pytest.mark.parametrize(
    "given",
    [
        {"tuning": {**TUNED["tuning"], "storage": {"claimName": "studies"}}},
        {"tolerations": [{"key": "gpu", "operator": "Exists"}]},
        {"nodeSelector": {"gpu": "h100"}},
        {"volumes": [{"name": "data", "claimName": "data", "mountPath": "/data"}]},
        {"runtimeClassName": "nvidia"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_failed_run_begins_anew_once_it_is_given_something_else(given: dict[str, Any]) -> None:
    world = settled(**TUNED)
    (first,) = world.jobs
    first["status"] = {"outcome": "Failed", "stage": "ended"}
    world.settle(20)
    assert world.jobs == [first], "not by itself"
    world.edit(**given)
    world.settle(20)
    (again,) = world.jobs
    assert again["metadata"]["name"] == first["metadata"]["name"]
    assert again["spec"] != first["spec"] and "status" not in again
    assert world.deleted == ["SereTuningJob"]
    for outcome in ("Infeasible", None, "Chosen"):  # an answer stands, and a run under way goes on
        again["status"] = {"outcome": outcome, "profile": "p"} if outcome else {}
        world.edit(tuning={**TUNED["tuning"], "storage": {"claimName": f"{outcome}".lower()}})
        world.settle(20)
        assert world.jobs == [again]


SERE = {"buckets": [{"minTokens": 8, "kind": "sere", "S": 2, "rho": 0.3}]}


def with_artefact(world: World, letter: str, shards: int) -> dict[str, Any]:
    """`routing` of a policy with an artefact of so many shards."""
    uri = f"configmap://s-{letter}-1/shard-001-of-{shards:03d}"
    world.similarities[uri] = Similarity(tuple(f"{letter}{i}" for i in range(shards)), f"sha256:{letter * 64}")
    return {"mode": "Static", "policy": SERE, "similarity": {"uri": uri}}


def held(world: World) -> list[str]:
    """The shards in the volume, in the order of their ConfigMaps."""
    return [shard for _, body in sorted(world.shards.items()) for shard in body["binaryData"].values()]


def test_another_artefact_is_rolled_out_without_a_new_pod_template() -> None:
    world = settled()
    template, pods = world.children["Deployment"]["spec"]["template"], [pod.uid for pod in world.pods]
    seen: list[str | None] = []
    for letter in ("a", "b", "c"):
        world.edit(routing=with_artefact(world, letter, 3))
        world.settle()
        seen.append(world.stable)
        assert {pod.digest for pod in world.pods} == {world.stable}
    assert len({*seen, "exact"}) == 4
    # The one in force, and the one before, to go back to.
    assert sorted(held(world)) == ["b0", "b1", "b2", "c0", "c1", "c2"]
    assert world.children["Deployment"]["spec"]["template"] == template
    assert [pod.uid for pod in world.pods] == pods
    (volume,) = (volume for volume in template["spec"]["volumes"] if volume["name"] == "policy")
    optional = [source["configMap"] for source in volume["projected"]["sources"] if "optional" in source.get("configMap", {})]
    assert set(world.shards) < {source["name"] for source in optional}
    world.edit(routing={"mode": "Exact"})
    world.settle()
    world.edit(routing=STATIC)
    world.settle()
    world.edit(routing={"mode": "Exact"})
    world.settle()
    assert world.shards == {}, "nothing needs them any more"
    assert world.deleted == []


def test_shards_are_written_before_the_policy_that_needs_them() -> None:
    world = settled()
    world.edit(routing=with_artefact(world, "a", 3))
    world.step()
    world.tick(3)
    written = [body["metadata"]["name"] for body in world.step().apply]
    assert written == ["m-policy-shard-0", "m-policy-shard-1", "m-policy-shard-2", "m-policy"]


def test_killed_between_any_two_writes_the_policy_in_force_is_always_whole() -> None:
    """A pod may start at any moment; and what it needs must not move, or its volume would lack it for a moment."""
    world = World(2)
    places: dict[str, str] = {}
    for letter in ("a", "b", "c", "d"):
        world.edit(routing=with_artefact(world, letter, 6))
        for look in range(120):
            try:
                world.step(crash_after=look % 5)
            except CrashError:
                pass
            world.tick()
            assert world.stable in (None, "exact") or world.whole(str(world.stable))
            for name, body in world.shards.items():
                (shard,) = body["binaryData"].values()
                assert places.setdefault(shard, name) == name, "moved"
        world.settle()
        assert {pod.digest for pod in world.pods} == {world.stable}
        assert f"{letter}5" in held(world)


def test_a_shard_that_was_lost_or_changed_is_put_back() -> None:
    world = World(2)
    world.edit(routing=with_artefact(world, "a", 3))
    world.settle()
    before = held(world)
    name = sorted(world.shards)[1]
    del world.shards[name]
    world.shards[sorted(world.shards)[0]]["binaryData"]["foreign"] = "x"
    world.settle()
    assert held(world) == before


def test_an_object_of_somebody_else_with_a_shards_name_is_left_alone() -> None:
    world = World(2)
    world.edit(routing=with_artefact(world, "a", 3))
    theirs = {"kind": "ConfigMap", "metadata": {"name": "m-policy-shard-1"}, "data": {"a": "b"}}
    world.shards["m-policy-shard-1"] = theirs
    assert world.step().apply == []
    assert "ConfigMap m-policy-shard-1 exists and is not ours" in world.condition("Ready")["message"]


@pytest.mark.parametrize(("shards", "moves"), [(POLICY_SHARDS // 2, True), (POLICY_SHARDS // 2 + 1, False)])
def test_two_artefacts_that_do_not_fit_together_are_never_written(shards: int, moves: bool) -> None:
    digests = []
    world = World(2)
    for letter in ("a", "b", "c"):
        static = with_artefact(world, letter, shards)
        world.edit(routing=static)
        world.settle(40)
        digests.append(world.stable)
    assert (len(set(digests)) == 3) is moves
    if not moves:
        condition = world.condition("PolicyApplied")
        assert condition["reason"] == "InvalidSpec"
        assert "too large to be held together" in condition["message"]
        world.edit(routing={"mode": "Exact"})
        world.settle()
        world.edit(routing=static)
        world.settle()
        assert world.stable not in (digests[0], "exact"), "the way out that the message names"


def test_an_artefact_larger_than_pods_can_be_given_is_held_and_said() -> None:
    world = settled(routing=STATIC)
    world.edit(routing=with_artefact(world, "a", POLICY_SHARDS + 1))
    world.settle(40)
    assert world.stable == DIGEST
    assert world.shards == {}
    assert "larger than the 15 MB that pods can be given" in world.condition("PolicyApplied")["message"]


def test_a_lost_config_map_comes_back_with_the_same_stable_policy() -> None:
    world = settled(routing=STATIC)
    world.children.pop("ConfigMap")
    world.step()
    assert world.stable == DIGEST


def test_a_pod_that_does_not_follow_gets_another_nonce_later() -> None:
    """The kubelet may have looked into a cache that was a moment old."""
    world = settled()
    world.edit(routing=STATIC)
    world.step()
    world.now += 3
    world.step()
    world.step()
    nonces = {pod.name: pod.annotations["serving.sere.dev/refresh"] for pod in world.pods}
    world.now += 5
    world.step()
    assert {pod.name: pod.annotations["serving.sere.dev/refresh"] for pod in world.pods} == nonces
    world.now += 15
    world.step()
    canary = next(pod for pod in world.pods if "serving.sere.dev/policy" in pod.annotations)
    assert canary.annotations["serving.sere.dev/refresh"] != nonces[canary.name]


def test_no_free_gpu_is_said_in_the_schedulers_words_after_a_grace() -> None:
    from sere_operator.plan import status
    from sere_operator.plan.snapshot import PodView
    from sere_operator.plan.times import stamp

    world = settled()
    serving = world.observe().pods[0]
    since = {"type": "PodScheduled", "status": "False", "lastTransitionTime": stamp(world.now)}
    pod = PodView(
        {
            "metadata": {"name": "m-9", "uid": "9"},
            "status": {"conditions": [{**since, "message": "0/1: Insufficient nvidia.com/gpu."}]},
        }
    )
    snapshot = replace(world.observe(), pods=(serving, pod))
    assert status.pods_trouble(snapshot, world.spec) is None
    later = replace(snapshot, now=snapshot.now + 11)
    assert status.pods_trouble(later, world.spec) == (
        "InsufficientGPU: 0/1: Insufficient nvidia.com/gpu; set rollout.strategy: DrainFirst or add a node"
    )
    alone = replace(later, pods=(pod,))
    assert str(status.pods_trouble(alone, world.spec)).endswith("nvidia.com/gpu; add a node"), "there is no pod to drain"
