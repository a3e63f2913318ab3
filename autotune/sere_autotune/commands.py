"""`sere tune` and `sere certify`: options, the screen, exit codes. Every leaf of tuning.yaml is an option. `look.py` has `sere doctor`."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import optuna  # noqa: F401  (so that `sere` leaves these commands out where the extra is not installed)
import typer
from rich.console import Console

from sere_autotune import look
from sere_autotune.doctor.finding import NOTHING
from sere_autotune.outcome import ending_of
from sere_autotune.tuning.file import load_spec, read_mapping, to_yaml
from sere_autotune.tuning.options import LeavesCommand, overrides, with_leaves
from sere_autotune.tuning.spec import TuningSpec
from sere_ext.contract.errors import CannotCertifyError, ExitCode, SereError, UsageError, exit_codes
from sere_ext.contract.policy import Policy
from sere_ext.contract.profile import read_policy_file
from sere_ext.contract.volume import MAX_FILE_BYTES


def register(app: typer.Typer) -> None:
    """Entry point of the group `sere.commands`."""
    app.command("tune", cls=LeavesCommand, help=_TUNE_HELP)(with_leaves(tune_command))
    app.command("doctor", help=look.HELP)(look.doctor_command)
    app.command("certify", cls=_CertifyCommand, help=_CERTIFY_HELP)(with_leaves(certify_command))


_TUNE_HELP = f"""Search routing policies on a live engine and certify the best.

The model, accuracy.tasks and one latency limit are needed; lists are YAML: --workload-load-concurrency "[4, 16]".

{exit_codes(*ExitCode)}
Stopped in any way, the same line again goes on where it was."""

_CERTIFY_HELP = f"""Certify one policy against exact routing, without a search. Same options as `tune`.

{exit_codes(*ExitCode)}
Stopped in any way, the same line again goes on where it was."""

_File = Annotated[
    Path | None, typer.Option("--file", "-f", help="tuning.yaml; options below override it.", show_default="flags alone")
]
_DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan: what will run, how long, and whether the items can certify; start nothing."),
]
_Yaml = Annotated[
    bool,
    typer.Option("--yaml", help="With --dry-run: print the whole tuning file instead, every key with the value it will have."),
]
_Advisory = Annotated[bool, typer.Option("--advisory", help="Go on although the items cannot certify; the profile is marked so.")]
_Fresh = Annotated[bool, typer.Option("--fresh", help="Begin anew in `out` instead of going on there.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")]
_Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model, in calibration and engine.")
]
_Publish = Annotated[
    str | None,
    typer.Option("--publish", help="configmap/<namespace>/<name>: also write the result there.", show_default="nowhere"),
]


class _CertifyCommand(LeavesCommand):
    """Says first what is wrong with the tuning file, and then that no policy was named: the file is what was typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception:
            if (file := ctx.params.get("file")) is not None:
                read_mapping(file)
            raise


def tune_command(
    file: _File = None,
    dry_run: _DryRun = False,
    with_engine: look.WithEngine = False,
    as_yaml: _Yaml = False,
    advisory: _Advisory = False,
    fresh: _Fresh = False,
    as_json: _Json = False,
    publish: _Publish = None,
    trust_remote_code: _Trust = False,
    **options: str | None,
) -> None:
    _main(
        _read_spec(file, options, trust_remote_code),
        None,
        _dry(dry_run, with_engine, as_yaml, as_json),
        advisory,
        fresh,
        as_json,
        publish,
    )


def certify_command(
    policy: Annotated[Path, typer.Argument(help="A policy or a profile, as JSON.")],
    file: _File = None,
    dry_run: _DryRun = False,
    with_engine: look.WithEngine = False,
    as_yaml: _Yaml = False,
    advisory: _Advisory = False,
    fresh: _Fresh = False,
    as_json: _Json = False,
    publish: _Publish = None,
    trust_remote_code: _Trust = False,
    **options: str | None,
) -> None:
    only = read_policy_file(policy)
    spec = _read_spec(file, options, trust_remote_code)
    if not only.uses_rerouting():
        raise UsageError(f"{policy} is exact routing, which needs no certificate; name a policy that re-routes")
    if options.get("out") is None:
        spec = spec.model_copy(update={"out": str(Path(spec.out) / f"certify-{only.digest}")})
    _main(spec, only, _dry(dry_run, with_engine, as_yaml, as_json), advisory, fresh, as_json, publish)


class _Dry(StrEnum):
    """Whether the plan alone is printed, with the ceiling that an engine is started for, or the whole tuning file in its place."""

    NO = "no"
    PLAN = "plan"
    ENGINE = "engine"
    FILE = "file"


