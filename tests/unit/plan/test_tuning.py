"""What the tuner is given, what is made of its answer, and what is refused."""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import replace
from typing import Any

import kubernetes_validate
import pytest

from sere_ext.contract.config_maps import encoded, places
from sere_ext.contract.errors import SimilarityError, SpecError
from sere_ext.contract.policy import Policy
from sere_ext.contract.shards import join
from sere_ext.contract.similarity import SimilarityMeta, similarity_digest, verified_digest
from sere_ext.contract.volume import POLICY_SHARDS
from sere_operator.api.common import parse_spec
from sere_operator.api.tuning import SereTuningJobSpec
from sere_operator.plan.objects import pods
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.patch import merged
from sere_operator.plan.reads import Child, Events, Listed, Read
from sere_operator.plan.snapshot import Similarity, TuningSnapshot
from sere_operator.plan.tuning.decide import COLLECTED_POLL_S, POD_POLL_S, decide_tuning
from sere_operator.plan.tuning.needs import needs_tuning, taken_tuning
from sere_operator.plan.tuning.objects import RETRIES, RUN_DIR, build, run_name, tuning_file
from tests.kit.plan_world import POLICY, profile_body

OWNER = {"apiVersion": "serving.sere.dev/v1alpha1", "kind": "SereDeployment", "name": "m", "uid": "u", "controller": True}
OURS = {
    "name": "m-tune-1-tuner",
    "ownerReferences": [{"kind": "SereTuningJob", "name": "m-tune-1", "uid": "t", "controller": True}],
}
SPEC = {
    "deployment": "m",
    "model": {"uri": "pvc://models/qwen3"},
    "slo": {"tpotMs": {"p95": 20}},
    "accuracy": {"maxDropPoints": 1, "tasks": [{"configMap": {"name": "items", "key": "a.jsonl"}}]},
    "tuning": {
        "trials": 8,
        "rungs": 1,
        "policies": ["sere"],
        "similarity": {"calibrate": {"uri": "pvc://data/calib.jsonl"}},
        "workload": {"load": {"concurrency": [16]}},
    },
}


def snapshot(data: dict[str, Any] | None = None, status: dict[str, Any] | None = None, **changes: Any) -> TuningSnapshot:
    body = {
        "apiVersion": "serving.sere.dev/v1alpha1",
        "kind": "SereTuningJob",
        "spec": {**SPEC, **changes.pop("spec", {})},
        "metadata": {"name": "m-tune-1", "namespace": "ns", "uid": "t", "generation": 1, "ownerReferences": [OWNER]},
        "status": status or {},
    }
    texts = {key: json.dumps(value) for key, value in (data or {}).items()}
    result = {"data": texts} if data is not None else None
    return TuningSnapshot(now=1_800_000_000.0, object=body, result=result, **changes)


def artefact() -> tuple[bytes, str]:
    """(content, digest) of a small similarity file, written here byte by byte."""
    matrix = struct.pack("<4f", 1.0, 0.5, 0.5, 1.0)
    meta = SimilarityMeta(
        model_type="qwen3_moe",
        model_name="m",
        config_digest="sha256:0",
        data_digest="sha256:1",
        tokens=10,
        layers=(0,),
        num_experts=2,
    )
    digest = similarity_digest(meta, {0: matrix})
    text = meta.model_copy(update={"digest": digest}).model_dump_json(by_alias=True)
    header = {"__metadata__": {"sere": text}, "layer.0": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, len(matrix)]}}
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + matrix, digest


