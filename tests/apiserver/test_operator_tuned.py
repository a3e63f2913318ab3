"""Mode Tuned and the canary's judgement, on a real API server: the operator's own process, faked pods and tuner."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sere_autotune.outcome import Ending, Outcome
from sere_autotune.result.publish import Access, Publisher, Target
from sere_autotune.result.results import Finished
from sere_ext.contract.policy import Policy
from sere_ext.contract.similarity import SimilarityMeta
from sere_ext.similarity.file import write_similarity
from tests.kit.fake_node import KEY, Behaviour
from tests.kit.matrices import symmetric
from tests.kit.operator_process import World, eventually, manifest

from .test_operator import node, world

__all__ = ["node", "world"]  # fixtures

POLICY = {"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 2}]}
TUNED: dict[str, Any] = {
    "slo": {"tpotMs": {"p95": 20}},
    "accuracy": {"maxDropPoints": 1, "tasks": [{"uri": "pvc://data/items.jsonl"}]},
    "routing": {"mode": "Tuned"},
    "tuning": {
        "trials": 8,
        "similarity": {"calibrate": {"uri": "pvc://data/calib.jsonl"}},
        "workload": {"load": {"concurrency": [16]}},
    },
    "rollout": {"canary": {"minRequests": 200, "deadline": "60s"}},
}


def profile(certified: bool = True, key: dict[str, Any] | None = None, **prompt: Any) -> dict[str, Any]:
    """What `sere tune` writes as profile.json."""
    return {
        "apiVersion": "serving.sere.dev/v1alpha1",
        "kind": "SereProfile",
        "metadata": {},
        "spec": {
            "policy": POLICY,
            "key": key or KEY,
            "evidence": {
                "certified": certified,
                "tpotMs": {"exact": 24.1, "chosen": 17.9, "limit": 20},
                "speedup": {"value": 1.35, "low": 1.28, "high": 1.42, "pairs": 12, "condition": "equal concurrency 16"},
                "speedVerdict": "faster",
                "accuracy": {
                    "exact": 0.784, "chosen": 0.782, "items": 6450, "maxDropPoints": 1.0, "confidence": 0.95,
                    "dropPoints": 0.2, "discordantShare": 0.01, "noiseFloor": 0.005,
                },
            },
            "goldenPrompts": [{"prompt": f"say {i}", "answer": f"SAY {i}", "maxTokens": 8, **prompt} for i in range(16)],
        },
    }  # fmt: skip


def running(world: World) -> list[str]:
    """Names of the SereTuningJobs whose Job is there."""
    return [job["metadata"]["ownerReferences"][0]["name"] for job in world.items("Job")]


def tuning_job(world: World) -> str:
    return str(eventually(lambda: running(world), 30, "the tuning Job")[0])


def publish(world: World, job: str, outcome: str, message: str = "", **data: Any) -> None:
    """As the tuner's own server-side apply."""
    body = {"outcome": outcome, "message": message, "exitCode": 0, "trials": {"completed": 8, "feasible": 3}}
    data["outcome.json"] = body
    world.api("ConfigMap").server_side_apply(
        body={
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{job}-result"},
            "data": {key: json.dumps(value) for key, value in data.items()},
        },
        namespace=world.namespace, field_manager="sere-tuner", force_conflicts=True,
    )  # fmt: skip


