"""The flags that `extraArgs` may not hold, against the parser of the vLLM that is installed."""

from __future__ import annotations

from pathlib import Path

from sere_autotune.trial.host import _serve_arguments
from sere_ext.contract.engine_flags import OWNED_FLAGS, owned_flag

TINY = Path(__file__).parents[1] / "assets" / "tiny_moe"


def test_owned_flags_are_vllms_and_no_other_flag_is_taken_for_one() -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = _serve_arguments()(FlexibleArgumentParser())
    known = {flag for action in parser._actions for flag in action.option_strings}
    ours = {flag for flag in OWNED_FLAGS if flag not in known} - {"--max-num-active-seqs", "--headless"}
    assert ours == set(), "flags that this vLLM does not know"
    same = {flag: {*action.option_strings} for action in parser._actions for flag in action.option_strings}
    wrong = {flag for flag in known if (taken := owned_flag(flag)) and taken not in same[flag]}
    assert wrong <= {f"--no-{flag.removeprefix('--')}" for flag in OWNED_FLAGS}, "flags that only begin like one of ours"
    short = {flag for flag in known if owned_flag(flag) is None and same[flag] & set(OWNED_FLAGS)}
    assert short == set(), "other names of our flags"


def test_the_tuners_engine_takes_every_flag_of_the_server() -> None:
    """A flag that only a server knows is no error, and the engine's own come through as `vllm serve` would read them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    engine = ["--model", str(TINY), "--max-model-len", "128", "--dtype=float32", "--enforce-eager", "--max_num_seqs", "32"]
    server = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--chat-template={{ x }}"]
    args = AsyncEngineArgs.from_cli_args(_serve_arguments()(FlexibleArgumentParser()).parse_args([*engine, *server]))
    plain = AsyncEngineArgs.from_cli_args(AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(engine))
    assert (args.max_model_len, args.dtype, args.enforce_eager, args.max_num_seqs) == (128, "float32", True, 32)
    assert args == plain
