"""Publishing a result: the request as an API server sees it, patience, and refusals."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sere_autotune.outcome import Ending, Outcome
from sere_autotune.publish import Access, Publisher, PublishError, Target
from sere_autotune.results import Finished
from sere_ext.errors import UsageError


class Server(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, dict[str, str], dict]] = []
        self.statuses: list[int] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        answer = json.dumps({"message": "told why"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


def publisher(server: Server) -> Publisher:
    return Publisher(
        Target.parse("configmap/models/qwen3-tuning"), Access(f"http://127.0.0.1:{server.server_port}", lambda: "secret")
    )


def test_a_chosen_policy_is_applied_with_profile_and_artefact(server: Server, tmp_path: Path) -> None:
    artefact = tmp_path / "similarity.safetensors"
    artefact.write_bytes(b"\x00matrices")
    outcome = Outcome(Ending.CHOSEN, "topk 2: 1.3x", {"completed": 8})
    rung = {"rung": 1, "describe": "topk 2", "verdict": "passed"}
    summary = {"spent": {"deviceHours": 0.1234}, "ladder": [rung]}
    publisher(server).finish(Finished(outcome, summary, {"kind": "SereProfile"}, artefact))
    path, headers, body = server.requests[0]
    assert path == "/api/v1/namespaces/models/configmaps/qwen3-tuning?fieldManager=sere-tuner&force=true"
    assert headers["Content-Type"] == "application/apply-patch+yaml"
    assert headers["Authorization"] == "Bearer secret"
    assert json.loads(body["data"]["outcome.json"]) == {
        "outcome": "Chosen", "message": "topk 2: 1.3x", "exitCode": 0, "trials": {"completed": 8},
        "deviceHours": "0.12", "candidates": [{"policy": "topk 2", "verdict": "passed"}],
    }  # fmt: skip
    assert json.loads(body["data"]["profile.json"]) == {"kind": "SereProfile"}
    assert base64.b64decode(body["binaryData"]["similarity.safetensors"]) == b"\x00matrices"


def test_a_failure_is_told_too(server: Server) -> None:
    publisher(server).failed("the engine keeps failing", 1)
    assert json.loads(server.requests[0][2]["data"]["outcome.json"])["outcome"] == "Failed"


def test_progress_is_best_effort_and_seldom(server: Server) -> None:
    server.statuses = [503]
    some = publisher(server)
    some.progress({"stage": "search"})
    some.progress({"stage": "search"})
    assert len(server.requests) == 1
    some.progress({"stage": "certify rung 1"})
    assert len(server.requests) == 2, "a stage may last for minutes without another word"


def test_an_overloaded_server_is_tried_again_and_a_refusal_is_not(server: Server) -> None:
    server.statuses = [503, 429, 200]
    publisher(server).failed("x", 1)
    assert len(server.requests) == 3
    server.statuses = [403]
    with pytest.raises(PublishError, match=r"refused for good configmap models/qwen3-tuning \(403\): told why") as refused:
        publisher(server).failed("x", 1)
    assert refused.value.exit_code == 6, "not an answer that was told: the Job may run it again"


def test_an_artefact_too_large_for_a_configmap_is_refused(server: Server, tmp_path: Path) -> None:
    artefact = tmp_path / "similarity.safetensors"
    artefact.write_bytes(b"\x00" * 1_000_001)
    with pytest.raises(PublishError, match="`sere similarity pack`"):
        publisher(server).finish(Finished(Outcome(Ending.CHOSEN, ""), {}, {}, artefact))


@pytest.mark.parametrize("text", ["configmap/a", "secret/a/b", "configmap//b", "a/b/c/d"])
def test_a_bad_target_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="configmap/<namespace>/<name>"):
        Target.parse(text)


def test_outside_a_pod_publishing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UsageError, match="works inside a pod"):
        Access.from_pod()
