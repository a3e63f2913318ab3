"""The declarative source: what a projected volume says the policy should be, applied whenever it changes.

`desired` is pure: names and contents of the small files in, one decision out. `Watcher` does the reading and the
applying. Order of what decides: override > pod.policy > stable. A digest that is missing or damaged never changes what
is in force; it is said in `error`. A similarity artefact lies there whole or in shards, each from a ConfigMap of its own, and the
kubelet may show a policy a moment before all of them: for that moment nothing is wrong. Files are in ARCHITECTURE.md.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sere_ext.contract.errors import PolicyError, SereError, SimilarityError
from sere_ext.contract.policy import EXACT_POLICY, Policy
from sere_ext.contract.profile import ProfileKey
from sere_ext.contract.shards import join, pieces
from sere_ext.contract.similarity import similarity_file
from sere_ext.contract.validation import explain

if TYPE_CHECKING:
    from sere_ext.control.live import LiveControl

logger = logging.getLogger("vllm.sere")

POLL_SECONDS = 0.25  # the kubelet shows a change within 0.2 s; reading a few small files costs microseconds
RETRY_SECONDS = 5.0  # after the engine refused what the files say
PATIENCE_SECONDS = 30.0  # for an artefact that is not there whole: the operator has the kubelet look again after 15 s
EXACT = "exact"


@dataclass(frozen=True)
class Desired:
    """What the files ask for. `policy` None: keep what is in force, `error` says why."""

    policy: Policy | None
    similarity: str | None = None  # name of the artefact's file
    override: bool = False
    error: str | None = None
    awaited: bool = False  # what is missing of the artefact may still be on its way
    shards: tuple[str, ...] = field(default=(), compare=False)  # names of the files to join; none: it is there whole
    by: str = field(default="", compare=False)  # the file that decided, for the audit trail


def desired(files: Mapping[str, bytes], key: ProfileKey | None) -> Desired:
    """Decide from the directory's files.

    Args:
        files: content by name; of similarity artefacts the name suffices.
        key: what this engine is; None if not known yet, then keys are not compared.
    """
    overrides = {name: _word(files, name) for name in ("pod.override", "override")}
    if unknown := [f"{name} is {value!r}" for name, value in overrides.items() if value not in ("", EXACT)]:
        return Desired(None, error=f"{unknown[0]}; it should be `exact` or empty")
    if EXACT in overrides.values():
        return Desired(EXACT_POLICY, override=True, by=next(name for name, value in overrides.items() if value))
    by = "pod.policy" if _word(files, "pod.policy") else "stable"
    digest = _word(files, by)
    if not digest:
        return Desired(None, error="no policy is named: neither pod.policy nor stable holds a digest")
    return replace(_named(files, digest, key), by=by)


def _named(files: Mapping[str, bytes], digest: str, key: ProfileKey | None) -> Desired:
    """What a digest stands for."""
    if digest == EXACT:
        return Desired(EXACT_POLICY)
    text = files.get(f"{digest}.json")
    if text is None:
        return Desired(None, error=f"policy {digest} is missing: there is no {digest}.json; the policy in force stays")
    try:
        policy = Policy.parse(text)
    except PolicyError as error:
        return Desired(None, error=f"{digest}.json: {error}")
    if policy.digest != digest:
        return Desired(None, error=f"{digest}.json holds policy {policy.digest}; the policy in force stays")
    if stale := _stale(files.get(f"{digest}.key.json"), key, digest):
        return Desired(EXACT_POLICY, error=stale)
    if not policy.needs_similarity():
        return Desired(policy)
    if policy.similarity_digest is None:
        return Desired(None, error=f"{digest}.json has no similarityDigest, so its similarity file is not known")
    name = similarity_file(policy.similarity_digest)
    if name in files:
        return Desired(policy, name)
    there, count = pieces(files, name)
    if count and len(there) == count:
        return Desired(policy, name, shards=tuple(there))
    lacking = f"of which {len(there)} of {count} shards are there" if count else "which is missing"
    said = f"policy {digest} needs {name}, {lacking}; the policy in force stays"
    return Desired(None, name, error=said, awaited=True)


def _word(files: Mapping[str, bytes], name: str) -> str:
    return files.get(name, b"").decode("utf-8", "replace").strip()


def _stale(text: bytes | None, key: ProfileKey | None, digest: str) -> str | None:
    if text is None or key is None:
        return None
    try:
        made = ProfileKey.model_validate_json(text)
    except ValidationError as error:
        return f"PolicyStale: {digest}.key.json: {explain(error, ProfileKey)}; serving exact routing"
    mismatch = made.mismatch(key)
    return f"PolicyStale: {mismatch}; serving exact routing until the next tuning" if mismatch else None


def read_directory(directory: Path) -> dict[str, bytes]:
    """Small files by name, of one version of a projected volume (`..data` swaps all at once); artefacts by name alone.

    A file that goes away while reading is left out; the next poll sees the new version.
    """
    version = directory / "..data"
    root = Path(os.path.realpath(version)) if version.exists() else directory
    files: dict[str, bytes] = {}
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return {}
    for name in names:
        path = root / name
        if name.startswith("..") or not path.is_file():
            continue
        try:
            files[name] = b"" if ".safetensors" in name else path.read_bytes()
        except OSError:
            continue
    return files


class Watcher:
    """Polls the directory and applies what it asks for."""

    def __init__(self, control: LiveControl, directory: str | Path) -> None:
        self._control = control
        self._directory = Path(directory)
        self._key: ProfileKey | None = None
        self._applied: Desired | None = None
        self._refused: Desired | None = None
        self._retry_at = 0.0
        self._awaited: tuple[str | None, float] | None = None  # an artefact, and since when it is not there whole

    async def run(self) -> None:
        """For ever; nothing in a directory may end it."""
        while True:
            try:
                await self.once()
            except Exception:
                logger.exception("sere: the policy directory could not be read; trying again")
            await asyncio.sleep(POLL_SECONDS)

    async def once(self) -> None:
        """Read, decide, apply if it differs from what was applied."""
        if self._key is None:
            state = await self._control.state()
            self._key = ProfileKey.model_validate(state["key"])
        want = desired(read_directory(self._directory), self._key)
        now = asyncio.get_running_loop().time()
        if self._patient(want, now):
            want = Desired(None)
        if want == self._applied or (self._retry_at > now and self._refused == want):
            return
        if want.policy is None:
            await self._control.say(want.error)
            self._applied = want
            if want.error:
                logger.warning("sere: %s", want.error)
            return
        await self._apply(want, want.policy, now)

    def _patient(self, want: Desired, now: float) -> bool:
        """Whether to wait without a word for the rest of an artefact."""
        if not want.awaited:
            self._awaited = None
            return False
        if self._awaited is None or self._awaited[0] != want.similarity:
            self._awaited = (want.similarity, now)
        return now - self._awaited[1] < PATIENCE_SECONDS

    async def _apply(self, want: Desired, policy: Policy, now: float) -> None:
        from sere_ext.control.live import PolicyChange

        # With the policy, not after it: whoever reads the state must not see an override beside what it replaced.
        note = {"override": want.override, "error": want.error}
        who = f"{self._directory}/{want.by}"
        try:
            with ExitStack() as stack:
                try:
                    path = stack.enter_context(_whole(self._directory, want))
                except SimilarityError as error:
                    self._control.refuse("file", who, error, policy)
                    raise
                await self._control.change(PolicyChange(policy=policy, similarity=path), "file", who, note=note)
        except SereError as error:
            self._refused, self._retry_at = want, now + RETRY_SECONDS
            logger.warning("sere: %s", error)
            await self._control.say(str(error))
        else:
            self._applied, self._refused = want, None


@contextmanager
def _whole(directory: Path, want: Desired) -> Iterator[str | None]:
    """The path of the artefact's file. Shards are joined into one that is there while the engine reads it.

    Raises:
        SimilarityError: they do not make the file that their headers name.
    """
    if want.similarity is None or not want.shards:
        yield str(directory / want.similarity) if want.similarity else None
        return
    with tempfile.TemporaryDirectory(prefix="sere-") as scratch:
        path = Path(scratch) / want.similarity
        try:
            path.write_bytes(join([(directory / name).read_bytes() for name in want.shards]))
        except OSError as error:
            raise SimilarityError(f"the shards of {want.similarity} cannot be joined: {error}") from error
        yield str(path)


def policy_files(policy: Policy, key: ProfileKey | None = None) -> dict[str, Any]:
    """Names and texts under which a policy lies in the directory; for writers and tests."""
    import json

    files = {f"{policy.digest}.json": json.dumps(policy.to_json_dict())}
    if key is not None:
        files[f"{policy.digest}.key.json"] = json.dumps(key.to_json_dict())
    return files