def _dry(dry_run: bool, with_engine: bool, as_yaml: bool, as_json: bool) -> _Dry:
    if as_yaml and (with_engine or as_json or not dry_run):
        raise UsageError(
            "--yaml belongs to --dry-run, without --with-engine and --json: it prints the tuning file instead of the plan"
        )
    if with_engine and not dry_run:
        raise UsageError("--with-engine belongs to --dry-run; without it the ceiling is found before the search anyway")
    return _Dry.ENGINE if with_engine else _Dry.FILE if as_yaml else _Dry.PLAN if dry_run else _Dry.NO


def _read_spec(file: Path | None, options: dict[str, str | None], trust_remote_code: bool) -> TuningSpec:
    """The tuning file with the options laid over it; trust stands among the engine's arguments, which calibration looks at too."""
    spec = load_spec(file, overrides(options))
    if not trust_remote_code or spec.trust_remote_code:
        return spec
    arguments = (*spec.engine.extra_args, "--trust-remote-code")
    return spec.model_copy(update={"engine": spec.engine.model_copy(update={"extra_args": arguments})})


def _main(
    spec: TuningSpec, only: Policy | None, dry: _Dry, advisory: bool, fresh: bool, as_json: bool, publish: str | None
) -> None:
    from sere_autotune.result.publish import Access, Publisher, Target

    publisher = Publisher(Target.parse(publish), Access.from_pod()) if publish and dry is _Dry.NO else None
    if publisher is not None:
        publisher.check()
    try:
        code = _run(spec, only, dry, advisory, fresh, as_json, publisher)
    except SereError as error:
        if publisher is not None:
            publisher.failed(str(error), error.exit_code, ending_of(error).value)
        raise
    except Exception as error:
        if publisher is not None:
            publisher.failed(f"{type(error).__name__}: {error}", 1)
        raise
    if code:
        raise typer.Exit(code)


def _run(spec: TuningSpec, only: Policy | None, dry: _Dry, advisory: bool, fresh: bool, as_json: bool, publisher: Any) -> int:
    from sere_autotune import plan_text, prepare, tuner
    from sere_autotune.progress import Progress
    from sere_autotune.result import screen
    from sere_autotune.trial import warm

    console = Console(stderr=True, highlight=False)
    if only is not None:
        spec = spec.model_copy(update={"search": spec.search.model_copy(update={"rungs": 1})})
    prepared = prepare.prepare(spec, only, publisher)
    if dry is not _Dry.NO:
        return _dry_run(prepared, dry, advisory, as_json)
    if not prepared.plan.can_certify and not advisory:
        raise CannotCertifyError(prepared.plan.problem)
    console.print(_fitted(plan_text.describe(prepared.plan, spec), sys.stderr), markup=False, soft_wrap=True)

    def make_engine(given: TuningSpec, similarity: str | None, on_start: Callable[[bool], None]) -> warm.WarmEngine:
        return warm.WarmEngine(given, similarity, on_start=on_start)

    # A plain kill (a pod's end) stops the engine as Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with Progress(console, f"sere tune {spec.model}", publisher.progress if publisher else None) as progress:
            limit = MAX_FILE_BYTES if publisher else None
            finished = tuner.tune(
                prepared, make_engine, progress, advisory=advisory, fresh=fresh, only=only, artefact_limit=limit
            )
    except KeyboardInterrupt:
        console.print("Stopped. The same line again goes on from here.")
        return ExitCode.STOPPED
    finally:
        warm.shut_ray()
    if publisher is not None:
        publisher.finish(finished)
    console.print()
    console.print(screen.lines(finished.summary), markup=False, soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(finished.summary, indent=2) + "\n")
    return finished.outcome.exit_code


def _dry_run(prepared: Any, dry: _Dry, advisory: bool, as_json: bool) -> int:
    from sere_autotune import plan_text
    from sere_autotune.trial.traffic import Traffic

    plan = prepared.plan
    possible = plan.can_certify or advisory
    finding = (
        look.look(prepared.work(Traffic(prepared.spec.workload, prepared.items))) if dry is _Dry.ENGINE and possible else None
    )
    if as_json:
        ceiling = {"ceiling": finding.to_dict()} if finding else {}
        sys.stdout.write(json.dumps(plan.to_dict() | ceiling, indent=2) + "\n")
    elif dry is _Dry.FILE:
        sys.stdout.write(to_yaml(prepared.spec))
    else:
        text = plan_text.describe(plan, prepared.spec) + (f"\nCeiling    {finding.sentence}" if finding else "")
        sys.stdout.write(
            _fitted(f"{text}\nFile       --yaml prints the whole tuning file, with every default", sys.stdout) + "\n"
        )
    if not possible:
        raise CannotCertifyError(plan.problem)
    return ExitCode.INFEASIBLE if finding is not None and finding.verdict == NOTHING else 0


def _fitted(text: str, stream: TextIO) -> str:
    """The plan at the width of the screen; as it is where it goes into a file or pipe, so that each line can be searched for."""
    from sere_autotune.plan_text import fitted

    return fitted(text, shutil.get_terminal_size().columns) if stream.isatty() else text


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
