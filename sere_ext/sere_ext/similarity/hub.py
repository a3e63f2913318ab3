"""A model's config.json and commit, from its folder or from the hub; and why there is none, in words for a user."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from sere_ext.contract.errors import UsageError
from sere_ext.contract.model_config import names_folder


def model_config_dict(model: str, revision: str | None = None) -> dict[str, object]:
    """The decoded config.json of a model directory or hub name, as `model_config_digest` expects it."""
    local = Path(model) / "config.json"
    if local.is_file():
        decoded: dict[str, object] = json.loads(local.read_text())
        return decoded
    from transformers import PretrainedConfig

    return dict(PretrainedConfig.get_config_dict(model, revision=revision)[0])


def commit_of(model: str, revision: str | None = None) -> str:
    """The commit that a hub name with a branch, a tag or nothing means here: a branch that has moved is another model.

    Returns:
        empty for a folder, and where the hub's client names none.
    """
    if Path(model).is_dir():
        return ""
    from transformers.utils.hub import cached_file, extract_commit_hash

    return extract_commit_hash(cached_file(model, "config.json", revision=revision), None) or ""


def asked_model_config(model: str, revision: str | None = None) -> dict[str, object]:
    """`model_config_dict` of a model that a user named.

    Raises:
        UsageError: there is no such model; one sentence that names it and says what to do.
    """
    check_folder(model)
    try:
        decoded = _quietly(model, revision)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{model}/config.json cannot be read as JSON ({error}); copy the model's folder again") from error
    except (OSError, ValueError) as error:
        raise UsageError(why_not_on_hub(model, revision, error)) from error
    if not isinstance(decoded, dict):
        raise UsageError(f"{model}/config.json holds no JSON object; copy the model's folder again")
    return decoded


def _quietly(model: str, revision: str | None) -> dict[str, object]:
    """`model_config_dict` without the hub's warnings of each try to reach it."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return model_config_dict(model, revision)
    finally:
        logger.setLevel(level)


def check_folder(model: str, files: tuple[str, ...] = ("config.json",)) -> None:
    """Raise UsageError for a folder that is missing or holds no model, a file, or an address. What is none of these passes.

    Args:
        files: patterns of which a model's folder holds one.
    """
    path = Path(model).expanduser()
    if "://" in model:
        raise UsageError(f"{model} is an address; give a model's folder, or its name on the hub, such as owner/name")
    if path.is_file():
        raise UsageError(f"{model} is a file; give the folder of the model that it belongs to")
    if path.is_dir() and not any(next(path.glob(pattern), None) for pattern in files):
        raise UsageError(
            f"{model} is a folder without {' or '.join(files)}, so it holds no model; give the folder with the model's "
            "configuration, tokenizer and weights"
        )
    if not path.exists() and names_folder(model):
        raise UsageError(f"there is no folder {model} (from {Path.cwd()}); check its spelling")


def why_not_on_hub(model: str, revision: str | None, error: BaseException) -> str:
    """A sentence on a name that is no folder and whose configuration the hub's library did not give, with what to do.

    Args:
        error: what the library raised; its own words are for the library's callers.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    kinds = tuple(type(cause) for cause in _causes(error))

    def is_a(*classes: type[BaseException]) -> bool:
        return any(issubclass(kind, classes) for kind in kinds)

    here = f"there is no folder {model} (from {Path.cwd()})"
    download = f"download it first (hf download {model})"
    if is_a(hub.HFValidationError):
        return f"{here}, and no model of the hub can have that name; check its spelling"
    if is_a(hub.GatedRepoError):
        return f"the hub gives {model} to those only who accepted its terms; accept them on its page, then run hf auth login"
    if is_a(hub.RevisionNotFoundError):
        return f"the hub's {model} has no revision {revision}; check its spelling, or leave it out"
    if is_a(hub.RepositoryNotFoundError):
        return f"{here}, and the hub has no such model for you; check its spelling, or run hf auth login if it is private"
    if is_a(hub.RemoteEntryNotFoundError):
        return f"the hub's {model} has no config.json, so transformers cannot load it; name another repository of the model"
    if is_a(hub.OfflineModeIsEnabled) or (constants.HF_HUB_OFFLINE and is_a(hub.LocalEntryNotFoundError)):
        return f"{here}, and HF_HUB_OFFLINE keeps it from being looked for on the hub; check its spelling, or {download}"
    if is_a(hub.LocalEntryNotFoundError, OSError) and not is_a(json.JSONDecodeError):
        return f"{here}, and the hub cannot be reached to look for it there; check its spelling and the network, or {download}"
    return (
        f"the configuration of {model} cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]}); check its name"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
