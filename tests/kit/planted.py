"""A planted engine for the tuner's pure logic: known drops, discordance and speeds instead of a model.

Run as a program it tunes in a folder (and can be killed): `python -m tests.kit.planted OUT ITEMS.jsonl TRIALS SECONDS_PER_BLOCK
[HANG_AT]`; the block that is number HANG_AT of all runs in the folder never ends.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sere_autotune.trial.engine import BlockReport, EngineFacts, Reject
from sere_autotune.trial.load import Block, Load, Request, Sent
from sere_autotune.trial.stats import DropRejector
from sere_autotune.trial.wave import Wave
from sere_ext.contract.errors import EngineCrashError
from sere_ext.contract.policy import EXACT_POLICY, Kind, Policy

KEY = {
    "modelName": "planted", "configDigest": "sha256:0", "engineVersion": "0", "pluginVersion": "0", "device": "cpu",
    "tensorParallelSize": 1,
}  # fmt: skip


def write_items(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"item {i}", "answer": str(i)}) + "\n" for i in range(count)))
    return path


def write_model(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "model.safetensors"):  # that they are there is looked at; only an engine would read them
        (path / name).write_text("{}")
    (path / "config.json").write_text(
        json.dumps({"model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 8})
    )
    return path


def truth(policy: Policy) -> tuple[float, float, float]:
    """(share of items lost, share gained, speed-up) of a one-bucket policy."""
    if not policy.buckets:
        return 0.0, 0.0, 1.0
    bucket = policy.buckets[0]
    assert bucket.S is not None
    excess = {Kind.SERE: 0.08, Kind.TOPK: 0.2, Kind.OEA: 0.1}[bucket.kind] * 0.2 ** (bucket.S - 1) * 0.1**bucket.rho
    gain = {Kind.SERE: 0.5, Kind.TOPK: 0.55, Kind.OEA: 0.45}[bucket.kind] * 0.55 ** (bucket.S - 1) * 0.5**bucket.rho
    gain *= 1 + 0.5 * (bucket.min_share or 0.0)
    return excess * 0.85, excess * 0.15, 2.718281828**gain


class PlantedEngine:
    """Answers at once (or after `wait_s` per block); 80 % of items are right under exact routing."""

    def __init__(
        self, wait_s: float = 0.0, crashes: Sequence[Kind] = (), tpot_ms: float = 20.0, log: Path | None = None,
        experts_share: float = 0.7, crowding: float = 0.0, most_requests: int = 0, hang_at: int = 0,
    ) -> None:  # fmt: skip
        self.hang_at = hang_at  # number of the block in the log that never ends
        self.wait_s, self.crashes, self.tpot_ms, self.log = wait_s, tuple(crashes), tpot_ms, log
        self.experts_share = experts_share  # of an exact decode step at 16 requests; what a wave shows
        self.crowding = crowding  # power of the load, over 16 requests at a time or 20 requests/s, that TPOT goes with
        self.most_requests = most_requests
        self.waves = 0
        self.start_seconds = 0.01
        self.policy = EXACT_POLICY
        self.blocks = 0
        self.cut: list[float] = []

    def limit(self, left_s: Callable[[], float]) -> None:
        pass

    def record(self) -> None:
        pass

    def recorded(self) -> None:
        return None

    def start(self) -> EngineFacts:
        return EngineFacts(key=KEY, top_k=4, most_requests=self.most_requests)

    def apply(self, policy: Policy) -> None:
        self.policy = policy

    def stop(self) -> None:
        pass

    def wave(self, requests: Sequence[Request], tokens: int, bucket: str) -> Wave:
        """A step pays for its active experts alone, of 16."""
        if any(b.kind in self.crashes for b in self.policy.buckets):
            raise EngineCrashError("planted")
        kept, batch = self.policy.buckets[0].S, len(requests)
        assert kept is not None
        active = [16 * (1 - (15 / 16) ** slots) for slots in (batch * kept, 16 * 4)]
        self.waves += 1
        noise = random.Random(f"wave {self.waves}").lognormvariate(0, 0.003)
        step_s = self.tpot_ms / 1e3 * (1 - self.experts_share + self.experts_share * active[0] / active[1]) * noise
        return Wave(10.0, 0.05, step_s, active[0], float(kept))

    def right(self, prompt: str, lost: float, gained: float) -> bool:
        u = int(hashlib.sha256(f"u {prompt}".encode()).hexdigest()[:8], 16) / 2**32
        v = int(hashlib.sha256((prompt + self.policy.digest).encode()).hexdigest()[:8], 16) / 2**32
        return v >= lost / 0.8 if u < 0.8 else v < gained / 0.2

    def block(self, requests: Sequence[Request], load: Load, fillers: Sequence[Request] = (), deadline_s: float | None = None,
              reject: Reject | None = None, expected_s: float | None = None) -> BlockReport:  # fmt: skip
        if any(b.kind in self.crashes for b in self.policy.buckets):
            raise EngineCrashError("planted")
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(self.policy.digest + "\n")
            if self.hang_at and len(self.log.read_text().splitlines()) == self.hang_at:
                time.sleep(3600)
        time.sleep(self.wait_s)
        self.blocks += 1
        self.cut.append(deadline_s or 0.0)
        lost, gained, speed = truth(self.policy)
        noise = random.Random(f"{self.blocks}")
        crowd = (load.concurrency / 16 if load.concurrency else load.rate / 20) ** self.crowding
        rejector = DropRejector(reject.limit, reject.alpha) if reject else None
        sent, stopped = [], None
        for index, request in enumerate(requests):
            assert request.item is not None
            right = self.right(request.prompt, lost, gained)
            tpot = self.tpot_ms * crowd / speed * noise.lognormvariate(0, 0.05)
            sent.append(Sent(request.item.digest, right, request.item.answer if right else "no", 16, 50.0, 50.0 + 15 * tpot,
                             index * 0.01, index * 0.01 + 0.3))  # fmt: skip
            exact = reject.exact.get(request.item.digest) if reject else None
            if rejector is not None and exact is not None and rejector.update(exact.correct, right):
                stopped = f"accuracy: rejected after {rejector.items} items"
                break
        return BlockReport(Block(sent, len(sent) * 0.01, 0.3, 15.0, stopped), 12.0, 12.0 / speed, 1.0)


class Quiet:
    """A reporter that keeps every message instead of printing it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.steps: list[str] = []

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self.steps.append(name)

    def trial(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def step(self, text: str, left_s: float) -> None:
        self.steps.append(text)


def spec_for(out: Path, items: Path, **changes: Any) -> Any:
    from sere_autotune.tuning.file import load_spec

    values: dict[tuple[str, ...], Any] = {
        ("model",): str(write_model(items.parent / "model")), ("accuracy", "tasks"): str(items), ("out",): str(out),
        ("slo", "tpotMs", "p95"): 40, ("search", "policies"): ["topk", "oea"], ("search", "trials"): 6,
        ("certify", "pairs"): 3, ("certify", "blockSeconds"): 1, ("search", "deviceHours"): 1,
        ("certify", "mostLoad"): False,
    }  # fmt: skip
    values |= {tuple(key.split("__")): value for key, value in changes.items()}
    return load_spec(None, values)


def run(spec: Any, engine: PlantedEngine, report: Any = None, **options: Any) -> Any:
    from sere_autotune import prepare, tuner

    def make(given: Any, similarity: str | None, on_start: Any) -> PlantedEngine:
        on_start(True)
        return engine

    return tuner.tune(prepare.prepare(spec), make, report or Quiet(), **options)


if __name__ == "__main__":
    given_out, given_items, given_trials, given_wait, *given_hang = sys.argv[1:6]
    given = spec_for(Path(given_out), Path(given_items), search__trials=int(given_trials))
    finished = run(given, PlantedEngine(float(given_wait), log=Path(given_out).parent / "calls.log", hang_at=int(*given_hang)))
    print(finished.outcome.ending.value)
