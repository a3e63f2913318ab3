"""The policies that pods can be told to run, as the ConfigMaps that their policy volume projects. Pure.

`NAME-policy` holds `stable` and every policy by digest. Similarity artefacts lie beside it in shards, one ConfigMap each:
`NAME-policy-shard-0`, `-1`, ... A shard stays where it is while its artefact is needed, so that a pod that starts amid a change
finds what it needs. Names of files: `sere_ext.contract.volume`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sere_ext.contract.errors import SereError
from sere_ext.contract.policy import EXACT, EXACT_POLICY, Policy
from sere_ext.contract.profile import ProfileKey
from sere_ext.contract.volume import (
    MAX_FILE_BYTES,
    OVERRIDE,
    POLICY_SHARDS,
    STABLE,
    named_key,
    named_policy,
    piece_name,
    pieces,
    policy_files,
    similarity_file,
)

from sere_operator.api import meta
from sere_operator.plan.objects.children import metadata
from sere_operator.plan.snapshot import Snapshot

Object = dict[str, Any]


@dataclass(frozen=True)
class PolicyEntry:
    """One policy as it goes into the volume. `similarity` is (digest, shards of the file in base64)."""

    policy: Policy
    key: ProfileKey | None = None
    similarity: tuple[str, tuple[str, ...]] | None = None


def stable_digest(snapshot: Snapshot) -> str:
    """What pods without an annotation run: the ConfigMap's word, else (it was deleted) the status's, else exact."""
    live = (snapshot.children.get("ConfigMap") or {}).get("data") or {}
    digest = live.get(STABLE) or (snapshot.status.get("policy") or {}).get("stable") or EXACT
    return str(digest)


def recovered_entry(snapshot: Snapshot, digest: str) -> PolicyEntry | None:
    """A policy as the live ConfigMaps hold it, None if it is not there whole."""
    if digest == EXACT:
        return PolicyEntry(EXACT_POLICY)
    data = (snapshot.children.get("ConfigMap") or {}).get("data") or {}
    try:
        policy, key = named_policy(data, digest), named_key(data, digest)
    except SereError:
        return None
    if not policy.needs_similarity():
        return PolicyEntry(policy, key)
    shards = recovered_shards(snapshot.shards.values(), policy.similarity_digest or "")
    return PolicyEntry(policy, key, (policy.similarity_digest or "", shards)) if shards else None


def policy_config_map(owner: Object, stable: str, override: bool, entries: Mapping[str, PolicyEntry]) -> Object:
    """`NAME-policy`.

    Args:
        stable: digest that pods without an annotation run.
        entries: by policy digest; `exact` needs none.
    """
    name = owner["metadata"]["name"]
    data = {STABLE: stable}
    if override:
        data[OVERRIDE] = EXACT
    for _, entry in sorted(entries.items()):
        data |= policy_files(entry.policy, entry.key)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(owner, meta.policy_config_map(name)),
        "data": data,
    }


def shard_config_maps(owner: Object, live: Mapping[str, Object], entries: Iterable[PolicyEntry]) -> list[Object]:
    """The ConfigMaps with the entries' artefacts.

    Args:
        live: those that are there, by name.
        entries: that `fit`.
    """
    wanted: dict[str, str] = {}
    for digest, shards in _artefacts(entries).items():
        file = similarity_file(digest)
        wanted |= {piece_name(file, index, len(shards)): shard for index, shard in enumerate(shards, 1)}
    names = meta.policy_shards(owner["metadata"]["name"])
    placed: dict[str, str] = {}  # name -> file
    for name in names:
        held = sorted((live.get(name) or {}).get("binaryData") or {})
        kept = next((file for file in held if file in wanted and file not in placed.values()), None)
        if kept is not None:
            placed[name] = kept
    free = [name for name in names if name not in placed]
    missing = [file for file in wanted if file not in placed.values()]
    placed |= dict(zip(free, missing, strict=False))
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata(owner, name, meta.SHARD_COMPONENT),
            "binaryData": {placed[name]: wanted[placed[name]]},
        }
        for name in names
        if name in placed
    ]


def recovered_shards(live: Iterable[Object], digest: str) -> tuple[str, ...] | None:
    """An artefact as the live ConfigMaps hold it, None if it is not there whole."""
    held = {file: shard for body in live for file, shard in (body.get("binaryData") or {}).items()}
    there, count = pieces(held, similarity_file(digest))
    return tuple(held[file] for file in there) if count and len(there) == count else None


def too_large(entry: PolicyEntry) -> str | None:
    """Why its artefact can never be given to pods, None if it can."""
    if fit((entry,)) or entry.similarity is None:
        return None
    return (
        f"its similarity artefact is larger than the {MAX_FILE_BYTES / 1e6:.0f} MB that pods can be given; make it smaller with "
        "`sere similarity pack`"
    )


def fit(entries: Iterable[PolicyEntry | None]) -> bool:
    """Whether there are places for these policies' similarity artefacts, each once."""
    return sum(map(len, _artefacts(entry for entry in entries if entry is not None).values())) <= POLICY_SHARDS


def _artefacts(entries: Iterable[PolicyEntry]) -> dict[str, tuple[str, ...]]:
    return dict(sorted(entry.similarity for entry in entries if entry.similarity is not None))
