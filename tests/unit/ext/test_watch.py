"""The declarative source: what a directory asks for, and that nothing wrong in it changes what is in force."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sere_ext.contract.policy import Policy
from sere_ext.contract.profile import ProfileKey
from sere_ext.contract.shards import split
from sere_ext.contract.similarity import SimilarityMeta
from sere_ext.contract.slo import LatencyLimits, LatencySlo
from sere_ext.contract.state import Readiness
from sere_ext.contract.volume import desired, piece_name, policy_files
from sere_ext.control.live import LiveControl
from sere_ext.control.watch import Watcher, read_directory
from sere_ext.similarity.file import write_similarity

TOPK = Policy.parse({"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 2}]})
SERE = Policy.parse({"buckets": [{"minTokens": 8, "kind": "sere", "S": 2}], "similarityDigest": "sha256:" + "ab" * 32})
KEY = ProfileKey(model_name="m", config_digest="sha256:0", engine_version="0.32.0", plugin_version="0.1.0", device="cpu")
SIMILARITY_FILE = "similarity-abababababab.safetensors"


def files(*policies: Policy, key: ProfileKey | None = None, **words: str) -> dict[str, bytes]:
    texts = {name.replace("_", "."): word for name, word in words.items()}
    for policy in policies:
        texts |= policy_files(policy, key)
    return {name: text.encode() for name, text in texts.items()}


def test_an_annotation_decides_before_stable_and_an_override_before_both() -> None:
    both = files(TOPK, stable="exact", pod_policy=TOPK.digest + "\n")
    assert desired(both, KEY).policy == TOPK
    assert desired(files(TOPK, stable=TOPK.digest, pod_policy=""), KEY).policy == TOPK
    for name in ("pod.override", "override"):
        answer = desired(both | {name: b"exact"}, KEY)
        assert answer.policy is not None
        assert (answer.policy.digest, answer.override) == ("exact", True)


def test_exact_needs_no_file() -> None:
    answer = desired({"stable": b"exact\n"}, KEY)
    assert answer.policy is not None
    assert (answer.policy.digest, answer.error) == ("exact", None)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "neither pod.policy nor stable"),
        ({"stable": b"sere-00000000"}, "there is no sere-00000000.json"),
        ({"stable": b"sere-00000000", "sere-00000000.json": b"{"}, "sere-00000000.json: policy:"),
        ({"stable": b"exact", "override": b"off"}, "override is 'off'"),
        (
            {"stable": b"sere-00000000", "sere-00000000.json": json.dumps(TOPK.to_json_dict()).encode()},
            f"holds policy {TOPK.digest}",
        ),
        (files(SERE, stable=SERE.digest), SIMILARITY_FILE),
    ],
)
def test_anything_missing_or_damaged_keeps_what_is_in_force_and_says_so(given: dict[str, bytes], says: str) -> None:
    answer = desired(given, KEY)
    assert answer.policy is None
    assert answer.error is not None
    assert says in answer.error


def test_a_policy_tuned_on_another_engine_means_exact_and_policy_stale() -> None:
    other = KEY.model_copy(update={"engine_version": "0.31.0"})
    answer = desired(files(TOPK, key=other, stable=TOPK.digest), KEY)
    assert answer.policy is not None
    assert answer.policy.digest == "exact"
    assert answer.error == (
        "PolicyStale: profile was made for engine 0.31.0, this pod runs 0.32.0; serving exact routing until the next tuning"
    )
    assert desired(files(TOPK, key=KEY, stable=TOPK.digest), KEY).policy == TOPK


def test_similarity_is_found_by_its_digest() -> None:
    assert desired(files(SERE, stable=SERE.digest) | {SIMILARITY_FILE: b""}, KEY).similarity == SIMILARITY_FILE


def project(volume: Path, content: dict[str, bytes], version: str) -> None:
    """Write as the kubelet does: a new directory, then one rename of the `..data` link."""
    fresh = volume / f"..{version}"
    fresh.mkdir(parents=True)
    for name, text in content.items():
        (fresh / name).write_bytes(text)
    link = volume / "..tmp"
    link.symlink_to(fresh.name)
    link.rename(volume / "..data")
    for name in content:
        if not (volume / name).is_symlink():
            (volume / name).symlink_to(f"..data/{name}")


def test_a_directory_is_read_as_one_version(tmp_path: Path) -> None:
    project(tmp_path, files(TOPK, stable=TOPK.digest), "1")
    assert read_directory(tmp_path)["stable"].decode() == TOPK.digest
    project(tmp_path, {"stable": b"exact"}, "2")
    assert read_directory(tmp_path) == {"stable": b"exact"}, "files of the older version must not be seen"
    assert read_directory(tmp_path / "missing") == {}


class Worker:
    """An engine of one rank that keeps a policy; refuses while `refusing`."""

    def __init__(self) -> None:
        self.policy = Policy()
        self.generation = 0
        self.note: dict[str, Any] = {}
        self.refusing = False
        self.applied: list[tuple[str, str | None]] = []
        self.offered: dict[str, bytes] = {}  # similarity files by digest, as they were handed over

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        replaced = self.policy.digest
        if method in ("sere_check", "sere_apply") and self.refusing:
            return [{"refused": {"type": "SimilarityError", "message": "the file is truncated"}}]
        if method == "sere_check":
            there = args[2] is None or args[2] in self.offered
            return [(Readiness.READY if there else Readiness.LACKS_FILE).answer()]
        if method == "sere_offer":
            self.offered[args[0]] = args[1]
            return [None]  # type: ignore[list-item]
        if method == "sere_note":
            self.note |= args[0]
        if method == "sere_apply":
            self.policy, self.generation, self.note = Policy.parse(args[0]), self.generation + 1, args[3]
            self.applied.append((self.policy.digest, args[2]))
        return [
            {
                "rank": 0, "policy": self.policy.to_json_dict(), "policyDigest": self.policy.digest, "similarityDigest": None,
                "generation": self.generation, "switches": 0, "error": None, "note": self.note, "replaced": replaced, "key": KEY.to_json_dict(),
                "model": {"numExperts": 4, "topK": 2, "moeLayers": [0]}, "counters": [],
            }
        ]  # fmt: skip


async def test_the_watcher_follows_the_volume_and_ready_waits_for_the_first_application(tmp_path: Path) -> None:
    worker = Worker()
    control = LiveControl(worker, None, str(tmp_path))
    watcher = Watcher(control, tmp_path)
    await watcher.once()
    state = await control.state()
    assert (state.ready, state.source) == (False, "file")
    assert "neither pod.policy nor stable" in state.error

    project(tmp_path, files(TOPK, stable=TOPK.digest), "1")
    await watcher.once()
    state = await control.state()
    assert (state.ready, state.policy_digest, state.error) == (True, TOPK.digest, None)

    project(tmp_path, files(TOPK, stable=TOPK.digest, pod_policy="sere-00000000"), "2")
    await watcher.once()
    state = await control.state()
    assert state.policy_digest == TOPK.digest, "a missing digest keeps the policy in force"
    assert "sere-00000000" in state.error

    project(tmp_path, files(TOPK, stable=TOPK.digest, pod_override="exact"), "3")
    await watcher.once()
    state = await control.state()
    assert (state.policy_digest, state.override, state.error) == ("exact", True, None)
    other_server = LiveControl(worker, None, str(tmp_path))  # of several; it runs no watcher
    assert not other_server.ready
    state = await other_server.state()
    assert (state.ready, state.override, other_server.ready) == (True, True, True)
    count = len(worker.applied)
    await watcher.once()
    assert len(worker.applied) == count, "nothing changed, so nothing is applied"


async def test_the_slo_is_followed_and_a_damaged_one_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    control = LiveControl(Worker(), None, str(tmp_path))
    watcher = Watcher(control, tmp_path)
    limits = [LatencySlo(tpot_ms=LatencyLimits(p95=ms)) for ms in (20, 30)]
    for version, slo in enumerate(limits):
        project(tmp_path, files(TOPK, stable=TOPK.digest, slo=slo.to_json()), str(version))
        await watcher.once()
        assert control.slo == slo
    for damaged in ("{", '{"tpotMs": {"p95": "fast"}}'):
        project(tmp_path, files(TOPK, stable=TOPK.digest, slo=damaged), f"d{len(damaged)}")
        await watcher.once()
        await watcher.once()
        assert control.slo == limits[1]
    assert [record.getMessage().count("keep their bounds") for record in caplog.records] == [1, 1]
    project(tmp_path, files(TOPK, stable=TOPK.digest), "none")
    await watcher.once()
    assert control.slo is None


async def test_the_directory_is_audited_as_http_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vllm.sere")
    worker = Worker()
    watcher = Watcher(LiveControl(worker, None, str(tmp_path)), tmp_path)
    for version, words in enumerate(({"pod_policy": ""}, {"override": "exact"})):
        project(tmp_path, files(TOPK, stable=TOPK.digest, **words), str(version))
        await watcher.once()
    worker.refusing = True
    project(tmp_path, files(TOPK, stable="exact", pod_policy=TOPK.digest), "3")
    for _ in range(3):
        watcher._retry_at = 0.0
        await watcher.once()
    found = [json.loads(r.getMessage()[12:]) for r in caplog.records if r.getMessage().startswith("sere audit: ")]
    assert [(line["outcome"], line["source"], line["who"], line.get("from"), line["to"]) for line in found] == [
        ("applied", "file", f"{tmp_path}/stable", "exact", TOPK.digest),
        ("applied", "file", f"{tmp_path}/override", TOPK.digest, "exact"),
        ("refused", "file", f"{tmp_path}/pod.policy", None, TOPK.digest),
    ], "a wish that is refused again and again is audited once"


HOUR = 3600.0


class Clock:
    """The running loop's clock, which a test can put forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        loop = asyncio.get_running_loop()
        real = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + self.ahead)


