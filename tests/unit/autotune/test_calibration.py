"""The similarity artefact of a run whose result is published: packed before it is measured, refused where it is too large."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sere_autotune import calibration, commands
from sere_autotune.calibration import Origin, make_publishable
from sere_autotune.prepare import read_config
from sere_autotune.tuning.file import to_yaml
from sere_ext.contract.errors import UsageError
from sere_ext.contract.model_config import model_config_digest
from sere_ext.contract.profile import Profile
from sere_ext.contract.similarity import SimilarityMeta, read_meta, verified_digest
from sere_ext.similarity.file import packed_meta, read_similarity, write_similarity
from tests.kit.matrices import symmetric
from tests.kit.planted import PlantedEngine, run, spec_for, write_items

EXPERTS = 32
PLAIN_BYTES = 4 * EXPERTS * EXPERTS


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    matrix = symmetric(np.random.default_rng(0).random((EXPERTS, EXPERTS)).astype(np.float32))
    meta = SimilarityMeta(
        model_type="m",
        model_name="tiny",
        config_digest="sha256:0",
        data_digest="sha256:1",
        tokens=7,
        layers=(4,),
        num_experts=EXPERTS,
    )
    write_similarity(tmp_path / "similarity.safetensors", meta, {4: matrix})
    return tmp_path / "similarity.safetensors"


@pytest.mark.parametrize("origin", [Origin.CALIBRATED, Origin.EARLIER], ids=["made now", "killed before it was packed"])
def test_an_artefact_of_the_runs_own_is_packed_once(artefact: Path, origin: Origin) -> None:
    make_publishable(artefact, origin, PLAIN_BYTES)
    packed = read_similarity(artefact).meta
    assert packed.packing is not None
    assert verified_digest(artefact.read_bytes()) == packed.digest, "as the operator checks it"
    make_publishable(artefact, Origin.EARLIER, PLAIN_BYTES)
    assert read_meta(artefact).digest == packed.digest


def test_an_artefact_that_was_measured_is_not_packed_under_the_study(artefact: Path) -> None:
    before = artefact.read_bytes()
    make_publishable(artefact, Origin.EARLIER, len(before), settled=read_meta(artefact).digest)
    assert artefact.read_bytes() == before
    with pytest.raises(UsageError, match="fit into the published result"):
        make_publishable(artefact, Origin.EARLIER, len(before) - 1, settled=read_meta(artefact).digest)


def test_a_given_artefact_stays_as_it_is(artefact: Path) -> None:
    before = artefact.read_bytes()
    make_publishable(artefact, Origin.GIVEN, len(before))
    assert artefact.read_bytes() == before
    with pytest.raises(UsageError, match="`sere similarity pack` made"):
        make_publishable(artefact, Origin.GIVEN, len(before) - 1)
    plain = read_similarity(artefact)
    write_similarity(artefact, packed_meta(plain), plain.matrices)
    with pytest.raises(UsageError, match="though packed"):
        make_publishable(artefact, Origin.GIVEN, 100)


def test_too_large_is_refused_before_an_engine_starts(artefact: Path, tmp_path: Path) -> None:
    write_items(tmp_path / "items.jsonl", 2000)
    spec = spec_for(tmp_path / "out", tmp_path / "items.jsonl")
    plain = read_similarity(artefact)
    meta = plain.meta.model_copy(update={"config_digest": model_config_digest(read_config(spec))})
    write_similarity(artefact, meta, plain.matrices)
    engine = PlantedEngine()
    with pytest.raises(UsageError, match="fit into the published result"):
        run(spec.model_copy(update={"similarity": str(artefact)}), engine, artefact_limit=1000)
    assert engine.blocks == 0


class Stopping(PlantedEngine):
    """Ends in the middle of the certification."""

    def block(self, *args: Any, **kwargs: Any) -> Any:
        if self.blocks >= 7:  # the length of answers, exact twice, one trial with exact beside it, and two of the certificate's
            raise KeyboardInterrupt
        return super().block(*args, **kwargs)


def test_what_is_published_is_what_was_certified_also_where_only_the_second_start_publishes(
    artefact: Path, tmp_path: Path
) -> None:
    write_items(tmp_path / "items.jsonl", 6000)
    spec = spec_for(tmp_path / "out", tmp_path / "items.jsonl", search__policies=["sere"], search__trials=2, search__rungs=1)
    plain = read_similarity(artefact)
    meta = plain.meta.model_copy(update={"config_digest": model_config_digest(read_config(spec))})
    own = tmp_path / "out" / "similarity.safetensors"
    own.parent.mkdir()
    measured = write_similarity(own, meta, plain.matrices).digest
    with pytest.raises(KeyboardInterrupt):
        run(spec, Stopping())

    other = write_similarity(own, meta.model_copy(update={"tokens": 8}), plain.matrices)
    assert other.digest != measured
    engine = PlantedEngine()
    with pytest.raises(UsageError, match=r"is not the one that .* was measured with .*--fresh"):
        run(spec, engine)
    assert engine.blocks == 0

    write_similarity(own, meta, plain.matrices)
    finished = run(spec, PlantedEngine(), artefact_limit=10**6)
    profile = Profile.read(tmp_path / "out" / "profile.json").spec
    assert finished.similarity is not None and profile.similarity is not None
    assert read_meta(finished.similarity).digest == profile.similarity.digest == profile.policy.similarity_digest == measured
    write_similarity(own, meta.model_copy(update={"tokens": 8}), plain.matrices)
    with pytest.raises(UsageError, match="was measured with"):  # a finished study is told again, with its own artefact alone
        run(spec, PlantedEngine(), artefact_limit=10**6)


def test_trust_in_the_models_code_is_handed_to_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the option of `sere tune` and by the engine's own argument; and nothing is read from standard input."""
    spec = spec_for(tmp_path / "out", write_items(tmp_path / "items.jsonl", 60))
    (tmp_path / "out").mkdir()
    calls: list[tuple[list[str], Any]] = []

    def ran(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append((command, options["stdin"]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(calibration.subprocess, "run", ran)
    file = tmp_path / "tuning.yaml"
    file.write_text(to_yaml(spec))
    for trust, given in ((False, {}), (True, {}), (False, {"engine_extraargs": "[--trust_remote_code]"})):
        source = calibration.Source(Origin.CALIBRATED, tmp_path / "s.safetensors")
        calibration.provide(source, commands._read_spec(file, given, trust), [])
    assert ["--trust-remote-code" in command for command, _ in calls] == [False, True, True]
    assert {stdin for _, stdin in calls} == {subprocess.DEVNULL}
