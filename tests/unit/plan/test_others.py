"""What other people and controllers do to our objects: put back, left, taken back."""

from __future__ import annotations

import copy
from typing import Any

from sere_operator.api.meta import CONFIG_HASH_ANNOTATION
from sere_operator.plan.decide import decide
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.objects.contested import MAX_FIELDS, OTHERS, PUT_BACK, Contested
from sere_operator.plan.objects.revision import revision
from tests.kit.plan_world import DIGEST, POLICY, World, profile_body

IMAGE = "spec.template.spec.containers[engine].image"


def settled(replicas: int = 2, **spec: Any) -> World:
    world = World(replicas, **spec)
    world.settle()
    world.events.clear()
    return world


class Webhook(World):
    """Every Deployment that is written gets another registry and a proxy variable."""

    def _apply(self, body: dict[str, Any]) -> None:
        body = copy.deepcopy(body)
        if body["kind"] == "Deployment":
            (engine,) = body["spec"]["template"]["spec"]["containers"]
            engine["image"] = f"mirror.example/{engine['image'].removeprefix('mirror.example/')}"
            if all(variable["name"] != "HTTP_PROXY" for variable in engine["env"]):
                engine["env"].append({"name": "HTTP_PROXY", "value": "x"})
        super()._apply(body)


def test_what_a_webhook_rewrites_is_left_after_the_second_time_and_named_once() -> None:
    world = Webhook(2)
    written = 0
    for _ in range(60):
        plan = world.step()
        written += sum(body["kind"] == "Deployment" for body in (*plan.apply, *plan.replace))
        world.tick()
    assert written <= 1 + 2 * PUT_BACK
    assert world.events.count("FieldLeft") == 2, "the image and the variable, once each"
    assert world.condition("Ready")["status"] == "True"
    assert world.step().writes == 0, "a quiet minute writes nothing"
    fields = {entry["field"]: entry["times"] for entry in world.status["contested"]}
    assert fields == {IMAGE: 3, f"{IMAGE.removesuffix('.image')}.env[HTTP_PROXY]": 3}
    world.tick(2 * 3600)
    assert world.step().writes == 0, "what is still contested is not tried again and again"
    world.edit(engine={"image": "own:2"})
    world.step()
    image = world.children["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "mirror.example/own:2", "what the spec changes is written"


class Stripper(World):
    """Whoever keeps annotations of its own takes those of others out of every Deployment, the operator's hash among them."""

    def _apply(self, body: dict[str, Any]) -> None:
        super()._apply(body)
        if body["kind"] == "Deployment":
            self.children["Deployment"]["metadata"]["annotations"].pop(CONFIG_HASH_ANNOTATION, None)


def test_the_annotation_that_tells_what_was_applied_is_no_way_round_that() -> None:
    world = Stripper(2)
    written = 0
    for _ in range(30):
        written += sum(body["kind"] == "Deployment" for body in world.step().apply)
        world.tick()
    assert written <= 1 + PUT_BACK
    assert world.events.count("FieldLeft") == 1
    for number in range(5):  # edits of the spec are not that somebody's
        world.edit(engine={"image": f"own:{number}"})
        world.settle()
        engine = world.children["Deployment"]["spec"]["template"]["spec"]["containers"][0]
        assert engine["image"] == f"own:{number}"


def test_another_default_of_the_operator_is_written_however_often() -> None:
    world = settled()
    for number in range(5):
        world.defaults = Defaults(engine_image=f"sere-engine:{number}")
        world.settle()
        engine = world.children["Deployment"]["spec"]["template"]["spec"]["containers"][0]
        assert engine["image"] == f"sere-engine:{number}"
    assert "FieldLeft" not in world.events and "contested" not in world.status


def test_more_fields_than_are_remembered_are_left_together() -> None:
    contested = Contested(now=0.0)
    fields = [f"field{number}" for number in range(3 * MAX_FIELDS)]
    assert [contested.settle("Deployment m", fields) for _ in range(PUT_BACK)] == [fields] * PUT_BACK
    assert contested.settle("Deployment m", fields) == []
    assert contested.settle("Service m", ["type"]) == [], "no room, so it is not fought either"
    told = contested.told()
    assert told is not None and len(told) == MAX_FIELDS
    assert len(contested.events) == MAX_FIELDS and OTHERS in contested.events[-1].message


def test_an_edit_now_and_then_is_put_back_each_time() -> None:
    world = settled()
    for _ in range(5):
        world.children["Service"]["spec"]["type"] = "NodePort"
        world.step()
        assert world.children["Service"]["spec"]["type"] == "ClusterIP"
        world.tick(2 * 3600)
    assert "FieldLeft" not in world.events


def test_the_policy_config_map_is_never_left_to_others() -> None:
    world = settled()
    for _ in range(6):
        world.children["ConfigMap"]["data"]["stable"] = "sere-00000000"
        world.step()
        assert world.stable == "exact"
        world.tick()
    assert "contested" not in world.status


def test_annotations_of_the_pod_template_are_anybodys() -> None:
    """A restart that Reloader asks for is one rollout, not two."""
    world = settled()
    annotations = {"reloader.stakater.com/last-reloaded-from": "x", "kubectl.kubernetes.io/restartedAt": "now"}
    world.children["Deployment"]["spec"]["template"]["metadata"]["annotations"] = annotations
    plan = world.step()
    assert (plan.apply, plan.replace) == ([], [])
    world.settle()
    assert world.children["Deployment"]["spec"]["template"]["metadata"]["annotations"] == annotations


def test_an_edit_of_the_users_pod_template_rolls_out_as_any_other_and_the_policy_stays() -> None:
    """A label is nothing that runs. A variable is: what was rejected before it is tried again with it."""
    world = World(2, routing={"mode": "Profile", "profileRef": {"name": "p"}})
    world.profiles["p"] = profile_body(POLICY)
    world.settle()
    template = world.children["Deployment"]["spec"]["template"]
    before, replaced = revision(world.spec), {pod.uid for pod in world.pods}
    world.edit(podTemplate={"metadata": {"labels": {"team": "b"}}})
    world.step()
    assert world.children["Deployment"]["spec"]["template"] != template
    for _ in range(20):
        world.step()
        world.tick()
        assert sum(pod.ready for pod in world.pods) >= 2
    assert not replaced & {pod.uid for pod in world.pods}
    assert {(pod.digest, pod.template["metadata"]["labels"]["team"]) for pod in world.pods if pod.template} == {(DIGEST, "b")}
    assert revision(world.spec) == before
    world.edit(podTemplate={"spec": {"containers": [{"name": "engine", "env": [{"name": "VLLM_X", "value": "1"}]}]}})
    assert revision(world.spec) != before
    world.settle()
    assert world.condition("Ready")["status"] == "True"
    assert {pod.digest for pod in world.pods} == {DIGEST}


# ---- orphans -----------------------------------------------------------------------------------------------------


def orphaned(world: World) -> None:
    """kubectl delete --cascade=orphan, and applied again: the children stay without an owner, the uid is another."""
    for child in world.children.values():
        child["metadata"].pop("ownerReferences")
        child["metadata"]["managedFields"] = [{"manager": "sere-operator", "operation": "Apply"}]
    world.object["metadata"]["uid"] = "another"
    world.object.pop("status")


def test_children_that_were_orphaned_are_taken_back_and_no_pod_is_replaced() -> None:
    world = World(2, routing={"mode": "Profile", "profileRef": {"name": "p"}})
    world.profiles["p"] = profile_body(POLICY)
    world.settle()
    pods, template = [pod.uid for pod in world.pods], world.children["Deployment"]["spec"]["template"]
    orphaned(world)
    world.step()
    assert {pod.digest for pod in world.pods} == {DIGEST}, "the policy in force is known from what the operator wrote"
    world.settle()
    assert world.condition("Ready")["status"] == "True"
    assert all(child["metadata"]["ownerReferences"][0]["uid"] == "another" for child in world.children.values())
    assert [pod.uid for pod in world.pods] == pods
    assert world.children["Deployment"]["spec"]["template"] == template


def test_what_we_did_not_make_is_no_orphan() -> None:
    for change in (
        {"managedFields": [{"manager": "kubectl", "operation": "Apply"}]},
        {"labels": {}},
        {"ownerReferences": [{"kind": "SereDeployment", "name": "other", "uid": "o", "controller": True}]},
    ):
        world = settled()
        orphaned(world)
        world.children["Service"]["metadata"].update(change)
        plan = decide(world.observe(), Defaults())
        assert plan.apply == []
        assert plan.status is not None
        assert "Service m exists and is not ours" in plan.status["conditions"][0]["message"]
