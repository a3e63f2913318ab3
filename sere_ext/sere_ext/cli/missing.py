"""What to install for a module that a command needs and that is not there."""

from __future__ import annotations

from collections.abc import Iterable

from sere_ext.contract.errors import UsageError

# The extra of pyproject.toml that brings a module; held against pyproject.toml by a test. The engine brings torch and the like.
EXTRA = {
    "numpy": "similarity", "safetensors": "similarity", "optuna": "autotune", "ray": "autotune", "scipy": "autotune",
    "kopf": "operator", "kubernetes": "operator", "aiohttp": "operator", "structlog": "operator", "httpx2": "operator",
    "vllm": "vllm", "torch": "vllm", "transformers": "vllm", "huggingface_hub": "vllm", "fastapi": "vllm", "prometheus_client": "vllm",
}  # fmt: skip


def hint(modules: Iterable[str]) -> str:
    """`pip install 'sere[autotune,operator]' (optuna, kopf are missing)`, or without an extra for a module of none."""
    names = [module.partition(".")[0] for module in modules]
    extras = sorted({EXTRA[name] for name in names if name in EXTRA})
    package = f"sere[{','.join(extras)}]" if extras else "sere"
    return f"`pip install '{package}'` ({', '.join(names)} {'is' if len(names) == 1 else 'are'} missing)"


def usage_error(error: ModuleNotFoundError) -> UsageError:
    """The error that a command ends with; a missing module of our own is a broken install and stays what it is."""
    if error.name is None or error.name.startswith("sere_"):
        raise error
    return UsageError(f"this command needs {hint([error.name])}")
