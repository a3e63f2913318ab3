"""The policies that pods can be told to run, as the ConfigMaps that their policy volume projects. Pure.

`NAME-policy` holds `stable`, every policy by digest and the SLO. Similarity artefacts lie beside it in shards, one ConfigMap each:
`NAME-policy-shard-0`, `-1`, ... A shard stays where it is while its artefact is needed, so that a pod that starts amid a change
finds what it needs. Names of files: `sere_ext.contract.volume`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sere_ext.contract.errors import SereError
from sere_ext.contract.policy import EXACT, EXACT_POLICY, Policy
from sere_ext.contract.profile import ProfileKey
from sere_ext.contract.record import canonical_json
from sere_ext.contract.slo import LatencySlo
from sere_ext.contract.volume import (
    MAX_FILE_BYTES,
    OVERRIDE,
    POLICY_SHARDS,
    SLO,
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

MAX_TEXT_BYTES = 1_000_000  # of policies in one ConfigMap, which holds 1 MiB


@dataclass(frozen=True)
class PolicyEntry:
    """One policy as it goes into the volume. `similarity` is (digest, shards of the file in base64)."""

    policy: Policy
    key: ProfileKey | None = None
    similarity: tuple[str, tuple[str, ...]] | None = None


def stable_digest(snapshot: Snapshot) -> str:
    """The policy in force, which is what was judged: the status's word.

    Where the status was lost (a resource from a backup) the ConfigMap is believed, but only as the operator wrote it: who
    edits it by hand promotes nothing. Else exact.
    """
    judged = (snapshot.status.get("policy") or {}).get("stable")
    if judged:
        return str(judged)
    live = snapshot.children.get("ConfigMap") or {}
    data, annotations = live.get("data") or {}, (live.get("metadata") or {}).get("annotations") or {}
    written = annotations.get(meta.DECIDED_ANNOTATION) == _decided(data)
    return str(data.get(STABLE) or EXACT) if written else EXACT


def _decided(data: Mapping[str, str]) -> str:
    """A hash of what the ConfigMap says, but for the kill switch."""
    content = {key: value for key, value in data.items() if key != OVERRIDE}
    return hashlib.sha256(canonical_json(content)).hexdigest()[:16]


def switched(owner: Object, live: Object, override: bool) -> Object | None:
    """The live policy ConfigMap with the kill switch as asked and all else as it is; None where that is so already."""
    data = dict(live.get("data") or {})
    if (data.get(OVERRIDE) == EXACT) == override:
        return None
    data.pop(OVERRIDE, None)
    if override:
        data[OVERRIDE] = EXACT
    body = _body(owner, data)
    known = (live["metadata"].get("annotations") or {}).get(meta.DECIDED_ANNOTATION, "")
    body["metadata"]["annotations"][meta.DECIDED_ANNOTATION] = known
    return body


def _body(owner: Object, data: dict[str, str]) -> Object:
    named = metadata(owner, meta.policy_config_map(owner["metadata"]["name"]))
    annotated = {**named, "annotations": {meta.DECIDED_ANNOTATION: _decided(data)}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": annotated, "data": data}


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


def policy_config_map(
    owner: Object, stable: str, override: bool, entries: Mapping[str, PolicyEntry], slo: LatencySlo | None = None
) -> Object:
    """`NAME-policy`.

    Args:
        stable: digest that pods without an annotation run.
        entries: by policy digest; `exact` needs none.
        slo: the limits at which the pods' latency histograms are to have bounds.
    """
    data = {STABLE: stable}
    if override:
        data[OVERRIDE] = EXACT
    if slo is not None:
        data[SLO] = slo.to_json()
    for _, entry in sorted(entries.items()):
        data |= policy_files(entry.policy, entry.key)
    return _body(owner, data)


def _bytes(entry: PolicyEntry) -> int:
    return sum(len(text) for text in policy_files(entry.policy, entry.key).values())


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
    """Why this policy can never be given to pods, None if it can."""
    if fit((entry,)):
        return None
    if _bytes(entry) > MAX_TEXT_BYTES:
        return f"its {_bytes(entry) / 1e6:.1f} MB of text are more than the {MAX_TEXT_BYTES / 1e6:.1f} MB that a ConfigMap holds"
    return (
        f"its similarity artefact is larger than the {MAX_FILE_BYTES / 1e6:.0f} MB that pods can be given; make it smaller with "
        "`sere similarity pack`"
    )


def fit(entries: Iterable[PolicyEntry | None]) -> bool:
    """Whether there is room for these policies, and places for their similarity artefacts, each once."""
    there = [entry for entry in entries if entry is not None]
    texts = {entry.policy.digest: _bytes(entry) for entry in there}
    return sum(texts.values()) <= MAX_TEXT_BYTES and sum(map(len, _artefacts(there).values())) <= POLICY_SHARDS


def _artefacts(entries: Iterable[PolicyEntry]) -> dict[str, tuple[str, ...]]:
    return dict(sorted(entry.similarity for entry in entries if entry.similarity is not None))