async def test_what_the_engine_refuses_is_said_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sere_ext.control.watch.RETRY_SECONDS", HOUR)
    clock = Clock(monkeypatch)
    worker = Worker()
    control = LiveControl(worker, None, str(tmp_path))
    watcher = Watcher(control, tmp_path)
    project(tmp_path, files(SERE, stable=SERE.digest) | {SIMILARITY_FILE: CONTENT}, "1")
    worker.refusing = True
    await watcher.once()
    assert (await control.state()).error == "the file is truncated"
    worker.refusing = False
    await watcher.once()
    assert worker.applied == [], "not before the pause is over"
    clock.ahead = HOUR
    await watcher.once()
    state = await control.state()
    assert (state.policy_digest, state.error, state.ready) == (SERE.digest, None, True)
    assert worker.applied == [(SERE.digest, CONTENT_DIGEST)]


def artefact() -> tuple[bytes, str]:
    """A similarity file of 32 experts, and its digest."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SIMILARITY_FILE
        meta = SimilarityMeta(
            model_type="m", model_name="m", config_digest="c", data_digest="d", tokens=1, layers=(0,), num_experts=32
        )
        written = write_similarity(path, meta, {0: np.eye(32, dtype=np.float32)})
        return path.read_bytes(), written.digest


CONTENT, CONTENT_DIGEST = artefact()
SHARDS = {piece_name(SIMILARITY_FILE, i, 4): shard for i, shard in enumerate(split(CONTENT, 2000), 1)}


async def test_an_artefact_in_shards_is_joined_once_all_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An incomplete artefact is no error, since a canary that names an error is given up.

    Each shard is a ConfigMap of its own, which the kubelet may see later than the policy.
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    worker, volume = Worker(), tmp_path / "volume"
    control = LiveControl(worker, None, str(volume))
    watcher = Watcher(control, volume)
    project(volume, files(TOPK, stable=TOPK.digest, pod_policy=SERE.digest), "0")
    await watcher.once()
    assert "there is no" in (await control.state()).error
    for there in range(4):
        parts = dict(list(SHARDS.items())[:there])
        project(volume, files(TOPK, SERE, stable=TOPK.digest, pod_policy=SERE.digest) | parts, f"{there + 1}")
        await watcher.once()
        state = await control.state()
        assert (state.error, state.policy_digest, worker.applied) == (None, "exact", [])
    project(volume, files(TOPK, SERE, stable=TOPK.digest, pod_policy=SERE.digest) | SHARDS, "5")
    await watcher.once()
    state = await control.state()
    assert (state.error, state.policy_digest) == (None, SERE.digest)
    assert worker.offered == {CONTENT_DIGEST: CONTENT}, "the bytes, since another node's workers cannot read a path of this one"
    assert list(scratch.iterdir()) == [], "it is read by now"
    await watcher.once()
    assert len(worker.applied) == 1


async def test_what_never_arrives_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sere_ext.control.watch.PATIENCE_SECONDS", HOUR)
    clock = Clock(monkeypatch)
    control = LiveControl(Worker(), None, str(tmp_path))
    watcher = Watcher(control, tmp_path)
    project(tmp_path, files(SERE, stable=SERE.digest), "1")
    await watcher.once()
    assert (await control.state()).error is None
    clock.ahead = HOUR
    await watcher.once()
    assert f"needs {SIMILARITY_FILE}, which is missing" in (await control.state()).error
    project(tmp_path, files(SERE, stable=SERE.digest) | dict(list(SHARDS.items())[1:]), "2")
    await watcher.once()
    assert "of which 3 of 4 shards are there" in (await control.state()).error
    project(tmp_path, files(SERE, stable=SERE.digest) | SHARDS, "3")
    await watcher.once()
    state = await control.state()
    assert (state.error, state.policy_digest) == (None, SERE.digest)


async def test_shards_that_do_not_make_the_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sere_ext.control.watch.RETRY_SECONDS", 0.0)
    worker = Worker()
    control = LiveControl(worker, None, str(tmp_path))
    watcher = Watcher(control, tmp_path)
    torn = {name: shard[:-1] for name, shard in SHARDS.items()}
    project(tmp_path, files(SERE, stable=SERE.digest) | torn, "1")
    await watcher.once()
    assert "shard 1 of 4 is damaged" in (await control.state()).error
    assert control.refusals == {("file", "SimilarityError"): 1}
    project(tmp_path, files(SERE, stable=SERE.digest) | SHARDS, "2")
    await watcher.once()
    assert (await control.state()).policy_digest == SERE.digest
    assert worker.offered == {CONTENT_DIGEST: CONTENT}
