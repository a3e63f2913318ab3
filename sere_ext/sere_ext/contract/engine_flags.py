"""Flags of `vllm serve` that `extraArgs` may not hold, since the tuner, the operator or another field sets them.

vLLM's parser takes `--a_b`, `--a-b=1`, `--a-b.c=1`, `--no-a-b` and every abbreviation that is unique (`--por` for `--port`)
as forms of one flag; all of them are refused.
"""

from __future__ import annotations

import re
from typing import Final

from sere_ext.contract.constraints import Constraint

_LISTENS = "the operator and the tuner decide where the engine listens"
_ENCRYPTED = "the operator's probes speak plain HTTP; encrypt in front of the Service"

# The flag, and what to do instead.
OWNED_FLAGS: Final[dict[str, str]] = {
    "--model": "set model",
    "--revision": "set the model's revision",
    "--served-model-name": "clients name the model as the resource does",
    "--tensor-parallel-size": "set engine.tensorParallelSize",
    "-tp": "set engine.tensorParallelSize",
    "--max-model-len": "set engine.maxModelLen",
    "--additional-config": "the routing policy is put there",
    "--worker-extension-cls": "the plug-in is put there",
    "--max-num-active-seqs": "the tuner decides how many requests are in flight, by workload.load",
    "--disable-log-stats": "the canary is judged by the engine's statistics",
    "--config": "a file of flags would pass these checks by; write its flags out here",
    "--host": _LISTENS,
    "--port": _LISTENS,
    "--uds": _LISTENS,
    "--shutdown-timeout": "set engine.shutdown.graceSeconds",
    "--root-path": "the operator's probes ask for /sere and /health at the root",
    "--middleware": "the operator's probes would pass through it",
    "--api-key": "an argument shows the key to everyone who may read pods; name its Secret in spec.engine.apiKeySecret, or set VLLM_API_KEY",
    "--api-server-count": "the canary counts the latencies of one API server",
    "-asc": "the canary counts the latencies of one API server",
    "--headless": "the engine must answer the operator's probes",
    "--ssl-keyfile": _ENCRYPTED,
    "--ssl-certfile": _ENCRYPTED,
    "--ssl-ca-certs": _ENCRYPTED,
    "--ssl-cert-reqs": _ENCRYPTED,
    "--ssl-ciphers": _ENCRYPTED,
    "--enable-ssl-refresh": _ENCRYPTED,
}

_NOT_A_FLAG = "is a flag and its value in one argument; write two, or --flag=value"
_EXPANDS = "$( ) is expanded by the kubelet, also to the values of Secrets; write the value itself"


def owned_flag(argument: str) -> str | None:
    """The flag of OWNED_FLAGS that an argument sets, in any form that vLLM's parser takes, or None."""
    name = re.split(r"[=.\s]", argument, maxsplit=1)[0].replace("_", "-")
    if name.startswith("--no-"):
        name = "--" + name.removeprefix("--no-")
    least = 3 if name.startswith("--") else 2  # `--` alone ends the flags, `-` alone is a value
    if not name.startswith("-") or len(name) < least:
        return None
    return next((flag for flag in OWNED_FLAGS if flag.startswith(name)), None)


def problem_of(arguments: tuple[str, ...]) -> str | None:
    """What is wrong with further arguments of `vllm serve`, as a sentence that says what to do, or None."""
    for argument in arguments:
        if flag := owned_flag(argument):
            form = argument.split("=")[0]
            name = flag if form == flag else f"{form} ({flag})"
            return f"extraArgs: {name} may not stand here: {OWNED_FLAGS[flag]}"
        if re.match(r"-[^=]*\s", argument):
            return f"extraArgs: {argument!r} {_NOT_A_FLAG}"
        if "$(" in argument:
            return f"extraArgs: {argument!r}: {_EXPANDS}"
    return None


def _forms() -> list[str]:
    """Every flag of OWNED_FLAGS and every abbreviation of one: `--p`, `--po`, `--por`, `--port`."""
    found = {flag[:end] for flag in OWNED_FLAGS for end in range(3 if flag.startswith("--") else 2, len(flag) + 1)}
    return sorted(found)


def extra_args_constraints() -> tuple[Constraint, ...]:
    """The rules of a record that has `extra_args`, for both who check it."""
    name = "a.split('=')[0].split('.')[0].replace('_', '-')"
    # Membership in a list is what an API server can bound the cost of; prefixes of strings cut from others it cannot.
    owned = f"[{name}, {name}.replace('--no-', '--')].exists(n, n in {_forms()})"
    bad = r"(a.matches('^-[^=]*\\s') || a.contains('$('))"
    return (
        Constraint(
            f"!has(self.extraArgs) || self.extraArgs.all(a, !{owned})",
            f"a flag that may not stand here, since it is set otherwise: {', '.join(OWNED_FLAGS)}",
            lambda record: problem_of(record.extra_args),
            f"self.extraArgs.filter(a, {owned})"
            ".map(a, '%s may not stand here: it is set by another field, the tuner or the operator'.format([a.split('=')[0]]))[0]",
            field="extraArgs",
        ),
        Constraint(
            f"!has(self.extraArgs) || self.extraArgs.all(a, !{bad})",
            f"an argument {_NOT_A_FLAG}; and {_EXPANDS}",
            lambda record: None,  # problem_of says it
            field="extraArgs",
        ),
    )
