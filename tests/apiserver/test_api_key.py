"""Engines that ask for an API key: the operator reads it from the Secret that the spec names, and says what is missing."""

from __future__ import annotations

import base64

from tests.kit.operator_process import World, eventually, manifest

from .test_operator import node, world

__all__ = ["node", "world"]  # fixtures


def warned(world: World, words: str) -> bool:
    return any(event["reason"] == "TokenRefused" and words in event["message"] for event in world.items("Event"))


def test_an_engine_with_a_key_becomes_ready_once_its_secret_is_named_and_there(world: World) -> None:
    world.node.api_key = "open"
    world.apply(manifest())
    words = "HTTP 401: it asks for an API key; name its Secret in spec.engine.apiKeySecret"
    eventually(lambda: warned(world, words), 60)
    eventually(lambda: words in world.condition("Ready")["message"], 20, "Ready says it, too")
    assert world.condition("Ready")["status"] == "False"

    keyed = manifest(engine={"image": "engine:1", "apiKeySecret": {"name": "keys", "key": "engine"}})
    world.apply(keyed)
    eventually(lambda: warned(world, "Secret keys has no key engine, which spec.engine.apiKeySecret names"), 60)
    data = {"engine": base64.b64encode(b"open\n").decode()}
    world.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "data": data})
    world.ready()
    (container,) = world.get("Deployment", "m")["spec"]["template"]["spec"]["containers"]
    (variable,) = (one for one in container["env"] if one["name"] == "VLLM_API_KEY")
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "engine"}
    assert "open" not in world.operator.log()
