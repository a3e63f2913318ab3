"""Publishing a result: the request as an API server sees it, patience, and refusals."""

from __future__ import annotations

import http.server
import json
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path

import kubernetes_validate
import pytest

from sere_autotune.outcome import Ending, Outcome
from sere_autotune.result.publish import Access, Publisher, Target
from sere_autotune.result.results import Finished
from sere_autotune.study.ledger import Ledger
from sere_ext.contract.config_maps import places
from sere_ext.contract.errors import PublishError, UsageError
from sere_ext.contract.shards import join
from sere_ext.contract.volume import MAX_FILE_BYTES

OWNERS = [{"apiVersion": "v1", "kind": "K", "name": "run", "uid": "u", "controller": True, "blockOwnerDeletion": True}]


class Server(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, dict[str, str], dict]] = []
        self.statuses: list[int] = []
        self.data: dict[str, dict[str, str]] = {}
        self.meanwhile: Callable[[], object] | None = None  # done once, before the next write of openings


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if "resourceVersion" in body["metadata"] and self.server.meanwhile is not None:
            meanwhile, self.server.meanwhile, status = self.server.meanwhile, None, 409
            meanwhile()
        metadata = {**body["metadata"], "ownerReferences": OWNERS}
        kept = self.server.data.setdefault(body["metadata"]["name"], {})
        if status < 300:
            kept |= body.get("data", {})
        metadata["resourceVersion"] = "1"
        answer = json.dumps({"message": "told why", "metadata": metadata, "data": kept}).encode()
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
    content = bytes(range(256)) * 8000  # 2 MB
    artefact.write_bytes(content)
    outcome = Outcome(Ending.CHOSEN, "topk 2: 1.3x", {"completed": 8})
    rung = {"rung": 1, "describe": "topk 2", "verdict": "passed"}
    summary = {"spent": {"deviceHours": 0.1234}, "ladder": [rung]}
    profile = {"kind": "SereProfile", "spec": {"similarity": {"uri": "file:///run/x", "digest": "sha256:0"}}}
    some = publisher(server)
    some.progress({"stage": "report"})
    some.finish(Finished(outcome, summary, profile, artefact))
    path, headers, body = server.requests[-1]
    assert path == "/api/v1/namespaces/models/configmaps/qwen3-tuning?fieldManager=sere-tuner&force=true"
    assert headers["Content-Type"] == "application/apply-patch+yaml"
    assert headers["Authorization"] == "Bearer secret"
    assert json.loads(body["data"]["outcome.json"]) == {
        "outcome": "Chosen", "message": "topk 2: 1.3x", "exitCode": 0, "trials": {"completed": 8},
        "deviceHours": "0.12", "candidates": [{"policy": "topk 2", "verdict": "passed"}],
    }  # fmt: skip
    uri = "configmap://qwen3-tuning-1/shard-001-of-003"
    told = {"kind": "SereProfile", "spec": {"similarity": {"uri": uri, "digest": "sha256:0"}}}
    assert json.loads(body["data"]["profile.json"]) == told
    assert profile["spec"]["similarity"]["uri"] == "file:///run/x", "what lies in `out` names the file there"

    before = [request for _, _, request in server.requests[:-1]]
    assert all("profile.json" not in request.get("data", {}) for request in before), "the artefact is there before it is named"
    assert before[1]["data"] == before[0]["data"] == {"progress.json": '{"stage": "report"}'}
    held = {
        (request["metadata"]["name"], key): b64decode(text)
        for request in before
        for key, text in request.get("binaryData", {}).items()
    }
    assert join([held[place] for place in places("qwen3-tuning-1", "shard-001-of-003") or []]) == content
    owner = {"apiVersion": "v1", "kind": "K", "name": "run", "uid": "u", "controller": True}
    for request in before[2:]:
        assert request["metadata"]["ownerReferences"] == [owner], "goes with its run; to block its deletion needs more rights"
        kubernetes_validate.validate(request, "1.34", strict=True)
        assert sum(len(b64decode(text)) for text in request["binaryData"].values()) < 1 << 20


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


def test_an_artefact_too_large_for_pods_is_refused(server: Server, tmp_path: Path) -> None:
    artefact = tmp_path / "similarity.safetensors"
    artefact.write_bytes(b"\x00" * (MAX_FILE_BYTES + 1))
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


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"])
def test_a_proxy_of_the_environment_never_catches_the_api_server(
    server: Server, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """It is there for the weights; a result would be lost after all device hours."""
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    publisher(server).check()
    assert len(server.requests) == 1


def test_the_right_to_publish_is_tried_before_anything_is_spent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from sere_autotune import commands

    def spend(*_: object) -> int:
        raise AssertionError("the engine was started")

    monkeypatch.setattr(commands, "_run", spend)
    monkeypatch.setattr(Access, "from_pod", classmethod(lambda cls: publisher(server).access))
    server.statuses = [403]
    with pytest.raises(PublishError, match="refused for good"):
        commands._main(None, None, commands._Dry.NO, False, False, False, "configmap/models/qwen3-tuning")  # type: ignore[arg-type]
    assert json.loads(server.requests[0][2]["data"]["progress.json"])["stage"] == "starting"


@pytest.fixture
def pod(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Ledger]:
    """The ledger of a pod with an empty disk of its own, by the pod's name."""

    def made(name: str) -> Ledger:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / name))
        return Ledger("sha256:" + "ab" * 32, tmp_path / name / "out", publisher(server))

    return made


def test_opened_items_are_noted_in_the_namespace_and_read_back_by_the_next_pod(
    server: Server, pod: Callable[[str], Ledger]
) -> None:
    """Two pods, each with an empty disk of its own, and a study that is resumed on the second one."""
    items = [f"{i:016x}" for i in range(8000)]

    first, second = pod("first"), pod("second")
    assert first.openings(items, None) == 0
    assert first.open(items, "one") == 0
    assert second.openings(items, None) == 1
    assert second.openings(items, "one") == 0
    assert second.open(items[:10], "two") == 1
    assert pod("third").openings(items, None) == 2
    assert len(server.data["sere-openings"]["ab" * 8]) < 200_000, "8,000 items fit many times over"
    managers = {path.split("fieldManager=")[1] for path, *_ in server.requests}
    assert managers == {"sere-openings-reader&force=true", f"sere-openings-{'ab' * 8}&force=true"}
    server.statuses += [200, 403]
    with pytest.raises(PublishError):
        first.open(items, "three")
    assert pod("fourth").openings(items, None) == 2, "what cannot be noted is not opened"


def test_who_opens_items_at_the_same_time_counts_the_one_that_was_quicker(server: Server, pod: Callable[[str], Ledger]) -> None:
    items = [f"{i:016x}" for i in range(10)]

    slow, quick = pod("slow"), pod("quick")
    counted: list[int] = []
    server.meanwhile = lambda: counted.append(quick.open(items, "quick"))
    assert slow.open(items, "slow") == 1
    assert counted == [0]
    assert pod("third").openings(items, None) == 2, "nobody's opening was written over"


def test_openings_that_do_not_fit_are_one_sentence_and_open_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    ledger = Ledger("sha256:" + "ab" * 32, tmp_path / "out", publisher(server))
    server.statuses = [200, 422]
    with pytest.raises(PublishError, match=r"has no room for 1 of model abababababababab: .*delete the key of a model"):
        ledger.open(["0" * 16], "one")
    assert ledger.openings(["0" * 16], None) == 0