def test_children_are_valid_and_the_rights_end_at_the_result() -> None:
    bodies = build(snapshot(), parse_spec(SereTuningJobSpec, SPEC), Defaults())
    for body in bodies:
        kubernetes_validate.validate(body, "1.34", strict=True)
        assert body["metadata"]["ownerReferences"][0]["uid"] == "t"
    by_kind = {body["kind"]: body for body in bodies if body["kind"] != "ConfigMap"}
    (rule,) = by_kind["Role"]["rules"]
    assert (rule["apiGroups"], rule["resources"], rule["verbs"]) == ([""], ["configmaps"], ["create", "patch"])
    shards = [f"m-tune-1-result-{i}" for i in range(1, POLICY_SHARDS + 1)]
    assert rule["resourceNames"] == ["m-tune-1-result", *shards, "sere-openings"]
    environment = {
        entry["name"]: entry.get("value") for entry in by_kind["Job"]["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert environment["XDG_STATE_HOME"].startswith(f"{RUN_DIR}/"), "with storage, the ledger of opened items outlives the pod"
    job = by_kind["Job"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2, 3, 4, 5]
    names = [body["metadata"]["name"] for body in bodies if body["kind"] == "ConfigMap"]
    assert names == ["m-tune-1-input", "m-tune-1-result"]


def test_a_lost_pod_is_replaced_only_where_the_study_outlives_it() -> None:
    """Else another pod would spend the whole budget once more."""

    def job_of(**tuning: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        spec = parse_spec(SereTuningJobSpec, {**SPEC, "tuning": {**SPEC["tuning"], **tuning}})  # type: ignore[dict-item]
        bodies = build(snapshot(), spec, Defaults())
        for body in bodies:
            kubernetes_validate.validate(body, "1.34", strict=True)
        given = next(body for body in bodies if body["metadata"]["name"] == "m-tune-1-input")
        return bodies[-1]["spec"], json.loads(given["data"]["tuning.yaml"])

    job, given = job_of()
    assert {"name": "run", "emptyDir": {}} in job["template"]["spec"]["volumes"]
    assert (job["backoffLimit"], len(job["podFailurePolicy"]["rules"])) == (0, 1)
    job, given = job_of(storage={"claimName": "studies"})
    assert {"name": "run", "persistentVolumeClaim": {"claimName": "studies"}} in job["template"]["spec"]["volumes"]
    mounts = job["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {"name": "run", "mountPath": RUN_DIR} in mounts
    assert given["out"] == f"{RUN_DIR}/m-tune-1-t", "runs share the claim, each its own folder, even those of one name"
    assert job["backoffLimit"] == RETRIES
    assert job["podFailurePolicy"]["rules"][1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_uris_become_paths_that_are_mounted() -> None:
    storage = pods.Storage()
    given = tuning_file(parse_spec(SereTuningJobSpec, SPEC), storage)
    assert given["model"] == "/mnt/pvc/models/qwen3"
    assert given["calibrate"] == {"data": "/mnt/pvc/data/calib.jsonl"}
    assert given["accuracy"]["tasks"][0]["file"] == "/etc/sere-data/items/a.jsonl"
    assert given["search"] == {"trials": 8, "deviceHours": 4.0, "rungs": 1, "policies": ["sere"]}
    assert {mount["mountPath"] for mount in storage.mounts} == {"/mnt/pvc/models", "/mnt/pvc/data", "/etc/sere-data/items"}
    assert all(mount["readOnly"] for mount in storage.mounts)


def chosen(**changes: Any) -> dict[str, Any]:
    content, digest = artefact()
    policy = {"buckets": [{"minTokens": 8, "kind": "sere", "S": 2, "rho": 0.3}], "similarityDigest": digest}
    profile = profile_body(policy)
    profile["spec"]["similarity"] = {"uri": "configmap://m-tune-1-result-1/shard-001-of-003", "digest": digest}
    profile["metadata"] = {}
    profile["spec"].update(changes)
    return {
        "data": {"outcome.json": {"outcome": "Chosen"}, "profile.json": profile},
        "similarity": Similarity(encoded(content, 800), digest),
    }


def test_a_chosen_result_becomes_a_profile_that_outlives_the_run() -> None:
    plan = decide_tuning(snapshot(**chosen()), Defaults())
    *config_maps, profile = [body for body in plan.apply if body.get("immutable") or body["kind"] == "SereProfile"]
    assert profile["kind"] == "SereProfile", "after what it refers to"
    for body in (profile, *config_maps):
        (reference,) = body["metadata"]["ownerReferences"]
        assert reference["uid"] == "u", "owned by the SereDeployment, not by the run"
        assert body["metadata"]["labels"]["serving.sere.dev/deployment"] == "m"
    for body in config_maps:
        kubernetes_validate.validate(body, "1.34", strict=True)
    _, _, name, key = profile["spec"]["similarity"]["uri"].split("/")
    held = {(body["metadata"]["name"], key): text for body in config_maps for key, text in body["binaryData"].items()}
    where = places(name, key)
    assert where is not None and len(where) == 2
    assert join([base64.b64decode(held[place]) for place in where]) == artefact()[0]
    assert plan.status is not None
    assert (plan.status["outcome"], plan.status["profile"]) == ("Chosen", profile["metadata"]["name"])
    conditions = {c["type"]: c["status"] for c in plan.status["conditions"]}
    assert conditions == {"Complete": "True", "Feasible": "True"}


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"data": {"outcome.json": {"outcome": "Chosen"}}}, "profile:"),
        ({**chosen(), "similarity": None}, "refers to no artefact"),
        ({**chosen(), "similarity": Similarity(problem="shard 2 of 3 is missing")}, "shard 2 of 3 is missing"),
        (chosen(similarity={"uri": "file:///x", "digest": "sha256:" + "0" * 64}), "the profile was made with sha256:000"),
    ],
)
def test_a_result_that_does_not_check_out_is_never_used(result: dict[str, Any], words: str) -> None:
    plan = decide_tuning(snapshot(**result), Defaults())
    assert not [body for body in plan.apply if body["kind"] == "SereProfile"]
    assert plan.status is not None
    assert plan.status["outcome"] == "Failed"
    assert words in plan.status["conditions"][0]["message"]


@pytest.mark.parametrize("outcome", ["Infeasible", "BudgetExhausted", "CannotCertify", "Failed"])
def test_the_tuners_own_message_is_what_people_read(outcome: str) -> None:
    plan = decide_tuning(snapshot({"outcome.json": {"outcome": outcome, "message": "nearest miss: x"}}), Defaults())
    assert plan.status is not None
    complete = plan.status["conditions"][0]
    assert (complete["status"], complete["reason"], complete["message"]) == ("True", outcome, "nearest miss: x")
    assert "profile" not in plan.status


def test_a_run_made_again_waits_until_the_old_ones_objects_are_collected() -> None:
    """Else it would adopt the old result and end at once as the deleted run did."""
    owner = {"kind": "SereTuningJob", "name": "m-tune-1", "uid": "old", "controller": True}
    old = {"kind": "ConfigMap", "metadata": {"name": "m-tune-1-result", "ownerReferences": [owner]}}
    given = snapshot({"outcome.json": {"outcome": "Failed"}}, children={("ConfigMap", "m-tune-1-result"): old})
    plan = decide_tuning(given, Defaults())
    assert not plan.apply and plan.requeue_after == COLLECTED_POLL_S
    assert plan.status is not None and "outcome" not in plan.status
    assert "collected" in plan.status["conditions"][0]["message"]


def test_what_was_spent_and_tried_stands_in_the_status() -> None:
    told = {"deviceHours": "0.12", "candidates": [{"policy": f"topk {n}", "verdict": "failed"} for n in range(7)]}
    plan = decide_tuning(snapshot({"outcome.json": {"outcome": "Infeasible", **told}}), Defaults())
    assert plan.status is not None
    assert plan.status["deviceHours"] == "0.12"
    assert plan.status["candidates"] == told["candidates"][:5]
    odd = {"deviceHours": 3, "candidates": "topk"}
    plan = decide_tuning(snapshot({"outcome.json": {"outcome": "Infeasible", **odd}}), Defaults())
    assert plan.status is not None and not {"deviceHours", "candidates"} & set(plan.status)


def test_a_job_that_died_without_a_word_is_failed_with_its_last_lines() -> None:
    job = {"kind": "Job", "metadata": OURS, "spec": {}, "status": {"conditions": [{"type": "Failed", "status": "True"}]}}
    ended = {"state": {"terminated": {"exitCode": 137, "message": "boom"}}}
    pod = {"metadata": {"name": "p"}, "status": {"containerStatuses": [ended]}}
    plan = decide_tuning(snapshot({}, children={("Job", "m-tune-1-tuner"): job}, pods=(pod,)), Defaults())
    assert plan.status is not None
    assert (
        plan.status["conditions"][0]["message"]
        == "the tuner ended with exit code 137: boom; with tuning.storage a run outlives its pod"
    )


def pending(state: dict[str, Any], where: str = "containerStatuses") -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "status": {"phase": "Pending", where: [{"image": "e:9", "state": state}]}}


