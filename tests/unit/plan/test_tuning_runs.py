"""Mode Tuned: runs are remembered, so that cleaning up spends nothing; and another run is asked for by name."""

from __future__ import annotations

from typing import Any

import pytest

from sere_operator.plan.tuning.wanted import HISTORY
from tests.kit.plan_world import DIGEST, POLICY, World, profile_body

TUNED: dict[str, Any] = {
    "routing": {"mode": "Tuned"},
    "accuracy": {"maxDropPoints": 1, "tasks": [{"uri": "pvc://data/items.jsonl"}]},
    "tuning": {"similarity": {"calibrate": {"uri": "pvc://data/c.jsonl"}}, "workload": {"load": {"concurrency": [16]}}},
}
RETUNE = "serving.sere.dev/tune-again"


def begun() -> World:
    world = World(2, **TUNED)
    world.settle()
    assert len(world.jobs) == 1
    return world


def finish(world: World, outcome: str) -> None:
    complete = {"type": "Complete", "status": "True", "reason": outcome, "message": f"the tuner said {outcome}"}
    world.jobs[-1]["status"] = {"outcome": outcome, "deviceHours": "3.90", "conditions": [complete]}
    if outcome == "Chosen":
        world.jobs[-1]["status"]["profile"] = "p"
        world.profiles["p"] = profile_body(POLICY)
    world.settle()


@pytest.mark.parametrize("outcome", ["Chosen", "Infeasible", "Failed"])
def test_deleting_a_finished_job_begins_no_other_and_forgets_nothing(outcome: str) -> None:
    world = begun()
    finish(world, outcome)
    before = world.condition("Tuned")
    world.jobs.clear()
    world.settle()
    assert world.jobs == []
    assert world.condition("Tuned") == before
    assert {pod.digest for pod in world.pods} == {DIGEST if outcome == "Chosen" else "exact"}
    (run,) = world.status["tuningRuns"]
    assert (run["outcome"], run["deviceHours"]) == (outcome, "3.90")
    assert world.step().writes == 0


def test_another_run_is_asked_for_by_annotation_once() -> None:
    world = begun()
    (name,) = (job["metadata"]["name"] for job in world.jobs)
    finish(world, "Infeasible")
    world.annotate(RETUNE, "m-tune-00000000")
    world.settle()
    assert world.deleted == [], "of another spec"
    world.annotate(RETUNE, name)
    world.settle()
    (again,) = world.jobs
    assert (again["metadata"]["name"], "status" in again) == (name, False)
    finish(world, "Infeasible")
    world.jobs.clear()
    world.settle()
    assert world.jobs == [], "asked for once"
    world.annotate(RETUNE, f"{name}/2")
    world.settle()
    assert len(world.jobs) == 1


def test_a_job_deleted_while_it_runs_is_not_begun_anew_by_itself() -> None:
    world = begun()
    world.jobs[0]["status"] = {"startTime": "2027-01-15T07:00:00Z", "stage": "search"}
    world.settle()
    world.jobs.clear()
    world.settle()
    assert world.jobs == []
    tuned = world.condition("Tuned")
    assert tuned["reason"] == "Failed"
    assert "was deleted before it had ended; tune again with annotation serving.sere.dev/tune-again=m-tune-" in tuned["message"]


def test_a_job_deleted_before_it_had_begun_is_made_again() -> None:
    world = begun()
    world.jobs.clear()
    world.settle()
    assert len(world.jobs) == 1


def test_old_finished_jobs_go() -> None:
    world = begun()
    for trials in range(20, 20 + HISTORY + 3):
        world.jobs[-1]["metadata"]["creationTimestamp"] = f"2027-01-15T07:00:{trials}Z"
        finish(world, "Infeasible")
        world.edit(tuning={**TUNED["tuning"], "trials": trials})
        world.settle()
    assert len(world.jobs) == HISTORY + 1
    assert len(world.status["tuningRuns"]) <= 8
