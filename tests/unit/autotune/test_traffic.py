"""The demo's client counts every failure: a test that sees zero errors must not owe it to the client."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator

import pytest

from demo import kube
from demo.traffic import Traffic


class Engine(http.server.BaseHTTPRequestHandler):
    """Answers like vLLM; each third request fails in one of three ways."""

    served = 0
    bad = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        cls = type(self)
        cls.served += 1
        if cls.served % 3:
            return self._say(200, {"usage": {"completion_tokens": 2}})
        cls.bad += 1
        if cls.bad % 3 == 0:
            self.close_connection = True  # cut off without an answer
        elif cls.bad % 3 == 1:
            self._say(500, {})
        else:
            self._say(200, {"usage": {"completion_tokens": 0}})
        return None

    def _say(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Engine)
    Engine.served = Engine.bad = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_every_kind_of_failure_counts(address: str) -> None:
    with Traffic(address, "m", ["a", "b"], concurrency=2) as client:
        until = time.monotonic() + 20
        while Engine.bad < 6 and time.monotonic() < until:
            time.sleep(0.01)
    assert client.requests == Engine.served > 0
    assert client.errors == Engine.bad >= 6
    assert len(client.causes) == 5


def test_nobody_there_is_an_error() -> None:
    with Traffic("http://127.0.0.1:9", "m", ["a"], concurrency=1) as client:
        until = time.monotonic() + 20
        while not client.requests and time.monotonic() < until:
            time.sleep(0.01)
    assert client.errors == client.requests > 0


def test_a_condition_of_an_older_generation_does_not_count() -> None:
    ready = {"type": "Ready", "status": "True", "observedGeneration": 1}
    resource = {"metadata": {"generation": 2}, "status": {"conditions": [ready]}}
    assert kube.condition(resource, "Ready") == {}
    assert kube.condition({**resource, "metadata": {"generation": 1}}, "Ready") == ready
    assert kube.condition(None, "Ready") == {}


def test_small_engine_keeps_what_the_spec_says() -> None:
    spec = {"engine": {"env": [{"name": "OMP_NUM_THREADS", "value": "2"}], "maxModelLen": 8}, "replicas": 3}
    made = kube.small_engine(spec)
    values = {one["name"]: one["value"] for one in made["engine"]["env"]}
    assert values["OMP_NUM_THREADS"] == "2"
    assert values["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert made["engine"]["maxModelLen"] == 8
    assert made["replicas"] == 3
    assert made["resources"]["requests"]["cpu"], "without a request two engines would starve"
    assert kube.small_engine({**spec, "resources": {"limits": {"cpu": 1}}})["resources"] == {"limits": {"cpu": 1}}
    assert spec["engine"]["env"] == [{"name": "OMP_NUM_THREADS", "value": "2"}], "the caller's own was changed"


def test_waiting_says_what_never_came() -> None:
    def never() -> bool:
        raise AssertionError("still 1 of 2")

    with pytest.raises(TimeoutError, match="both pods did not happen within 0 s") as caught:
        kube.wait_for("both pods", never, 0.05, every_s=0.01)
    assert "still 1 of 2" in str(caught.value.__cause__)