def publish_by_similarity(world: World, job: str, path: Path) -> None:
    """A policy and an artefact of 2.6 MB, by the tuner's own publisher with the rights that its pod has."""
    randomness, experts = np.random.default_rng(0), 256
    matrices = {layer: symmetric(randomness.random((experts, experts))) for layer in range(10)}
    meta = SimilarityMeta(
        model_type="m", model_name="fake", config_digest=KEY["configDigest"], data_digest="sha256:1", tokens=7, layers=(),
        num_experts=experts,
    )  # fmt: skip
    digest = write_similarity(path, meta, matrices).digest
    made = profile()
    bucket = {"minTokens": 8, "maxTokens": 64, "kind": "sere", "S": 2, "rho": 0.3}
    made["spec"]["policy"] = {"buckets": [bucket], "similarityDigest": digest}
    made["spec"]["similarity"] = {"uri": path.as_uri(), "digest": digest}
    done = subprocess.run(
        ["kubectl", "-n", world.namespace, "create", "token", f"{job}-tuner"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    reached = world.client.client.configuration
    access = Access(reached.host, done.stdout.strip, reached.ssl_ca_cert)
    publisher = Publisher(Target(world.namespace, f"{job}-result"), access)
    publisher.progress({"stage": "report", "trials": 8})
    publisher.finish(Finished(Outcome(Ending.CHOSEN, "sere 2", {"completed": 8, "feasible": 3}), {}, made, path))


def policy_digest(world: World) -> str:
    return str(world.get("SereDeployment", "m")["status"]["policy"]["wanted"])


def test_tuned_end_to_end(world: World, tmp_path: Path) -> None:
    world.apply(manifest(replicas=2, **TUNED))
    world.ready()  # before any tuning result
    job = tuning_job(world)
    spec = world.get("Job", f"{job}-tuner")["spec"]["template"]["spec"]
    container = spec["containers"][0]
    assert container["command"] + container["args"][:1] == ["sere", "tune"]
    assert container["args"][-1] == f"configmap/{world.namespace}/{job}-result"
    given = json.loads(world.get("ConfigMap", f"{job}-input")["data"]["tuning.yaml"])
    assert given["accuracy"]["tasks"] == [{"file": "/mnt/pvc/data/items.jsonl", "metric": "exact", "maxTokens": 64, "stop": []}]
    assert given["calibrate"] == {"data": "/mnt/pvc/data/calib.jsonl"}
    assert given["search"]["trials"] == 8
    (rule,) = world.get("Role", f"{job}-tuner")["rules"]
    assert (rule["resourceNames"][0], rule["verbs"]) == (f"{job}-result", ["create", "patch"])
    # There is no claim `data` here, and the scheduler may have said so already.
    assert world.condition("Tuned")["reason"] in ("Tuning", "TuningBlocked")

    world.node.behaviours.clear()
    world.node.default = Behaviour(tpot_ms=15)
    pods = {pod.uid for pod in world.pods()}
    template = world.get("Deployment", "m")["metadata"]["generation"]
    artefact = tmp_path / "similarity.safetensors"
    publish_by_similarity(world, job, artefact)
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "Applied", 60, "promoted")
    world.ready()
    digest = policy_digest(world)
    assert world.digests() == [digest, digest]
    assert {pod.uid for pod in world.pods()} == pods
    assert world.get("Deployment", "m")["metadata"]["generation"] == template
    assert {pod.similarity for pod in world.pods()} == {artefact.read_bytes()}, "joined from the volume"
    held = [f"m-policy-shard-{i}" for i in range(3)]
    names = {body["metadata"]["name"] for body in world.items("ConfigMap")}
    assert {name for name in names if "policy-shard" in name} == set(held)
    published = {name for name in names if name.startswith(f"{job}-result-")}
    assert len(published) == 3
    status = world.get("SereDeployment", "m")["status"]
    assert (status["tpotP95"], status["speedup"], status["accuracy"]) == ("17.9ms", "1.35x", "-0.2")
    assert world.condition("Tuned")["reason"] == "Certified"
    assert world.condition("Ready")["message"] == "serving the certified policy"
    answered = [pod.tokens for pod in world.pods()]
    assert min(answered) >= 16, f"golden prompts ran on both sides: {answered}"

    # Deleting the run never touches what serves.
    made = status["policy"]["profile"]
    world.delete("SereTuningJob", job)
    # The garbage collector looks for kinds it does not know yet every 30 s, and these CRDs may be younger than that.
    eventually(lambda: not world.items("Job"), 120, "the Job went with its run")
    eventually(lambda: not published & {body["metadata"]["name"] for body in world.items("ConfigMap")}, 120, "and its result")
    assert set(held) < {body["metadata"]["name"] for body in world.items("ConfigMap")}
    assert world.get("SereProfile", made)["spec"]["policy"]["buckets"][0]["S"] == 2
    assert world.digests() == [digest, digest]


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (Behaviour(right=False), "golden prompts"),
        (Behaviour(tpot_ms=40), "above the limit of 20 ms"),
    ],
    ids=["worse answers", "slower"],
)
def test_a_harmful_canary_goes_back_and_is_remembered(world: World, behaviour: Behaviour, words: str) -> None:
    world.apply(manifest(replicas=2, **TUNED))
    world.ready()
    job = tuning_job(world)
    world.node.default, world.node.behaviours["exact"] = behaviour, Behaviour(tpot_ms=15)
    publish(world, job, "Chosen", **{"profile.json": profile()})
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "Rejected", 60, "rejected")
    eventually(lambda: world.digests() == ["exact", "exact"], 20)
    condition = world.condition("PolicyApplied")
    assert words in condition["message"]
    assert "will not be tried again" in condition["message"]
    (rejection,) = world.get("SereDeployment", "m")["status"]["rejected"]
    assert rejection["digest"] == policy_digest(world)
    switched = [pod for pod in world.pods() if pod.switches]
    assert len(switched) == 1, "only the canary ever ran it"
    world.ready()


