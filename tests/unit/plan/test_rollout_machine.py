"""The policy rollout as a whole, over time: hypothesis drives a cluster in memory and kills the operator between writes."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.kit.plan_world import DIGEST, GOLDEN, POLICY, CrashError, World, profile_body

OVERRIDE = "serving.sere.dev/override"
PROFILE = {"mode": "Profile", "profileRef": {"name": "p"}}


class RolloutMachine(RuleBasedStateMachine):
    """Profile mode; the policy is good, or gives worse answers, or is slow."""

    @initialize(
        replicas=st.integers(1, 4), harm=st.sampled_from(["none", "answers", "slow"]), rate=st.sampled_from([0.0, 50.0, 500.0])
    )
    def begin(self, replicas: int, harm: str, rate: float) -> None:
        self.world = World(replicas, routing=PROFILE)
        self.world.profiles["p"] = profile_body(POLICY)
        self.world.rate, self.harm = rate, harm
        if harm == "answers":
            self.world.harmful.add(DIGEST)
        if harm == "slow":
            self.world.tpot_ms[DIGEST] = 60.0
        self.stables: list[str | None] = []

    @rule(crash_after=st.none() | st.integers(0, 6))
    def look(self, crash_after: int | None) -> None:
        before = self.world.stable
        try:
            self.world.step(crash_after)
        except CrashError:
            pass
        if self.world.stable != before:
            self.stables.append(self.world.stable)
            if self.world.stable == DIGEST:
                self.evidence_was_there()

    def evidence_was_there(self) -> None:
        """Judged by the world itself, not by the operator's books."""
        assert self.harm == "none", "a harmful policy was promoted"
        runs = self.world.golden_runs
        assert any(digest == DIGEST for _, digest in runs), "promoted without golden prompts on the canary"
        assert any(digest == "exact" for _, digest in runs), "promoted without golden prompts on the stable side"
        seen = max(pod.counts.get(DIGEST, [0])[0] for pod in self.world.pods)
        assert seen >= 100, f"promoted after {seen} requests"

    @rule(seconds=st.sampled_from([0.1, 0.6, 1.0, 5.0, 30.0, 400.0]))
    def wait(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule(index=st.integers(0, 3))
    def pod_restarts(self, index: int) -> None:
        self.world.restart(index)

    @rule(on=st.booleans())
    def kill_switch(self, on: bool) -> None:
        self.world.annotate(OVERRIDE, "exact" if on else None)

    @rule(wanted=st.sampled_from([{"mode": "Exact"}, PROFILE]))
    def edit(self, wanted: dict[str, object]) -> None:
        self.world.edit(routing=wanted)

    @rule(key=st.sampled_from(["ConfigMap", "Service", "Deployment"]))
    def child_is_deleted(self, key: str) -> None:
        self.world.children.pop(key, None)

    @rule()
    def status_is_lost(self) -> None:
        """As when the resource is restored from a backup: nothing but the spec."""
        self.world.object.pop("status", None)

    @invariant()
    def only_canaries_run_what_is_not_stable(self) -> None:
        if not hasattr(self, "world") or len(self.world.pods) < 2:
            return
        annotated = [pod for pod in self.world.pods if pod.annotations.get("serving.sere.dev/policy")]
        assert len(annotated) <= 1 or self.world.stable == DIGEST
        if DIGEST not in self.stables:
            assert sum(pod.digest == DIGEST for pod in self.world.pods) <= 1 + self.switched_away()

    def switched_away(self) -> int:
        """A former canary that shows the policy for the moment that its volume needs."""
        return sum(1 for pod in self.world.pods if pod.digest == DIGEST and not pod.annotations.get("serving.sere.dev/policy"))

    @invariant()
    def nothing_of_the_users_is_deleted(self) -> None:
        if hasattr(self, "world"):
            assert self.world.deleted == []

    def teardown(self) -> None:
        """Left alone, with traffic, it always ends in the one right state, and then writes nothing."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.annotate(OVERRIDE, None)
        world.edit(routing=PROFILE)
        world.rate = 500.0
        plan = world.settle()
        if self.harm == "slow" and len(world.pods) == 1:
            assert world.stable == "exact"  # turns on one pod: never promoted, never banned
            assert "rejected" not in world.status
            return
        assert plan.writes == 0
        assert all("serving.sere.dev/policy" not in pod.annotations for pod in world.pods)
        assert all("serving.sere.dev/override" not in pod.annotations for pod in world.pods)
        if self.harm == "none":
            assert {pod.digest for pod in world.pods} == {DIGEST}, world.status
            assert world.condition("PolicyApplied")["reason"] == "Applied"
            assert world.condition("Ready")["status"] == "True"
        else:
            assert {pod.digest for pod in world.pods} == {"exact"}
            assert world.condition("PolicyApplied")["reason"] == "Rejected"
            assert [r["digest"] for r in world.status["rejected"]] == [DIGEST]
        assert GOLDEN == 16


TestRolloutMachine = RolloutMachine.TestCase
TestRolloutMachine.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
