"""What counts as drift, what does not, and what is taken out."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from sere_operator.plan.objects import drift


def body() -> dict[str, Any]:
    container = {
        "name": "engine", "image": "a:1", "args": ["serve", "m"], "env": [{"name": "A", "value": "1"}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}], "resources": {"limits": {"cpu": "1000m", "memory": "1Gi"}},
    }  # fmt: skip
    template = {
        "metadata": {"labels": {"x": "y"}},
        "spec": {"containers": [container], "volumes": [{"name": "tmp", "emptyDir": {}}]},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "m", "namespace": "n"},
        "spec": {"replicas": 2, "template": template},
    }


def live(wanted: dict[str, Any]) -> dict[str, Any]:
    """As an API server gives it back: defaults filled in, quantities in their canonical form."""
    found = copy.deepcopy(wanted)
    found["metadata"] |= {"uid": "u", "resourceVersion": "5"}
    found["spec"]["progressDeadlineSeconds"] = 600
    container = found["spec"]["template"]["spec"]["containers"][0]
    container["terminationMessagePath"] = "/dev/termination-log"
    container["resources"]["limits"] = {"cpu": "1", "memory": "1024Mi"}
    return found


def engine(found: dict[str, Any]) -> dict[str, Any]:
    return found["spec"]["template"]["spec"]["containers"][0]  # type: ignore[no-any-return]


def test_defaults_and_canonical_quantities_are_no_drift() -> None:
    wanted = drift.stamped(body())
    assert drift.drift(wanted, live(wanted)) is None
    assert drift.without_foreign(wanted, live(wanted)) is None


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda d: d["spec"].update(replicas=5), "spec.replicas"),
        (lambda d: engine(d).update(image="b:1"), "spec.template.spec.containers[engine].image"),
        (lambda d: engine(d)["args"].append("--x"), "spec.template.spec.containers[engine].args"),
        (lambda d: engine(d).update(env=[]), "spec.template.spec.containers[engine].env[A]"),
        (
            lambda d: engine(d)["resources"]["limits"].update(cpu="2"),
            "spec.template.spec.containers[engine].resources.limits.cpu",
        ),
        (lambda d: d["metadata"]["annotations"].clear(), "metadata.annotations.serving.sere.dev/config-hash"),
    ],
)
def test_a_changed_field_is_named(change: Any, path: str) -> None:
    wanted = drift.stamped(body())
    found = live(wanted)
    change(found)
    assert drift.drift(wanted, found) == path


def test_a_field_that_we_stopped_to_set_is_applied_again() -> None:
    before = body()
    engine(before)["env"].append({"name": "B", "value": "2"})
    assert drift.drift(drift.stamped(body()), live(drift.stamped(before))) == "metadata.annotations.serving.sere.dev/config-hash"
    assert drift.drift(drift.stamped(body()), None) == "missing"


def test_foreign_parts_go_and_injected_sidecars_stay() -> None:
    wanted = drift.stamped(body())
    found = live(wanted)
    engine(found)["env"].append({"name": "FOREIGN", "value": "1"})
    containers = found["spec"]["template"]["spec"]["containers"]
    containers += [{"name": "miner", "image": "x"}, {"name": "istio-proxy", "image": "istio"}]
    found["spec"]["template"]["metadata"]["annotations"] = {"kubectl.kubernetes.io/restartedAt": "now", "foreign": "1"}
    taken = drift.without_foreign(wanted, found)
    assert taken is not None
    cleaned, paths = taken
    inside = "spec.template.spec.containers"
    assert paths == [f"{inside}[miner]", f"{inside}[engine].env[FOREIGN]"]
    assert [c["name"] for c in cleaned["spec"]["template"]["spec"]["containers"]] == ["engine", "istio-proxy"]
    assert engine(cleaned)["env"] == [{"name": "A", "value": "1"}]
    assert len(cleaned["spec"]["template"]["metadata"]["annotations"]) == 2, "annotations of the template are anybody's"
    assert cleaned["metadata"]["resourceVersion"] == "5", "the write is guarded by the version that was read"


def test_what_is_left_is_applied_as_it_is() -> None:
    wanted = drift.stamped(body())
    found = live(wanted)
    engine(found)["image"] = "mirror.example/a:1"
    engine(found)["env"] = []
    found["spec"]["template"]["spec"]["containers"].append({"name": "proxy", "image": "p"})
    image, variable = "spec.template.spec.containers[engine].image", "spec.template.spec.containers[engine].env[A]"
    assert list(drift.drifts(wanted, found)) == [image, variable]
    applied = drift.leaving(wanted, found, {image, variable})
    assert engine(applied)["image"] == "mirror.example/a:1"
    assert engine(applied)["env"] == []
    assert drift.drift(applied, found) is None
    assert drift.without_foreign(wanted, found, {"spec.template.spec.containers[proxy]"}) is None