def test_answers_are_judged_by_the_tunings_metric(world: World) -> None:
    """By `contains` a policy is promoted, and by `regex` the next one, which harms answers, is rejected."""
    world.node.default = Behaviour(tpot_ms=15, words=" It is {}, I think.")
    kept = {"slo": TUNED["slo"], "rollout": TUNED["rollout"]}
    world.apply(manifest(replicas=2, **kept))
    world.ready()
    world.apply(named("good", profile(metric="contains")))
    world.apply(manifest(replicas=2, routing={"mode": "Profile", "profileRef": {"name": "good"}}, **kept))
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "Applied" and "exact" not in world.digests(), 60, "promoted")
    good = policy_digest(world)

    worse = profile(metric="regex", pattern="is ([^,]*),")
    worse["spec"]["policy"] = {"buckets": [{"minTokens": 8, "kind": "topk", "S": 1}]}
    world.node.behaviours[Policy.parse(worse["spec"]["policy"]).digest] = Behaviour(right=False)
    world.apply(named("worse", worse))
    world.apply(manifest(replicas=2, routing={"mode": "Profile", "profileRef": {"name": "worse"}}, **kept))
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "Rejected", 60, "rejected")
    assert "golden prompts" in world.condition("PolicyApplied")["message"]
    eventually(lambda: world.digests() == [good, good], 20)


def named(name: str, body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "metadata": {"name": name}}


def test_a_quiet_night_is_inconclusive_and_bans_nothing(world: World) -> None:
    world.node.traffic = 0
    quick = {**TUNED, "rollout": {"canary": {"minRequests": 200, "deadline": "5s"}}}
    world.apply(manifest(replicas=2, **quick))
    world.ready()
    publish(world, tuning_job(world), "Chosen", **{"profile.json": profile()})
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "Inconclusive", 60)
    eventually(lambda: world.digests() == ["exact", "exact"], 20)
    status = world.get("SereDeployment", "m")["status"]
    assert "rejected" not in status
    assert status["rollout"]["nextAttemptAt"]
    world.ready()


def test_a_new_model_is_tuned_before_the_pods_of_the_old_one_go(world: World) -> None:
    world.apply(manifest(replicas=2, **TUNED))
    world.ready()
    first = tuning_job(world)
    publish(world, first, "Chosen", **{"profile.json": profile()})
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "Applied", 60, "promoted")
    pods, before = {pod.uid for pod in world.pods()}, world.get("Deployment", "m")["spec"]
    digests = world.digests()

    newer = {"model": {"name": "fake/model", "revision": "v2"}, **TUNED}
    world.apply(manifest(replicas=2, **newer))
    eventually(lambda: world.condition("Ready")["reason"] == "TuningFirst", 20)
    second = eventually(lambda: next(name for name in running(world) if name != first), 30)
    given = json.loads(world.get("ConfigMap", f"{second}-input")["data"]["tuning.yaml"])
    assert given["revision"] == "v2"
    world.operator.kill()  # what holds the pods is in the cluster, not in a process
    world.operator.start()
    world.apply(manifest(replicas=3, **newer))
    eventually(lambda: len(world.pods()) == 3 and all(pod.ready for pod in world.pods()), 60, "scaled while held")
    assert pods < {pod.uid for pod in world.pods()}
    assert {pod.key["modelRevision"] for pod in world.pods()} == {""}
    eventually(lambda: world.digests() == [*digests, digests[0]])
    assert world.get("Deployment", "m")["spec"] == {**before, "replicas": 3}
    assert len(world.items("ReplicaSet")) == 1
    world.patch("Deployment", "m", {"spec": {"template": {"spec": {"terminationGracePeriodSeconds": 5}}}})
    eventually(lambda: world.get("Deployment", "m")["spec"] == {**before, "replicas": 3}, 20, "a foreign edit is put back")

    publish(world, second, "Chosen", **{"profile.json": profile(key={**KEY, "modelRevision": "v2"})})
    fewest = 3

    def replaced() -> bool:
        nonlocal fewest
        fewest = min(fewest, sum(pod.ready for pod in world.pods()))
        return {pod.key["modelRevision"] for pod in world.pods()} == {"v2"}

    eventually(replaced, 60, "pods of the new model")
    assert fewest == 3
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "Applied" and "exact" not in world.digests(), 60, "promoted")
    world.ready()
    assert world.get("SereTuningJob", second)["status"]["stage"] == "ended"

    world.apply(manifest(replicas=3, engine={"image": "engine:2"}, **newer))
    third = eventually(lambda: next(name for name in running(world) if name not in (first, second)), 30)
    publish(world, third, "Infeasible", "nearest miss: topk 4")
    eventually(lambda: world.condition("Ready")["reason"] == "ProfileRequired", 20)
    assert "nearest miss: topk 4" in world.condition("Ready")["message"]

    def image() -> str:
        return str(world.get("Deployment", "m")["spec"]["template"]["spec"]["containers"][0]["image"])

    assert image() == "engine:1"
    waived = {**newer, "rollout": {**TUNED["rollout"], "requireProfile": False}}
    world.apply(manifest(replicas=3, engine={"image": "engine:2"}, **waived))
    eventually(lambda: image() == "engine:2", 20)


