"""`rollout.requireProfile`: pods that serve by a tuned policy wait for the profile of what replaces them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sere_ext.contract.policy import Policy
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.rollout.tuning_first import DOWN_S
from tests.kit.plan_world import DIGEST, POLICY, CrashError, World, profile_body

TUNED: dict[str, Any] = {
    "routing": {"mode": "Tuned"},
    "accuracy": {"maxDropPoints": 1, "tasks": [{"uri": "pvc://data/items.jsonl"}]},
    "tuning": {"similarity": {"calibrate": {"uri": "pvc://data/c.jsonl"}}, "workload": {"load": {"concurrency": [16]}}},
}
NEWER = {"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 3}]}
NEWER_DIGEST = Policy.parse(NEWER).digest


def model(revision: str) -> dict[str, str]:
    return {"name": "m", "revision": revision}


def finish(world: World, outcome: str, revision: str = "", policy: dict[str, Any] = POLICY, **changes: Any) -> None:
    """What the newest tuning run comes to."""
    job, name = world.jobs[-1], f"p-{revision or 'first'}"
    complete = {"type": "Complete", "status": "True", "reason": outcome, "message": f"the tuner said {outcome}"}
    job["status"] = {"outcome": outcome, "stage": "ended", "progress": "8/8", "conditions": [complete]}
    if outcome == "Chosen":
        job["status"]["profile"] = name
        world.profiles[name] = profile_body(policy, revision=revision, **changes)


def tuned_world(replicas: int = 2, **spec: Any) -> World:
    """Serving by a tuned policy."""
    world = World(replicas, **{**TUNED, **spec})
    world.settle()
    finish(world, "Chosen")
    world.settle()
    assert {pod.digest for pod in world.pods} == {DIGEST}
    return world


def look_for(world: World, seconds: int) -> None:
    for _ in range(seconds):
        world.step()
        world.tick()


def revisions(world: World) -> set[str]:
    return {pod.revision for pod in world.pods}


@pytest.mark.parametrize("policy", [NEWER, POLICY], ids=["another policy", "the same policy"])
def test_a_new_model_is_tuned_before_the_pods_of_the_old_one_go(policy: dict[str, Any]) -> None:
    world = tuned_world()
    before = [pod.uid for pod in world.pods]
    world.edit(model=model("v2"))
    look_for(world, 60)
    assert [pod.uid for pod in world.pods] == before
    assert {pod.digest for pod in world.pods} == {DIGEST}, "the old ones go on as they were tuned"
    assert world.step().writes == 0
    for kind, status in (("Ready", "False"), ("Progressing", "True"), ("Available", "True"), ("PolicyApplied", "True")):
        assert world.condition(kind)["status"] == status, kind
    for kind in ("Ready", "Progressing"):
        assert world.condition(kind)["reason"] == "TuningFirst"
        assert "requireProfile: false" in world.condition(kind)["message"]
    job = world.jobs[-1]
    assert job["spec"]["model"] == model("v2")
    job["status"] = {"stage": "search", "progress": "3/8"}
    world.step()
    assert "search, 3/8 trials" in world.condition("Ready")["message"]

    finish(world, "Chosen", "v2", policy)
    world.rate = 0.0
    seen: list[str] = []
    while revisions(world) != {"v2"}:
        world.step()
        world.tick()
        seen += [pod.digest for pod in world.pods if pod.revision == ""]
        assert len(world.pods) >= 2
    assert set(seen) == {DIGEST}, "the old ones keep their policy until they go"
    world.rate = 50.0
    began = len(world.golden_runs)
    world.settle()
    digest = Policy.parse(policy).digest
    assert {pod.digest for pod in world.pods} == {digest}
    assert {run for _, run in world.golden_runs[began:]} == {"exact", digest}, "by a canary of its own, against exact routing"
    assert (world.condition("Ready")["status"], world.condition("Tuned")["reason"]) == ("True", "Certified")
    assert world.status["policy"]["profile"] == "p-v2"
    assert world.step().writes == 0


@pytest.mark.parametrize("outcome", ["Infeasible", "BudgetExhausted", "CannotCertify", "Failed", "advisory", "deleted"])
def test_without_a_certified_profile_it_holds_and_says_what_to_do(outcome: str) -> None:
    world = tuned_world()
    world.edit(model=model("v2"))
    look_for(world, 5)
    certified = outcome not in ("advisory", "deleted")
    finish(world, outcome if certified else "Chosen", "v2", NEWER, **({} if certified else {"certified": False}))
    if outcome == "deleted":
        del world.profiles["p-v2"]
    world.settle(20)
    assert revisions(world) == {""}
    assert {pod.digest for pod in world.pods} == {DIGEST}
    assert world.step().writes == 0
    ready, progressing = world.condition("Ready"), world.condition("Progressing")
    assert (ready["status"], ready["reason"]) == (progressing["status"], progressing["reason"]) == ("False", "ProfileRequired")
    for words in ({"advisory": "advisory", "deleted": "gone"}.get(outcome, f"the tuner said {outcome}"), "requireProfile: false"):
        assert words in ready["message"]
    assert "ProfileRequired" in world.events

    world.edit(rollout={"requireProfile": False})
    world.settle()
    assert revisions(world) == {"v2"}
    assert world.stable == "exact"


@pytest.mark.parametrize("meanwhile", ["kill switch", "profile deleted"])
def test_what_is_held_stays_held(meanwhile: str) -> None:
    """The kill switch is for the policy: it never replaces a pod, least of all by one of a model that nobody has tuned."""
    world = tuned_world()
    before = [pod.uid for pod in world.pods]
    world.edit(model=model("v2"))
    look_for(world, 5)
    if meanwhile == "kill switch":
        world.annotate("serving.sere.dev/override", "exact")
        look_for(world, 10)
        assert [pod.uid for pod in world.pods] == before
        world.annotate("serving.sere.dev/override", None)
    else:
        del world.profiles["p-first"]
    look_for(world, 10)
    assert [pod.uid for pod in world.pods] == before
    assert {pod.digest for pod in world.pods} == {DIGEST}
    assert world.condition("Progressing")["reason"] == "TuningFirst"
    finish(world, "Chosen", "v2", NEWER)
    world.settle()
    assert revisions(world) == {"v2"}


def test_a_profile_that_is_gone_before_the_edit_holds_too() -> None:
    world = tuned_world()
    del world.profiles["p-first"]
    look_for(world, 2)
    world.edit(model=model("v2"))
    look_for(world, 10)
    assert revisions(world) == {""}
    assert world.condition("Progressing")["reason"] == "TuningFirst"


def test_taking_the_change_back_moves_no_pod() -> None:
    world = tuned_world()
    before = [pod.uid for pod in world.pods]
    world.edit(model=model("v2"))
    look_for(world, 5)
    world.edit(model={"name": "m"})
    world.settle()
    assert [pod.uid for pod in world.pods] == before
    assert world.deleted == ["SereTuningJob"], "the run of what is not wanted any more"
    assert (world.condition("Ready")["status"], world.condition("Tuned")["reason"]) == ("True", "Certified")


def test_while_held_foreign_edits_are_put_back_and_other_changes_of_the_pods_wait_and_are_named() -> None:
    world = tuned_world()
    before, template = [pod.uid for pod in world.pods], world.pods[0].template
    world.edit(model=model("v2"), resources={"limits": {"nvidia.com/gpu": 2}})
    look_for(world, 5)
    edited = world.children["Deployment"]["spec"]["template"]["spec"]
    edited["containers"][0]["image"] = "foreign:1"
    edited["containers"].append({"name": "miner", "image": "x"})
    world.events.clear()
    world.step()
    assert world.children["Deployment"]["spec"]["template"] == template
    assert set(world.events) == {"Healed"}
    assert "waits too: spec.resources;" in world.condition("Ready")["message"]
    world.edit(tolerations=[{"operator": "Exists"}], podTemplate={"metadata": {"labels": {"team": "b"}}})
    look_for(world, 5)
    assert world.step().writes == 0
    assert "waits too: spec.resources, spec.tolerations, spec.podTemplate;" in world.condition("Progressing")["message"]
    assert [pod.uid for pod in world.pods] == before
    finish(world, "Infeasible")
    world.step()
    assert "waits too: spec.resources, spec.tolerations, spec.podTemplate;" in world.condition("Ready")["message"]
    world.edit(rollout={"requireProfile": False})
    world.settle(20)
    assert revisions(world) == {"v2"}
    assert world.pods[0].engine["resources"] == {"limits": {"nvidia.com/gpu": 2}}


def test_where_somebody_took_away_what_the_pods_are_meant_to_be_they_are_made_as_the_spec_says() -> None:
    """Without the annotation nobody knows what to keep."""
    world = tuned_world()
    del world.children["Deployment"]["metadata"]["annotations"]["serving.sere.dev/template"]
    world.edit(model=model("v2"))
    look_for(world, 10)
    assert revisions(world) == {"v2"}


def half_way_to_v2(world: World) -> None:
    """v2, which the spec names, has been tuned, and pods of both models serve."""
    look_for(world, 5)
    finish(world, "Chosen", "v2", NEWER)
    while revisions(world) != {"", "v2"}:
        world.step()
        world.tick()


@pytest.mark.parametrize("last_run", ["deleted", "Infeasible"])
def test_taking_the_change_back_in_the_middle_of_its_rollout_waits_for_nothing(last_run: str) -> None:
    """Pods of what is wanted again serve by their policy, whatever became of the run that made it."""
    world = tuned_world(3)
    if last_run == "Infeasible":
        world.edit(tuning={**TUNED["tuning"], "trials": 9})
        look_for(world, 3)
        finish(world, "Infeasible")
    before = {pod.uid for pod in world.pods}
    world.edit(model=model("v2"))
    half_way_to_v2(world)
    world.step()
    if last_run == "deleted":
        world.jobs = [job for job in world.jobs if job["spec"]["model"] == model("v2")]
    world.edit(model={"name": "m"})
    while "v2" in revisions(world):
        world.step()
        assert world.condition("Progressing")["reason"] == "RollingOut"
        assert world.stable == DIGEST
        world.tick()
        assert len(world.pods) >= 3
    world.settle(20)
    assert before & {pod.uid for pod in world.pods}
    assert (world.stable, {pod.digest for pod in world.pods}) == (DIGEST, {DIGEST})
    assert world.condition("Ready")["status"] == "True"
    assert world.status["policy"]["profile"] == "p-first"


NEW_DEFAULT = Defaults(engine_image="sere-engine:0.2.0")


def images(world: World) -> set[str]:
    return {pod.engine["image"] for pod in world.pods}


def test_another_default_image_is_tuned_before_the_pods_of_the_old_one_go() -> None:
    """The operator was upgraded: the same as if spec.engine.image had named the image."""
    world = tuned_world()
    before = [pod.uid for pod in world.pods]
    world.defaults = NEW_DEFAULT
    look_for(world, 10)
    assert [pod.uid for pod in world.pods] == before
    assert world.condition("Progressing")["reason"] == "TuningFirst"
    assert len(world.jobs) == 2, "tuned anew"
    assert world.jobs[-1]["spec"]["engine"]["image"] == "sere-engine:0.2.0", "on the new image, whatever the default becomes"
    finish(world, "Chosen", policy=NEWER)
    world.settle()
    assert (images(world), world.stable) == ({"sere-engine:0.2.0"}, NEWER_DIGEST)
    world.edit(engine={"image": "sere-engine:0.2.0"})
    world.defaults = Defaults(engine_image="sere-engine:0.3.0")
    world.settle()
    assert (images(world), len(world.jobs)) == ({"sere-engine:0.2.0"}, 2), "pinned before the next upgrade, nothing changes"


def test_another_default_image_waits_for_nothing_where_the_spec_names_its_own_or_asks_not_to() -> None:
    own = tuned_world(engine={"image": "own:1"})
    own.defaults = NEW_DEFAULT
    assert own.step().writes == 0
    waived = tuned_world(rollout={"requireProfile": False})
    waived.defaults = NEW_DEFAULT
    look_for(waived, 10)
    assert (images(waived), len(waived.jobs)) == ({"sere-engine:0.2.0"}, 2)


def test_an_upgrade_of_the_operator_without_another_image_tunes_nothing() -> None:
    world = tuned_world()
    (job,) = world.jobs
    world.defaults = Defaults(image_pull_policy="Always")
    world.settle()
    assert world.jobs == [job], "another pod template is no other engine"
    assert {pod.digest for pod in world.pods} == {DIGEST}


def test_what_is_not_the_model_or_engine_waits_for_nothing() -> None:
    world = tuned_world()
    world.edit(model=model("v2"), replicas=3)
    look_for(world, 5)
    assert len(world.pods) == 3, "scaled while held"
    assert revisions(world) == {""}
    world.edit(rollout={"maxUnavailable": 1})
    world.step()
    assert world.children["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 1


def test_a_third_spec_in_the_middle_of_the_rollout_waits_too() -> None:
    world = tuned_world(3)
    world.edit(model=model("v2"))
    half_way_to_v2(world)
    world.edit(model=model("v3"))
    while "" in revisions(world):
        world.step()
        assert "v3" not in revisions(world), "pods that serve by a tuned policy wait for what v3's tuning says"
        assert world.condition("Progressing")["reason"] == "TuningFirst"
        world.tick()
        assert len(world.pods) >= 3
    look_for(world, 10)
    assert revisions(world) == {"v3"}, "those of v2 have not passed their canary: nothing tuned serves, nothing is waited for"


def with_requirement_waived(world: World) -> None:
    world.edit(rollout={"requireProfile": False})


def with_the_kill_switch(world: World) -> None:
    world.annotate("serving.sere.dev/override", "exact")


def in_another_mode(world: World) -> None:
    world.edit(routing={"mode": "Exact"})


def with_nobody_answering(world: World) -> None:
    for pod in world.pods:
        pod.ready = False
    world.step()
    world.tick(DOWN_S - 60)
    world.edit(model=model("v2"))
    world.step()
    assert world.condition("Progressing")["reason"] == "TuningFirst", "a moment's silence is no reason"
    world.tick(61)


@pytest.mark.parametrize("change", [with_requirement_waived, with_the_kill_switch, in_another_mode, with_nobody_answering])
def test_nothing_is_held_where_nothing_tuned_serves_or_nobody_asks(change: Any) -> None:
    world = tuned_world()
    change(world)
    world.edit(model=model("v2"))
    look_for(world, 10)
    assert revisions(world) == {"v2"}


def test_a_first_install_and_pods_that_were_never_tuned_are_not_held() -> None:
    world = World(2, **TUNED)
    world.settle()
    assert world.condition("Ready")["status"] == "True"
    world.edit(model=model("v2"))
    look_for(world, 10)
    assert revisions(world) == {"v2"}


class TuningFirstMachine(RuleBasedStateMachine):
    """Edits, outcomes, restarts and a dying operator in any order."""

    @initialize(replicas=st.integers(1, 3))
    def begin(self, replicas: int) -> None:
        self.world = tuned_world(replicas)
        self.deployed = ""

    @rule(crash_after=st.none() | st.integers(0, 5))
    def look(self, crash_after: int | None) -> None:
        world = self.world
        exactly = world.stable == "exact" or {pod.digest for pod in world.pods} == {"exact"}
        try:
            world.step(crash_after)
        except CrashError:
            pass
        revision = world.spec.model.revision or ""
        if revision != self.deployed and self.of_deployment() == revision:
            # Judged by the world itself: somebody served by a policy, and there was no certificate.
            profile = world.profiles.get(f"p-{revision or 'first'}")
            certified = profile is not None and profile["spec"]["evidence"]["certified"]
            assert certified or exactly or not world.spec.profile_required or self.overridden()
            self.deployed = revision

    def of_deployment(self) -> str:
        args = self.world.children["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"]
        return args[args.index("--revision") + 1] if "--revision" in args else ""

    def overridden(self) -> bool:
        return "serving.sere.dev/override" in self.world.object["metadata"]["annotations"]

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule(revision=st.sampled_from(["", "v2", "v3"]))
    def edit_model(self, revision: str) -> None:
        self.world.edit(model=model(revision) if revision else {"name": "m"})

    @rule(replicas=st.integers(1, 3))
    def scale(self, replicas: int) -> None:
        self.world.edit(replicas=replicas)

    @rule(required=st.booleans())
    def require(self, required: bool) -> None:
        self.world.edit(rollout={**self.world.object["spec"]["rollout"], "requireProfile": required})

    @rule(on=st.booleans())
    def kill_switch(self, on: bool) -> None:
        self.world.annotate("serving.sere.dev/override", "exact" if on else None)

    @rule(outcome=st.sampled_from(["Chosen", "Chosen", "Infeasible"]), certified=st.booleans())
    def tuning_ends(self, outcome: str, certified: bool) -> None:
        revision = self.world.jobs[-1]["spec"]["model"].get("revision", "")
        policy = {"": POLICY, "v2": NEWER, "v3": POLICY}[revision]
        if not self.world.jobs[-1].get("status"):
            finish(self.world, outcome, revision, policy, certified=certified)

    @invariant()
    def the_operator_never_takes_a_pod_away(self) -> None:
        if hasattr(self, "world"):
            deployment = self.world.children["Deployment"]
            assert set(self.world.deleted) <= {"SereTuningJob"}
            assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}

    def teardown(self) -> None:
        """Left alone with a certificate for what is wanted, it ends there, and then writes nothing."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.annotate("serving.sere.dev/override", None)
        look_for(world, 5)
        revision = world.spec.model.revision or ""
        world.jobs.sort(key=lambda job: job["spec"]["model"].get("revision", "") == revision)
        finish(world, "Chosen", revision, {"": POLICY, "v2": NEWER, "v3": POLICY}[revision])
        plan = world.settle()
        assert plan.writes == 0
        assert revisions(world) == {revision}
        assert {pod.digest for pod in world.pods} == {NEWER_DIGEST if revision == "v2" else DIGEST}, world.status
        assert world.condition("Ready")["status"] == "True"


TestTuningFirstMachine = TuningFirstMachine.TestCase
TestTuningFirstMachine.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
