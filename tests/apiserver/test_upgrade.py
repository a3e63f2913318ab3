"""An operator with another default engine image takes over: models are replaced a few at a time, and each goes on serving."""

from __future__ import annotations

from pathlib import Path

from tests.kit.operator_process import OperatorProcess, World, eventually, manifest

from .test_operator import node, world

__all__ = ["node", "world"]  # fixtures


def test_an_upgrade_replaces_the_pods_of_one_model_at_a_time(world: World, kubeconfig: str, tmp_path: Path) -> None:
    names = [f"m{index}" for index in range(4)]
    world.node.load_s = 2.0  # of all pods: one that became ready in less would be unready again
    for name in names:
        world.apply(manifest(name, engine={}))
    for name in names:
        world.ready(name)
    assert world.operator.stop() == 0
    own = {"SERE_LEASE_NAME": world.namespace, "SERE_WATCH_NAMESPACES": world.namespace}
    newer = {"SERE_ENGINE_IMAGE": "sere-engine:newer", "SERE_ENGINE_ROLLOUTS": "1"}
    world.operator = OperatorProcess(kubeconfig, tmp_path / "newer.log", **own, **newer).start()
    at_once: list[int] = []
    fewest = [1]

    def replaced() -> bool:
        # One request, so that all are seen at one moment.
        found = world.items("Deployment")
        new = [d for d in found if d["spec"]["template"]["spec"]["containers"][0]["image"] == "sere-engine:newer"]
        loading = [d for d in new if d["status"].get("updatedReplicas", 0) < 1 or d["status"].get("unavailableReplicas", 0)]
        at_once.append(len(loading))
        fewest.append(min(sum(pod.ready for pod in world.pods() if pod.name.startswith(f"{name}-")) for name in names))
        return len(new) == len(names) and not loading

    eventually(replaced, 150, "every model has the newer image")
    assert (max(at_once), min(fewest)) == (1, 1), (at_once, fewest)
    for name in names:
        world.ready(name)
