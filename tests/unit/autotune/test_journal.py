"""The study's file after a power loss and on a full disk: it opens, and nothing that was finished is lost."""

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sere_autotune.study.journal import cut_torn_line
from sere_autotune.study.study import JOURNAL, TuningStudy
from sere_ext.contract.errors import UsageError
from tests.kit import ROOT
from tests.kit.planted import PlantedEngine, run, spec_for, write_items

ROOM = 64 * 1024


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b"{}\n", b"{}\n"),
        (b'{}\n{"a', b"{}\n"),
        (b'{"a', b""),
        (b"{}\n" + b"x" * 200_000, b"{}\n"),
        (b"x" * 70_000 + b"\n" + b"y", b"x" * 70_000 + b"\n"),
    ],
)
def test_what_follows_the_last_newline_is_cut(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(before)
    cut_torn_line(path)
    assert path.read_bytes() == after


def test_a_journal_torn_by_a_power_loss_opens_with_every_finished_trial(tmp_path: Path) -> None:
    spec = spec_for(tmp_path / "out", write_items(tmp_path / "items.jsonl", 3000), accuracy__maxDropPoints=5, search__trials=4)

    class Lost(PlantedEngine):
        def block(self, *args: object, **kwargs: object) -> object:
            if self.blocks >= 7:
                raise KeyboardInterrupt
            return super().block(*args, **kwargs)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        run(spec, Lost())
    journal = tmp_path / "out" / JOURNAL
    study = TuningStudy(tmp_path / "out", None)
    finished = [trial.value for trial in study.complete()]
    study.close()
    assert finished
    with journal.open("ab") as file:
        file.write(b'{"op_code":8,"worker_id":"abc","trial_id":1,"user_')
    again = run(spec, PlantedEngine())
    assert [trial["tpotMs"] for trial in again.summary["trials"]][: len(finished)] == finished
    assert again.outcome.ending.value == "Chosen"


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM // 3, ROOM // 3))  # of one file


@contextlib.contextmanager
def _no_limit(folder: Path) -> Iterator[Callable[[], None]]:
    yield lambda: None


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Callable[[], None]]:
    """A disk of 64 KiB at `folder`; the function that is yielded makes room on it."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("disk", "limit"), [(_small_disk, None), (_no_limit, _small_files)], ids=["a disk of 64 KiB", "a quota"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path,
    disk: Callable[[Path], contextlib.AbstractContextManager[Callable[[], None]]],
    limit: Callable[[], None] | None,
) -> None:
    items = write_items(tmp_path / "items.jsonl", 3000)
    folder = tmp_path / "disk"
    folder.mkdir()
    command = [sys.executable, "-m", "tests.kit.planted", str(folder / "out"), str(items), "6", "0"]
    with disk(folder) as make_room:
        full = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit, cwd=ROOT)
        assert full.returncode == 1
        last = full.stderr.strip().splitlines()[-1]
        assert f"cannot write to {folder / 'out'}: " in last
        assert last.endswith("make room there and run the same command again, which goes on from here")
        assert "JSONDecodeError" not in full.stderr
        make_room()
        study = TuningStudy(folder / "out", None)
        finished = [trial.number for trial in study.complete()]
        study.close()
        again = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert again.returncode == 0, again.stderr
        study = TuningStudy(folder / "out", None)
        assert [trial.number for trial in study.complete()][: len(finished)] == finished
        assert len(study.complete()) == 6
        study.close()


def test_a_folder_that_cannot_be_one_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tuning.yaml").write_text("")
    with pytest.raises(UsageError, match="cannot be used as the study's folder"):
        TuningStudy(tmp_path / "tuning.yaml", None)
