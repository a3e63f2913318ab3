"""The order of the operator's writes, that each needs the Lease, and what is said of one that the API server refuses."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from kubernetes.client.rest import ApiException

from sere_ext.contract.errors import ApiError, NotLeadingError
from sere_operator.kube import refused
from sere_operator.plan.patch import merged
from sere_operator.plan.snapshot import Event, Plan, PodPatch, Resource, Snapshot, TuningSnapshot
from sere_operator.runtime.client import Client
from sere_operator.runtime.echoes import Echoes
from sere_operator.runtime.enact import enact

READY = {"type": "Ready", "status": "True", "reason": "Serving", "message": "", "observedGeneration": 1}
SENTENCE = 'Deployment.apps "m" is forbidden: exceeded quota: compute, requested: count/deployments.apps=1'


def body(kind: str, name: str = "m") -> dict[str, Any]:
    return {"kind": kind, "metadata": {"name": name, "namespace": "ns", "uid": f"u-{kind}"}}


def resource(kind: str = "SereDeployment", **status: Any) -> Resource:
    made = {**body(kind), "status": status}
    made["metadata"]["generation"] = 2
    return (Snapshot if kind == "SereDeployment" else TuningSnapshot)(now=1_800_000_000.0, object=made)


def full_plan() -> Plan:
    conditions = [{**READY, "observedGeneration": 2}]
    return Plan(
        replace=[body("ConfigMap")], hand_over=[body("Deployment")], apply=[body("Deployment"), body("Service")],
        pods=[PodPatch("p", "u", {"a": "b"})], delete=[body("SereTuningJob")], requeue_after=45.0,
        status={"conditions": conditions, "rollout": {"stage": "Canary"}}, events=[Event("Normal", "CanaryStarted", "x")],
    )  # fmt: skip


class Server:
    """Notes each write. Refuses those of some kinds, with a status and a sentence."""

    def __init__(self, refuse: tuple[str, ...] = (), status: int = 403, words: str = SENTENCE) -> None:
        self.refuse, self.status, self.words = refuse, status, words
        self.log: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.statuses: list[dict[str, Any]] = []

    def _write(self, verb: str, kind: str) -> None:
        self.log.append(f"{verb} {kind}")
        if kind in self.refuse:
            error = ApiException(status=self.status, reason="Forbidden")
            error.body = json.dumps({"kind": "Status", "message": self.words, "reason": "Forbidden"})
            raise refused(f"{verb} {kind}", error)

    async def replace(self, body: dict[str, Any]) -> None:
        self._write("replace", body["kind"])

    async def apply(self, body: dict[str, Any], **_: Any) -> None:
        self._write("apply", body["kind"])

    async def delete(self, kind: str, *_: Any) -> None:
        self._write("delete", kind)

    async def create(self, body: dict[str, Any]) -> None:
        self._write("create", body["kind"])
        self.events.append(body)

    async def patch(self, kind: str, namespace: str, name: str, body: dict[str, Any], subresource: str = "") -> None:
        self._write("status" if subresource else "patch", kind)
        if subresource:
            self.statuses.append(body["status"])


async def run(server: Server, seen: Resource, plan: Plan, leads: Any = lambda: True) -> Plan:
    return await enact(cast("Client", server), seen, plan, leads, Echoes())


async def test_status_comes_after_every_child_and_events_last() -> None:
    """Else a crash in between would leave a status that tells of what was never done."""
    server = Server()
    await run(server, resource(), full_plan())
    assert server.log == [
        "replace ConfigMap", "apply Deployment", "apply Deployment", "apply Service", "patch Pod", "delete SereTuningJob",
        "status SereDeployment", "create Event",
    ]  # fmt: skip


@pytest.mark.parametrize("allowed", range(8))
async def test_no_write_of_any_kind_is_done_after_the_lease_is_lost(allowed: int) -> None:
    server, left = Server(), allowed

    def leads() -> bool:
        nonlocal left
        left -= 1
        return left >= 0

    with pytest.raises(NotLeadingError):
        await run(server, resource(), full_plan(), leads)
    assert len(server.log) == allowed


def written(server: Server, seen: Resource) -> dict[str, Any]:
    """The status as the API server has it after what was written."""
    (patch,) = server.statuses
    return merged(seen.status, patch)


@pytest.mark.parametrize("status", [400, 403, 405, 413, 422, 500])
async def test_what_the_server_refuses_stands_in_the_status_with_its_sentence_within_one_look(status: int) -> None:
    server, seen = Server(("Deployment",), status), resource(conditions=[READY], observedGeneration=1)
    plan = await run(server, seen, full_plan())
    new = written(server, seen)
    (ready,) = new["conditions"]
    assert (ready["status"], ready["reason"], ready["observedGeneration"]) == ("False", "Refused", 2)
    assert ready["message"] == "; ".join([f"the API server refuses Deployment m: {SENTENCE}"] * 2)
    assert new["observedGeneration"] == 2
    assert new["rollout"] == {"stage": "Canary"}, "the other writes were done, so what they mean is told"
    assert "apply Service" in server.log and "patch Pod" in server.log
    (event,) = server.events
    assert (event["type"], event["reason"]) == ("Warning", "Refused") and SENTENCE in event["message"]
    assert plan.requeue_after == 30.0

    again, seen = Server(("Deployment",), status), resource(**new)
    await run(again, seen, full_plan())
    assert (again.statuses, again.events) == ([], []), "said once, and nothing is written anew"


async def test_without_its_config_map_no_pod_is_told_of_a_policy_and_no_step_is_claimed() -> None:
    server, seen = Server(("ConfigMap",)), resource(conditions=[READY], rollout={"stage": "Baseline"})
    await run(server, seen, full_plan())
    assert server.log == ["replace ConfigMap", "status SereDeployment", "create Event"]
    assert written(server, seen)["rollout"] == {"stage": "Baseline"}


async def test_a_tuning_job_spends_nothing_where_its_rights_are_refused() -> None:
    server, seen = Server(("Role",)), resource("SereTuningJob")
    plan = Plan(apply=[body("ServiceAccount"), body("Role"), body("Job")], status={"stage": "x"}, requeue_after=60.0)
    await run(server, seen, plan)
    assert server.log == ["apply ServiceAccount", "apply Role", "status SereTuningJob", "create Event"]
    (complete,) = written(server, seen)["conditions"]
    assert (complete["type"], complete["status"], complete["reason"]) == ("Complete", "False", "Refused")


@pytest.mark.parametrize("status", [409, 429, 503])
async def test_what_the_next_try_may_mend_is_no_refusal(status: int) -> None:
    server = Server(("Deployment",), status)
    with pytest.raises(ApiError):
        await run(server, resource(), full_plan())
    assert not server.statuses and not server.events


@pytest.mark.parametrize("status", [404, 409])
async def test_a_pod_that_is_gone_holds_up_nothing(status: int) -> None:
    server = Server(("Pod",), status)
    await run(server, resource(), full_plan())
    assert server.log[-2:] == ["status SereDeployment", "create Event"]