NO_NODE = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes: Insufficient nvidia.com/gpu"}
NO_IMAGE = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "e:9"'}}


@pytest.mark.parametrize(
    ("pod", "stage", "words"),
    [
        ({"metadata": {}, "status": {"conditions": [NO_NODE]}}, "waiting for a node", "InsufficientGPU: the tuning pod cannot"),
        (pending(NO_IMAGE), "waiting: ImagePullBackOff", 'pod cannot start: Back-off pulling image "e:9"; serving goes on'),
        (
            pending({"waiting": {"reason": "ErrImagePull"}}),
            "waiting: ErrImagePull",
            "ErrImagePull: the tuning pod cannot start: e:9",
        ),
        (pending(NO_IMAGE, "initContainerStatuses"), "waiting: ImagePullBackOff", "Back-off"),
    ],
)
def test_a_pod_that_cannot_begin_is_said_with_the_reason_and_warned_of_once(pod: dict[str, Any], stage: str, words: str) -> None:
    given = snapshot({}, pods=(pod,))
    plan = decide_tuning(given, Defaults())
    assert plan.status is not None
    complete = plan.status["conditions"][0]
    assert (complete["status"], complete["reason"], plan.status["stage"]) == ("False", "TuningBlocked", stage)
    assert words in complete["message"]
    (event,) = plan.events
    assert (event.type, event.reason, event.message) == ("Warning", "TuningBlocked", complete["message"])
    assert decide_tuning(snapshot({}, pods=(pod,), status=plan.status), Defaults()).events == []