def test_one_pod_alone_is_both_sides(world: World) -> None:
    world.apply(manifest(**TUNED))
    world.ready()
    publish(world, tuning_job(world), "Chosen", **{"profile.json": profile()})
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "Applied", 90, "promoted")
    (pod,) = world.pods()
    digest = policy_digest(world)
    assert pod.switches[:2] == [digest, "exact"], "the two take turns"
    assert pod.switches[-1] == digest
    assert pod.tokens >= 32, "golden prompts under both"


def test_outcomes_without_a_policy_keep_exact_and_say_why(world: World) -> None:
    kept = {**TUNED, "tuning": {**TUNED["tuning"], "storage": {"claimName": "studies"}}}
    world.apply(manifest(**kept))
    world.ready()
    job = tuning_job(world)
    pod = world.get("Job", f"{job}-tuner")["spec"]["template"]["spec"]
    assert next(v for v in pod["volumes"] if v["name"] == "run")["persistentVolumeClaim"] == {"claimName": "studies"}
    (mount,) = (m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "run")
    given = json.loads(world.get("ConfigMap", f"{job}-input")["data"]["tuning.yaml"])
    uid = world.get("SereTuningJob", job)["metadata"]["uid"]
    assert (given["out"], mount.get("readOnly")) == (f"{mount['mountPath']}/{job}-{uid[:8]}", None), "a folder of this run alone"
    publish(world, job, "Infeasible", "nearest miss: topk 4 has TPOT p95 20.8 ms, 4 % over the limit of 20 ms")
    eventually(lambda: world.condition("Tuned")["reason"] == "Infeasible")
    assert "nearest miss" in world.condition("Tuned")["message"]
    assert world.digests() == ["exact"]
    run = world.get("SereTuningJob", job)["status"]
    assert run["outcome"] == "Infeasible"
    assert {c["type"]: c["status"] for c in run["conditions"]} == {"Complete": "True", "Feasible": "False"}
    world.ready()


def test_a_profile_of_another_engine_is_stale_and_advisory_ones_wait(world: World) -> None:
    world.apply(manifest(**TUNED))
    world.ready()
    publish(world, tuning_job(world), "Chosen", **{"profile.json": profile(key={**KEY, "engineVersion": "0.31.0"})})
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "PolicyStale")
    assert "engine 0.31.0, this pod runs 0.32.0" in world.condition("PolicyApplied")["message"]
    assert world.digests() == ["exact"]

    world.apply({**manifest("n", **TUNED)})
    world.ready("n")
    job = eventually(lambda: next(name for name in running(world) if name.startswith("n-")), 30)
    publish(world, job, "Chosen", **{"profile.json": profile(certified=False)})
    eventually(lambda: world.condition("PolicyApplied", "n")["reason"] == "AwaitingApproval", 60)
    assert world.get("SereDeployment", "n")["status"]["policy"]["stable"] == "exact"
    digest = world.get("SereDeployment", "n")["status"]["policy"]["wanted"]
    world.patch("SereDeployment", "n", {"metadata": {"annotations": {"serving.sere.dev/approved": digest}}})
    eventually(lambda: world.condition("PolicyApplied", "n")["reason"] == "Applied", 40)
