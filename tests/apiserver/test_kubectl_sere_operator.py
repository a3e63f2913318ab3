"""`kubectl sere` beside the real operator: neither undoes what the other means, and the switch outlives a dead operator."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from sere_operator.api import meta

from .test_operator import STATIC, World, eventually, manifest, node, world

__all__ = ["node", "world"]  # fixtures


def plugin(world: World, command: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sere_operator.cli.kubectl", command, "-n", world.namespace, "m", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def serving_static(world: World, **spec: Any) -> str:
    """Two pods that serve a static policy. Its digest."""
    world.apply(manifest(replicas=2, routing={"mode": "Static", "policy": STATIC}, **spec))
    world.ready(timeout_s=90)
    (digest,) = set(world.digests())
    assert digest != "exact"
    return digest


def pods(world: World) -> set[str]:
    return {pod.uid for pod in world.pods()}


def test_the_kill_switch_with_the_operator_at_work(world: World) -> None:
    digest, before = serving_static(world), pods(world)
    told = plugin(world, "exact")
    assert "confirmed by 2 pod(s): exact routing" in told, told
    assert world.digests() == ["exact", "exact"]
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "Overridden")
    assert world.get("SereDeployment", "m")["status"]["routing"] == "Exact"
    assert world.get("ConfigMap", "m-policy")["data"]["stable"] == digest, "what to come back to"
    assert pods(world) == before, "no pod was replaced"

    world.apply(manifest(replicas=3, routing={"mode": "Static", "policy": STATIC}))
    eventually(lambda: world.digests() == ["exact"] * 3, 60, "a pod that comes later routes exactly as well")

    plugin(world, "exact", "--off")
    eventually(lambda: world.digests() == [digest] * 3, 60)
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "Applied", 60)


def test_the_kill_switch_with_the_operator_dead_and_back(world: World) -> None:
    digest = serving_static(world)
    world.operator.kill()
    plugin(world, "exact")
    assert world.digests() == ["exact", "exact"]
    world.operator.start()
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "Overridden", 60)
    assert world.digests() == ["exact", "exact"], "the operator that came back keeps it"
    world.operator.kill()
    plugin(world, "exact", "--off")
    eventually(lambda: world.digests() == [digest, digest], 30, "lifted without the operator")


def test_a_rollback_is_kept_by_the_operator(world: World) -> None:
    digest = serving_static(world)
    assert f"policy {digest} is given up, exact is in force" in plugin(world, "rollback")
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "RolledBack", 60)
    eventually(lambda: world.digests() == ["exact", "exact"], 60)
    assert world.get("ConfigMap", "m-policy")["data"]["stable"] == "exact"
    assert "`kubectl sere rollback m --off` allows it again" in plugin(world, "explain")
    plugin(world, "rollback", "--off")
    eventually(lambda: world.digests() == [digest, digest], 90, "tried anew, canary first")
    assert meta.ROLLBACK_ANNOTATION not in (world.get("SereDeployment", "m")["metadata"].get("annotations") or {})


def test_nobody_but_a_person_promotes_where_approval_is_manual(world: World) -> None:
    world.apply(manifest(replicas=2, routing={"mode": "Static", "policy": STATIC}, rollout={"approval": "Manual"}))
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "AwaitingApproval", 90)
    assert sorted(world.digests())[0] == "exact", "only the canary runs it"
    plugin(world, "approve")
    eventually(lambda: "exact" not in world.digests() and len(world.digests()) == 2, 60)
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "Applied", 60)