@pytest.mark.parametrize(
    "pod",
    [
        pending({"waiting": {"reason": "ContainerCreating"}}),
        {"metadata": {"name": "gone", "deletionTimestamp": "now"}, "status": pending(NO_IMAGE)["status"]},
        {"metadata": {"name": "failed"}, "status": {**pending(NO_IMAGE)["status"], "phase": "Failed"}},
    ],
    ids=["on its way", "being deleted", "ended"],
)
def test_nothing_is_wrong_with_a_pod_on_its_way_or_one_that_was_replaced(pod: dict[str, Any]) -> None:
    plan = decide_tuning(snapshot({}, pods=(pod,)), Defaults())
    assert plan.status is not None
    assert (plan.status["conditions"][0]["reason"], plan.events) == ("Pending", [])


def event(reason: str, at: int, message: str) -> dict[str, Any]:
    return {"reason": reason, "message": message, "lastTimestamp": f"2026-01-01T00:00:{at:02d}Z"}


QUOTA = "is forbidden: exceeded quota: small, requested: pods=1, used: pods=1, limited: pods=1"


def without_pods(*events: dict[str, Any], pods: tuple[dict[str, Any], ...] = ()) -> TuningSnapshot:
    job = {"metadata": {**OURS, "uid": "j"}, "spec": {"suspend": False}}
    return snapshot(children={("Job", "m-tune-1-tuner"): job}, events=events, pods=pods)


def test_a_pod_that_is_never_created_is_said_in_the_api_servers_words_and_warned_of_once() -> None:
    refused = [event("FailedCreate", at, f'Error creating: pods "m-tune-1-tuner-x{at}" {QUOTA}') for at in (1, 2)]
    plan = decide_tuning(without_pods(*refused), Defaults())
    assert plan.status is not None and plan.requeue_after == POD_POLL_S
    words = f'the tuning pod cannot be created: pods "m-tune-1-tuner" {QUOTA}; serving goes on'
    assert plan.status["conditions"][0]["reason"] == "TuningBlocked"
    assert plan.status["conditions"][0]["message"] == words, "and the same words at each of the Job's tries"
    assert [(e.type, e.reason) for e in plan.events] == [("Warning", "TuningBlocked")]
    again = decide_tuning(
        replace(without_pods(*refused), object={**without_pods().object, "status": merged({}, plan.status)}), Defaults()
    )
    assert not again.events


