"""An operator with another default engine image takes over: models are replaced a few at a time, and each goes on serving."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tests.kit.operator_process import OperatorProcess, World, eventually, manifest

from .test_operator import node, world

__all__ = ["node", "world"]  # fixtures


def ready_since(pod: dict[str, Any]) -> str:
    """When a pod became ready, as text that sorts by time; later than any time where it is not."""
    return next(
        (c["lastTransitionTime"] for c in pod["status"]["conditions"] if (c["type"], c["status"]) == ("Ready", "True")), "~"
    )


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
    fewest = [1]

    def replaced() -> bool:
        fewest.append(min(sum(pod.ready for pod in world.pods() if pod.name.startswith(f"{name}-")) for name in names))
        images = [pod["spec"]["containers"][0]["image"] for pod in world.items("Pod")]
        return images == ["sere-engine:newer"] * len(names)

    eventually(replaced, 300, "every model has the newer image")
    assert min(fewest) == 1, "each model always had a pod that served"
    # By the API server's own times, whatever was seen in between: a pod takes 2 s, and the next one is made once it is ready.
    times = sorted((pod["metadata"]["creationTimestamp"], ready_since(pod)) for pod in world.items("Pod"))
    assert all(made >= ready for (_, ready), (made, _) in itertools.pairwise(times)), times
    for name in names:
        world.ready(name)
