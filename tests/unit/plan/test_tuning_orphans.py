"""`kubectl delete --cascade=orphan` of a SereTuningJob, and one of the same name again: what it left is taken back."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from sere_ext.contract.names import SIMILARITY_LABEL
from sere_operator.api.common import parse_spec
from sere_operator.api.tuning import SereTuningJobSpec
from sere_operator.plan.objects import drift
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.reads import Child
from sere_operator.plan.snapshot import Object, Plan, TuningSnapshot
from sere_operator.plan.tuning.decide import decide_tuning
from sere_operator.plan.tuning.needs import needs_tuning
from sere_operator.plan.tuning.objects import build
from tests.unit.plan.test_tuning import SPEC

NAME, APPLIED = "m-tune-1", [{"manager": "sere-operator", "operation": "Apply"}]
Children = dict[tuple[str, str], Object]


def run(uid: str, children: Children, spec: dict[str, Any] | None = None, result: Object | None = None) -> TuningSnapshot:
    metadata = {"name": NAME, "namespace": "ns", "uid": uid, "generation": 1}
    body = {"apiVersion": "serving.sere.dev/v1alpha1", "kind": "SereTuningJob", "metadata": metadata, "spec": spec or SPEC}
    return TuningSnapshot(now=1_800_000_000.0, object=body, children=children, result=result)


def orphans(result: dict[str, str] | None = None) -> Children:
    """What a run with another uid left."""
    left: Children = {}
    for made in build(run("old", {}), parse_spec(SereTuningJobSpec, SPEC), Defaults()):
        body = drift.stamped(copy.deepcopy(made))
        body["metadata"].pop("ownerReferences")
        body["metadata"] |= {"uid": f"uid-{body['kind']}", "managedFields": APPLIED}
        left[body["kind"], body["metadata"]["name"]] = body
    if result is not None:
        left["ConfigMap", f"{NAME}-result"]["data"] = result
    shard = {"name": f"{NAME}-result-1", "labels": {SIMILARITY_LABEL: f"{NAME}-result"}}
    shard |= {"managedFields": [{"manager": "sere-tuner", "operation": "Apply"}]}
    left["ConfigMap", f"{NAME}-result-1"] = {"kind": "ConfigMap", "metadata": shard}
    return left


def owners(plan: Plan) -> dict[tuple[str, str], str]:
    return {
        (body["kind"], body["metadata"]["name"]): body["metadata"]["ownerReferences"][0]["uid"]
        for body in (*plan.apply, *plan.replace)
    }


def carried_out(left: Children, plan: Plan) -> Children:
    """The objects after a plan, as server-side apply merges them."""
    made = copy.deepcopy(left)
    for body in plan.apply:
        live = made.setdefault((body["kind"], body["metadata"]["name"]), {"metadata": {}})
        live.update({key: value for key, value in body.items() if key != "metadata"})
        live["metadata"].update(body["metadata"])
    made.update({(body["kind"], body["metadata"]["name"]): body for body in plan.replace})
    return made


def test_a_run_takes_all_of_them_back_and_goes_on_in_its_study() -> None:
    left = orphans()
    plan = decide_tuning(run("new", left), Defaults())
    assert owners(plan) == dict.fromkeys(left, "new")
    (job,) = plan.replace
    assert job["spec"] == left["Job", f"{NAME}-tuner"]["spec"], "a running pod runs on"
    (given,) = (body["data"]["tuning.yaml"] for body in plan.apply if body["metadata"]["name"] == f"{NAME}-input")
    assert json.loads(given)["out"].endswith(f"/{NAME}-old"), "in the study that it began"
    settled = decide_tuning(run("new", carried_out(left, plan)), Defaults())
    assert (settled.apply, settled.replace) == ([], []), "and then nothing is written any more"


def test_a_run_that_had_ended_is_not_begun_again() -> None:
    answer = {"outcome.json": json.dumps({"outcome": "Infeasible", "message": "nearest miss: topk 4"})}
    left = orphans(answer)
    left.pop(("Job", f"{NAME}-tuner"))
    plan = decide_tuning(run("new", left, result={"data": answer}), Defaults())
    assert owners(plan) == dict.fromkeys(left, "new")
    assert plan.status is not None and plan.status["outcome"] == "Infeasible"


@pytest.mark.parametrize(("changed", "kind"), [("slo", "ConfigMap m-tune-1-input"), ("engine", "Job m-tune-1-tuner")])
def test_what_a_run_of_another_spec_left_is_no_run_of_this_one(changed: str, kind: str) -> None:
    other = {"slo": {"tpotMs": {"p95": 30}}, "engine": {"image": "other:1"}}[changed]
    plan = decide_tuning(run("new", orphans(), {**SPEC, changed: other}), Defaults())
    assert (plan.apply, plan.replace) == ([], [])
    assert plan.status is not None
    message = plan.status["conditions"][0]["message"]
    assert message == f"{kind} is left of a run of this name with another spec; delete it or rename this job"


@pytest.mark.parametrize("name", ["m-tune-1-result-1", "m-tune-1-tuner", "m-tune-1-input"])
def test_what_no_run_made_is_no_orphan(name: str) -> None:
    left = orphans()
    for key in [key for key in left if key[1] == name]:
        left[key]["metadata"]["managedFields"] = [{"manager": "kubectl", "operation": "Apply"}]
    plan = decide_tuning(run("new", left), Defaults())
    assert (plan.apply, plan.replace) == ([], [])
    assert plan.status is not None and "exists and is not ours" in plan.status["conditions"][0]["message"]


def test_where_there_are_orphans_the_artefacts_config_maps_are_read() -> None:
    snapshot = run("new", orphans())
    known = needs_tuning(snapshot, Defaults())
    while known and Child("ConfigMap", f"{NAME}-result-16") not in known:
        snapshot = TuningSnapshot(**{**snapshot.__dict__, "read": snapshot.read | set(known)})
        known = needs_tuning(snapshot, Defaults())
    assert known