@pytest.mark.parametrize(
    "world",
    [
        without_pods(),
        without_pods(event("FailedCreate", 1, QUOTA), event("SuccessfulCreate", 2, "Created pod")),
        without_pods(event("FailedCreate", 1, QUOTA), pods=({"metadata": {}, "status": {"phase": "Pending"}},)),
    ],
    ids=["no event yet", "created since", "a pod is there"],
)
def test_a_pod_on_its_way_is_not_blocked(world: TuningSnapshot) -> None:
    plan = decide_tuning(world, Defaults())
    assert plan.status is not None and plan.status["conditions"][0]["reason"] == "Pending"


def test_events_are_read_of_a_job_that_waits_for_its_pod_and_of_no_other() -> None:
    def reads(world: TuningSnapshot) -> set[Read]:
        asked: set[Read] = set()
        while missing := needs_tuning(replace(world, read=frozenset(asked)), Defaults()):
            asked |= set(missing)
        return asked

    assert Events("Job", "m-tune-1-tuner", "j") in reads(without_pods())
    running: dict[str, Any] = {"metadata": {}, "status": {"phase": "Running"}}
    for world in (without_pods(pods=(running,)), snapshot()):
        assert not [read for read in reads(world) if isinstance(read, Events)]


def test_progress_is_shown_and_an_ended_run_is_left_alone() -> None:
    plan = decide_tuning(snapshot({"progress.json": {"stage": "search", "now": "trial 3", "trials": 3}}), Defaults())
    assert plan.status is not None
    assert (plan.status["progress"], plan.status["stage"]) == ("3/8", "search")
    assert decide_tuning(snapshot(status={"outcome": "Infeasible"}), Defaults()).writes == 0


RUNNING = ({"metadata": {"name": "p"}, "status": {"phase": "Running"}},)


def stage_of(world: TuningSnapshot) -> tuple[str, str, dict[str, int]]:
    plan = decide_tuning(world, Defaults())
    assert plan.status is not None
    seen = {**world.status, **plan.status}
    return seen["progress"], seen["stage"], seen.get("trials", {})


def test_the_stage_is_true_from_the_first_look_to_the_last_and_counters_never_go_back() -> None:
    assert stage_of(snapshot({})) == ("0/8", "waiting for its pod", {})
    assert stage_of(snapshot({}, pods=RUNNING)) == ("0/8", "starting", {})
    certify = {"progress.json": {"stage": "certify rung 1", "now": "block 3", "trials": 8}}
    assert stage_of(snapshot(certify, pods=RUNNING)) == ("8/8", "certify rung 1", {"completed": 8})
    known = {"progress": "8/8", "stage": "certify rung 1", "trials": {"completed": 8}}
    assert stage_of(snapshot(**chosen(), status=known)) == ("8/8", "ended", {"completed": 8})
    died = {"outcome.json": {"outcome": "Failed", "message": "boom", "trials": {}}}
    assert stage_of(snapshot(died, status=known)) == ("8/8", "ended", {"completed": 8})
    assert stage_of(snapshot(certify, status=known, spec={"suspend": True}))[:2] == ("8/8", "suspended")


def test_suspend_reaches_a_running_job_without_touching_its_template() -> None:
    job = {"kind": "Job", "metadata": OURS, "spec": {"suspend": False, "template": {"x": 1}}, "status": {}}
    plan = decide_tuning(snapshot({}, children={("Job", "m-tune-1-tuner"): job}, spec={"suspend": True}), Defaults())
    (body,) = plan.replace
    assert body["spec"] == {"suspend": True, "template": {"x": 1}}
    assert "Job" not in [b["kind"] for b in plan.apply]


def test_the_artefacts_digest_is_recomputed() -> None:
    content, digest = artefact()
    assert verified_digest(content) == digest
    raw = bytearray(content)
    raw[-1] ^= 1
    with pytest.raises(SimilarityError, match="its content is sha256"):
        verified_digest(bytes(raw))
    with pytest.raises(SimilarityError, match="truncated"):
        verified_digest(bytes(raw[:-4]))
    with pytest.raises(SimilarityError, match="is no safetensors file"):
        verified_digest(b"!!!")


