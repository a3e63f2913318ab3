"""How the plug-in is configured, read the same way in every process. Torch-free and vLLM-free.

In order: `--additional-config '{"sere": {...}}'`, `SERE_PROFILE=profile.json`. Live sources (`SERE_POLICY_DIR`, or
`sere_control` named in VLLM_PLUGINS) install the seam as well and start with exact routing. Nothing of these: inert.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sere_ext.contract.errors import ProfileError, UsageError
from sere_ext.contract.policy import EXACT_POLICY, Policy
from sere_ext.contract.profile import Profile, ProfileKey, read_policy_file

CONTROL_PLUGIN = "sere_control"
GENERAL_PLUGIN = "sere"
_KNOWN = {"policy", "similarity", "graph"}


@dataclass(frozen=True)
class Settings:
    """What a worker starts with."""

    policy: Policy = EXACT_POLICY
    similarity: str | None = None  # path
    key: ProfileKey | None = None  # what the policy was tuned on; a mismatch means exact routing


def resolve(additional_config: Any, environ: Mapping[str, str] = os.environ) -> Settings | None:
    """The settings of this process, or None if the plug-in is to stay inert.

    Raises:
        UsageError: an unknown key, a policy or profile that cannot be read or means nothing.
    """
    given = additional_config.get("sere") if isinstance(additional_config, Mapping) else None
    if given:
        return _from_config(given)
    if path := environ.get("SERE_PROFILE"):
        return _from_profile(Path(path))
    if given is not None or live_control_named(environ) or environ.get("SERE_POLICY_DIR"):
        return Settings()
    return None


def live_control_named(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether VLLM_PLUGINS names the routes; without it vLLM does not load them."""
    return CONTROL_PLUGIN in environ.get("VLLM_PLUGINS", "").split(",")


def _from_config(given: Any) -> Settings:
    if not isinstance(given, Mapping):
        raise UsageError(f"additional_config: sere should be an object with policy and similarity, got {given!r}")
    if unknown := sorted(set(given) - _KNOWN):
        raise UsageError(f"additional_config: sere has no setting {', '.join(unknown)}; it knows policy and similarity")
    policy = given.get("policy")
    if isinstance(policy, str):
        policy = read_policy_file(policy)
    elif policy is not None:
        policy = Policy.parse(dict(policy))
    return Settings(policy or EXACT_POLICY, given.get("similarity"))


def _from_profile(path: Path) -> Settings:
    spec = Profile.read(path).spec
    similarity = None
    if spec.similarity is not None:
        parts = urlsplit(spec.similarity.uri)
        if parts.scheme not in ("", "file"):
            raise ProfileError(
                f"{path}: the similarity is at {spec.similarity.uri}, which is no file here; copy it and use file://"
            )
        similarity = str(path.parent / unquote(parts.netloc + parts.path))  # file://name and file:name: beside the profile
    return Settings(spec.policy, similarity, spec.key)
