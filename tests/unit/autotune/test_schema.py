"""What a study keeps beside its trials: every key has a type, and what is read is what was written."""

from pathlib import Path

from sere_autotune.study import schema
from sere_autotune.study.schema import Key
from sere_autotune.study.study import TuningStudy
from tests.kit.planted import PlantedEngine, run, spec_for, write_items


def test_all_that_a_whole_run_stores_is_read_again_as_its_record(tmp_path: Path) -> None:
    spec = spec_for(tmp_path / "out", write_items(tmp_path / "items.jsonl", 6000), certify__mostLoad=True)
    finished = run(spec, PlantedEngine())
    fixed = {key.name: key for key in vars(schema).values() if isinstance(key, Key)}
    study = TuningStudy(tmp_path / "out", None)
    for name, stored in study.study.user_attrs.items():
        family, *numbers = name.split(".")
        key = fixed.get(name) or {
            "exactAnswers": schema.exact_answers_key,
            "block": schema.block_key,
            "loadBlock": schema.load_block_key,
            "verdict": schema.verdict_key,
            "counts": schema.counts_key,
        }[family](*[int(n) if n.isdigit() else n for n in numbers])
        assert key.name == name
        assert key.encode(key.decode(stored)) == stored, name
    ladder, verdict = study.get(schema.LADDER), study.get(schema.verdict_key(0))
    study.close()
    assert ladder is not None and verdict is not None
    assert ladder[0].to_dict().items() <= finished.summary["ladder"][0].items()
    assert verdict.to_dict() == finished.summary["ladder"][0]["result"]