def test_a_policy_without_similarity_needs_no_artefact() -> None:
    profile = profile_body(POLICY)
    profile["metadata"] = {}
    plan = decide_tuning(snapshot({"outcome.json": {"outcome": "Chosen"}, "profile.json": profile}), Defaults())
    (made,) = [body for body in plan.apply if body["kind"] == "SereProfile"]
    assert Policy.parse(made["spec"]["policy"]).digest == Policy.parse(POLICY).digest


TENANT = [("ServiceAccount", "m-tune-1-tuner"), ("Role", "m-tune-1-tuner"), ("RoleBinding", "m-tune-1-tuner"), ("Job", "m-tune-1-tuner"),
          ("ConfigMap", "m-tune-1-input"), ("ConfigMap", "m-tune-1-result"), ("ConfigMap", "m-tune-1-result-16")]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), TENANT)
@pytest.mark.parametrize("owners", [[], [{"kind": "SereTuningJob", "name": "other", "uid": "u2", "controller": True}]])
def test_an_object_that_this_run_did_not_make_is_never_written_nor_may_its_tuner_write_it(
    kind: str, name: str, owners: list[dict[str, Any]]
) -> None:
    """Else who may create tuning jobs could run as any ServiceAccount of the namespace, and rewrite its Roles."""
    foreign = {"kind": kind, "metadata": {"name": name, "ownerReferences": owners}}
    plan = decide_tuning(snapshot({}, children={(kind, name): foreign}), Defaults())
    assert (plan.replace, plan.apply, plan.delete) == ([], [], [])
    assert plan.status is not None
    (complete, _) = plan.status["conditions"]
    assert (complete["status"], complete["reason"]) == ("False", "InvalidSpec")
    assert complete["message"] == f"{kind} {name} exists and is not ours; rename it or this job"
    (event,) = plan.events
    assert (event.type, event.message) == ("Warning", complete["message"])
    again = snapshot({}, children={(kind, name): foreign}, status=plan.status)
    assert decide_tuning(again, Defaults()).events == [], "said once"


@pytest.mark.parametrize("name", ["builder", "b" * 63, "b" * 240])
def test_no_child_has_the_name_that_the_jobs_author_chose(name: str) -> None:
    given = snapshot()
    given.object["metadata"]["name"] = name
    bodies = build(given, parse_spec(SereTuningJobSpec, SPEC), Defaults())
    for body in bodies:
        kubernetes_validate.validate(body, "1.34", strict=True)
        assert body["metadata"]["name"].startswith("b") and body["metadata"]["name"] != name
        assert len(body["metadata"]["name"]) <= 63, "a Job takes no longer name"
    job = bodies[-1]["spec"]["template"]["spec"]
    assert job["serviceAccountName"] == bodies[0]["metadata"]["name"] == run_name(name)


@pytest.mark.parametrize("name", ["PATH", "LD_PRELOAD", "PYTHONPATH", "SERE_POLICY_DIR"])
def test_variables_by_which_another_program_would_run_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match=f"spec.engine.env.*{name} is set by the operator or the image.*remove it here"):
        parse_spec(SereTuningJobSpec, {**SPEC, "engine": {"env": [{"name": name, "value": "x"}]}})


def test_before_the_tuner_may_write_them_it_is_read_what_stands_under_its_names() -> None:
    def rounds(*there: tuple[str, str]) -> list[tuple[Read, ...]]:
        given, found = snapshot(), []
        while missing := needs_tuning(given, Defaults()):
            found.append(missing)
            empty: dict[Read, Any] = {read: [] if isinstance(read, Listed) else None for read in missing}
            given = taken_tuning(given, empty | {Child(*key): {"metadata": OURS} for key in there if Child(*key) in missing})
        return found

    first, *_, last = rounds()
    assert first == (Child("ConfigMap", "m-tune-1-result"),)
    assert Child("ConfigMap", "m-tune-1-result-1") in last
    known = rounds(("Role", "m-tune-1-tuner"))[-1]
    assert Child("Job", "m-tune-1-tuner") in known and Child("ConfigMap", "m-tune-1-result-1") not in known


