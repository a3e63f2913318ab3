"""The policy volume: the files through which an operator tells an engine's pod which policy to serve. Pure.

The operator writes the files as ConfigMap keys and pod annotations, the kubelet projects them into one folder, and the plug-in
reads the folder. All names and rules of that folder stand here.

    stable                        digest of the policy that every pod serves; `exact` is exact routing
    override                      `exact` while the kill switch is on for all pods, else absent or empty
    pod.policy, pod.override      the same for this pod alone, from its annotations; they go before the two above
    slo                           latency limits (`LatencySlo` as JSON) at which the latency histograms have bounds; absent: none
    pod.refresh                   a nonce without meaning; its change makes the kubelet refresh the folder at once
    DIGEST.json                   a policy by its digest
    DIGEST.key.json               what that policy was tuned on (`ProfileKey`)
    similarity-HEX.safetensors    a similarity file, or its shards with `.001-of-003` after the name

What decides, in this order: an override, `pod.policy`, `stable`. A policy that is missing or damaged never changes what is in
force; the error is reported instead. Shards come from a ConfigMap each, so the kubelet may show a policy a moment before all
shards of its similarity file; for that moment nothing is wrong (`Desired.awaited`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from pydantic import ValidationError

from sere_ext.contract.errors import PolicyError, ProfileError, SpecError
from sere_ext.contract.policy import EXACT, EXACT_POLICY, Policy
from sere_ext.contract.profile import ProfileKey
from sere_ext.contract.shards import HEADER_BYTES, SHARD_BYTES
from sere_ext.contract.slo import LatencySlo
from sere_ext.contract.validation import explain

STABLE = "stable"
OVERRIDE = "override"
SLO = "slo"
POD_POLICY = "pod.policy"
POD_OVERRIDE = "pod.override"
POD_REFRESH = "pod.refresh"

POLICY_SHARDS = 16  # places in a pod's policy volume: for two artefacts of up to 8, one in force and one on its way
MAX_FILE_BYTES = POLICY_SHARDS * (SHARD_BYTES - HEADER_BYTES)  # of an artefact that pods can be given
_ARTEFACT = ".safetensors"

Files = Mapping[str, bytes | str]


def policy_file(digest: str) -> str:
    """The name under which the policy with this digest lies in the volume."""
    return f"{digest}.json"


def key_file(digest: str) -> str:
    """The name under which the volume says what the policy with this digest was tuned on."""
    return f"{digest}.key.json"


def similarity_file(digest: str) -> str:
    """The name under which the similarity file with this digest lies in the volume, whole or with shard numbers after it."""
    return f"similarity-{digest.removeprefix('sha256:')[:12]}{_ARTEFACT}"


def is_artefact(name: str) -> bool:
    """Whether a file of the volume is a similarity file or a shard of one: megabytes whose name suffices to decide."""
    return _ARTEFACT in name


def piece_name(file: str, index: int, count: int) -> str:
    """The name of shard `index` (from 1) of `count` of a similarity file; names sort in order."""
    return f"{file}.{index:03d}-of-{count:03d}"


def pieces(names: Iterable[str], file: str) -> tuple[list[str], int]:
    """Which shards of `file` are among `names`, in order, and how many shards it has (0: none is among them).

    If two splits of the file are present, the more complete one.
    """
    pattern = re.compile(re.escape(file) + r"\.(\d{3})-of-(\d{3})")
    found: dict[int, list[str]] = {}
    for name in sorted(names):
        if match := pattern.fullmatch(name):
            found.setdefault(int(match[2]), []).append(name)
    if not found:
        return [], 0
    count = min(found, key=lambda count: count - len(found[count]))
    return found[count], count


def policy_files(policy: Policy, key: ProfileKey | None = None) -> dict[str, str]:
    """The files, by name, that put one policy into the volume; nothing for exact routing, which needs none."""
    if policy.digest == EXACT:
        return {}
    files = {policy_file(policy.digest): policy.to_json()}
    if key is not None:
        files[key_file(policy.digest)] = key.to_json()
    return files


def named_policy(files: Files, digest: str) -> Policy:
    """The policy with this digest.

    Raises:
        PolicyError: its file is missing, damaged, or holds another policy.
    """
    if digest == EXACT:
        return EXACT_POLICY
    name = policy_file(digest)
    text = files.get(name)
    if text is None:
        raise PolicyError(f"policy {digest} is missing: there is no {name}; the policy in force stays")
    try:
        policy = Policy.parse(text)
    except PolicyError as error:
        raise PolicyError(f"{name}: {error}") from error
    if policy.digest != digest:
        raise PolicyError(f"{name} holds policy {policy.digest}; the policy in force stays")
    return policy


def named_key(files: Files, digest: str) -> ProfileKey | None:
    """What the policy with this digest was tuned on, None where the volume does not say.

    Raises:
        ProfileError: the file is damaged.
    """
    text = files.get(key_file(digest))
    if text is None:
        return None
    try:
        return ProfileKey.model_validate_json(text)
    except ValidationError as error:
        raise ProfileError(f"{key_file(digest)}: {explain(error, ProfileKey)}") from error


def named_slo(files: Files) -> LatencySlo | None:
    """The latency limits, None where the volume has none.

    Raises:
        SpecError: the file is damaged.
    """
    text = files.get(SLO)
    if not text:
        return None
    try:
        return LatencySlo.model_validate_json(text)
    except ValidationError as error:
        raise SpecError(f"{SLO}: {explain(error, LatencySlo)}") from error


@dataclass(frozen=True)
class Desired:
    """What the volume asks an engine to serve. `policy` None: keep what is in force; `error` says why."""

    policy: Policy | None
    similarity: str | None = None  # name of the similarity file
    override: bool = False  # the kill switch is on
    error: str | None = None
    awaited: bool = False  # what is missing of the similarity file may still be on its way
    shards: tuple[str, ...] = field(default=(), compare=False)  # names of the files to join; none: the file is there whole
    by: str = field(default="", compare=False)  # the file that decided, for the audit trail


def desired(files: Files, key: ProfileKey | None) -> Desired:
    """Decide from the volume's files what to serve.

    Args:
        files: content by name; of similarity files and shards the name suffices.
        key: what this engine is; None if not known yet, then no policy is compared with it.
    """
    overrides = {name: _word(files, name) for name in (POD_OVERRIDE, OVERRIDE)}
    if unknown := [f"{name} is {value!r}" for name, value in overrides.items() if value not in ("", EXACT)]:
        return Desired(None, error=f"{unknown[0]}; it should be `exact` or empty")
    if EXACT in overrides.values():
        return Desired(EXACT_POLICY, override=True, by=next(name for name, value in overrides.items() if value))
    by = POD_POLICY if _word(files, POD_POLICY) else STABLE
    digest = _word(files, by)
    if not digest:
        return Desired(None, error=f"no policy is named: neither {POD_POLICY} nor {STABLE} holds a digest")
    return replace(_named(files, digest, key), by=by)


def _named(files: Files, digest: str, key: ProfileKey | None) -> Desired:
    """What to serve where `digest` is asked for."""
    try:
        policy = named_policy(files, digest)
    except PolicyError as error:
        return Desired(None, error=str(error))
    if stale := _stale(files, digest, key):
        return Desired(EXACT_POLICY, error=stale)
    if not policy.needs_similarity():
        return Desired(policy)
    if policy.similarity_digest is None:
        return Desired(None, error=f"{policy_file(digest)} has no similarityDigest, so its similarity file is not known")
    name = similarity_file(policy.similarity_digest)
    if name in files:
        return Desired(policy, name)
    there, count = pieces(files, name)
    if count and len(there) == count:
        return Desired(policy, name, shards=tuple(there))
    lacking = f"of which {len(there)} of {count} shards are there" if count else "which is missing"
    return Desired(None, name, error=f"policy {digest} needs {name}, {lacking}; the policy in force stays", awaited=True)


def _word(files: Files, name: str) -> str:
    content = files.get(name, "")
    return (content.decode("utf-8", "replace") if isinstance(content, bytes) else content).strip()


def _stale(files: Files, digest: str, key: ProfileKey | None) -> str | None:
    """Why the policy may not be served by this engine, None if it may."""
    if key is None:
        return None
    try:
        made = named_key(files, digest)
    except ProfileError as error:
        return f"PolicyStale: {error}; serving exact routing"
    mismatch = made.mismatch(key) if made is not None else None
    return f"PolicyStale: {mismatch}; serving exact routing until the next tuning" if mismatch else None
