"""`--help` at 80 columns: nothing is cut off, and every option says its type and what holds without it."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import sere_autotune.commands
import sere_ext.cli.commands
import sere_operator.cli.commands
from sere_autotune.tuning.options import REQUIRED, leaves
from sere_ext.contract.errors import ExitCode, exit_codes


def make_app() -> typer.Typer:
    app = typer.Typer()
    for part in (sere_ext.cli.commands, sere_autotune.commands, sere_operator.cli.commands):
        part.register(app)
    return app


def commands(group, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    for name, command in getattr(group, "commands", {}).items():
        if name != "serve":  # its help is vLLM's own
            yield (*words, name), command
            yield from commands(command, (*words, name))


COMMANDS = dict(commands(get_command(make_app())))


def shown(*words: str) -> str:
    result = CliRunner().invoke(make_app(), [*words, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_nothing_is_cut_off_and_every_option_says_its_default(words: tuple[str, ...]) -> None:
    text = shown(*words)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for option in COMMANDS[words].params:
        assert option.hidden or all(f" {name} " in text or f" {name}," in text for name in option.opts if name.startswith("--"))
        says = option.required or option.is_flag if option.param_type_name == "option" else True
        assert option.hidden or says or option.default is not None or isinstance(option.show_default, str), option.name


EXIT_CODES = {
    "tune": list(ExitCode),
    "certify": list(ExitCode),
    "doctor": [ExitCode.DONE, ExitCode.FAILED, ExitCode.BAD_INPUT, ExitCode.INFEASIBLE, ExitCode.STOPPED],
}


@pytest.mark.parametrize("command", EXIT_CODES)
def test_help_says_every_exit_code_that_a_command_can_end_with(command: str) -> None:
    assert exit_codes(*EXIT_CODES[command]) in " ".join(shown(command).split())


@pytest.mark.parametrize("command", ["tune", "certify"])
def test_every_option_of_the_tuning_file_stands_there_whole(command: str) -> None:
    entries: list[str] = []
    for line in shown(command).splitlines():
        body = line.strip("│ ")
        if body.startswith("--"):
            entries.append(body)
        elif entries and line.startswith("│"):
            entries[-1] += " " + body
    said = {" ".join(entry.split()) for entry in entries}
    for leaf in leaves():
        assert leaf.description
        assert f"{leaf.flag} {leaf.type} {leaf.description} {leaf.notes}" in said


@pytest.mark.parametrize(
    ("flag", "type_", "notes"),
    [
        ("--model", "<str>", f"[{REQUIRED}]"),
        ("--accuracy-confidence", "<float>", "[0.5<x<1] [default: 0.95]"),
        ("--search-trials", "<int>", "[1<=x<=10000] [default: 60]"),
        ("--search-sampler", "random|tpe", "[default: random]"),
        ("--search-policies", "<list>", "[default: [sere, topk, oea]]"),
        ("--search-layer-groups", "<bool>", "[default: true]"),
        ("--workload-load-concurrency", "<list>", "[default: [16]]"),  # of the section's default
        ("--engine-max-model-len", "<int>", "[x>=8] [default: the model's]"),  # nothing in the file, words here
        ("--search-device-hours", "<float>", "[0<x<=100000] [default: 4]"),
    ],
)
def test_types_bounds_and_defaults_are_the_models_own(flag: str, type_: str, notes: str) -> None:
    leaf = next(leaf for leaf in leaves() if leaf.flag == flag)
    assert (leaf.type, leaf.notes) == (type_, notes)


def run_without(modules: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`sere ARGUMENTS` where some modules are not installed."""
    code = f"""
import sys, importlib.util
hidden, find = {modules!r}, importlib.util.find_spec
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
importlib.util.find_spec = lambda name, package=None: None if name in hidden else find(name, package)
sys.argv = ["sere", *{arguments!r}]
from sere_ext.cli.main import main
main()
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_help_names_what_all_missing_parts_need() -> None:
    shown = run_without(("optuna", "kopf"), "--help")
    assert shown.returncode == 0
    assert "pip install 'sere[autotune,operator]'` (optuna, kopf are missing)" in " ".join(shown.stdout.split())
    assert "similarity" in shown.stdout and " tune " not in shown.stdout
    assert exit_codes(*ExitCode) in " ".join(shown.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "hidden", "extra"),
    [
        (("similarity", "show", "x"), "numpy", "similarity"),
        (("similarity", "shard", "x", "--name", "n"), "numpy", "similarity"),
        (("calibrate", "m", "--data", "d", "--out", "o"), "torch", "vllm"),
        (("calibrate", "m", "--data", "d", "--out", "o"), "numpy", "similarity"),
    ],
)
def test_a_command_without_its_modules_is_one_sentence(arguments: tuple[str, ...], hidden: str, extra: str) -> None:
    ended = run_without((hidden,), *arguments)
    assert ended.returncode == 2
    assert ended.stderr == f"sere: this command needs `pip install 'sere[{extra}]'` ({hidden} is missing)\n"