# ---- queues, and Jobs that were deleted --------------------------------------------------------------------------

JOB = ("Job", "m-tune-1-tuner")


def a_job(*, suspend: bool, by_us: bool = False, **status: Any) -> dict[str, Any]:
    annotations = {"serving.sere.dev/suspended": str(by_us).lower()}
    return {"kind": "Job", "metadata": {**OURS, "annotations": annotations}, "spec": {"suspend": suspend}, "status": status}


def test_a_job_that_a_queue_suspended_stays_so_and_that_is_said() -> None:
    given = snapshot({}, children={JOB: a_job(suspend=True)})
    plan = decide_tuning(given, Defaults())
    assert plan.replace == []
    assert plan.status is not None
    complete = plan.status["conditions"][0]
    assert (complete["reason"], plan.status["stage"]) == ("Suspended", "queued")
    assert "suspended by somebody else, such as a queue" in complete["message"]


def test_what_the_operator_suspended_it_resumes() -> None:
    suspended = snapshot({}, children={JOB: a_job(suspend=False)}, spec={"suspend": True})
    (body,) = decide_tuning(suspended, Defaults()).replace
    assert body["spec"]["suspend"] is True
    (body,) = decide_tuning(snapshot({}, children={JOB: body}), Defaults()).replace
    assert (body["spec"]["suspend"], body["metadata"]["annotations"]) == (False, {"serving.sere.dev/suspended": "false"})
    assert decide_tuning(snapshot({}, children={JOB: body}), Defaults()).replace == []


BEGAN = {"startTime": "2027-01-15T07:00:00Z", "trials": {"completed": 7}}  # an hour before `now`


def test_a_job_deleted_in_the_middle_spends_no_budget_anew_and_what_was_spent_is_said() -> None:
    plan = decide_tuning(snapshot({}, status=BEGAN, spec={"engine": {"tensorParallelSize": 2}}), Defaults())
    assert "Job" not in {body["kind"] for body in plan.apply}
    assert plan.status is not None
    assert (plan.status["outcome"], plan.status["deviceHours"]) == ("Failed", "2.00")
    assert "the tuning Job was deleted before it had ended" in plan.status["conditions"][0]["message"]


@pytest.mark.parametrize("kept", ["the study", "the answer"])
def test_a_deleted_job_whose_study_or_answer_is_there_loses_nothing(kept: str) -> None:
    if kept == "the answer":
        plan = decide_tuning(snapshot(**chosen(), status=BEGAN), Defaults())
        assert plan.status is not None and plan.status["outcome"] == "Chosen"
        return
    tuning = {**SPEC["tuning"], "storage": {"claimName": "studies"}}  # type: ignore[dict-item]
    plan = decide_tuning(snapshot({}, status=BEGAN, spec={"tuning": tuning}), Defaults())
    assert "Job" in {body["kind"] for body in plan.apply}, "another pod goes on with the study"


def test_a_job_that_has_not_begun_is_made_again() -> None:
    assert "Job" in {body["kind"] for body in decide_tuning(snapshot({}, status={"stage": "queued"}), Defaults()).apply}


def test_the_tuning_pod_has_what_the_user_gives_but_its_own_service_account() -> None:
    def spec_with(template: dict[str, Any]) -> SereTuningJobSpec:
        return parse_spec(SereTuningJobSpec, {**SPEC, "tuning": {**SPEC["tuning"], "podTemplate": template}})  # type: ignore[dict-item]

    given = {"metadata": {"labels": {"team": "a"}}, "spec": {"imagePullSecrets": [{"name": "registry"}]}}
    job = build(snapshot(), spec_with(given), Defaults())[-1]
    kubernetes_validate.validate(job, "1.34", strict=True)
    template = job["spec"]["template"]
    assert template["metadata"]["labels"]["team"] == "a"
    assert template["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert template["spec"]["serviceAccountName"] == "m-tune-1-tuner"
    with pytest.raises(SpecError, match="the tuning pod has its own"):
        spec_with({"spec": {"serviceAccountName": "deployer"}})
