"""The declarative source: an engine serves what its policy volume (`sere_ext.contract.volume`) asks for.

The volume decides what to serve; here the folder is read, a change is applied, and a refusal is tried again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sere_ext.contract.errors import SereError, SimilarityError, SpecError
from sere_ext.contract.policy import Policy
from sere_ext.contract.profile import ProfileKey
from sere_ext.contract.shards import join
from sere_ext.contract.state import PolicyChange
from sere_ext.contract.volume import SLO, Desired, desired, is_artefact, named_slo
from sere_ext.control.live import LiveControl

logger = logging.getLogger("vllm.sere")

POLL_SECONDS = 0.25  # the kubelet shows a change within 0.2 s; reading a few small files costs microseconds
RETRY_SECONDS = 5.0  # from a refusal by the engine to the next attempt
PATIENCE_SECONDS = 30.0  # until missing shards are an error: the operator has the kubelet look again after 15 s


def read_directory(directory: Path) -> dict[str, bytes]:
    """The contents of a policy volume's small files by name; of similarity files and shards only the names, with empty contents.

    All files are of one version of the volume (the kubelet swaps the link `..data` for all at once). A file that goes away
    while it is read is left out; the next poll sees the new version.
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
            files[name] = b"" if is_artefact(name) else path.read_bytes()
        except OSError:
            continue
    return files


class Watcher:
    """Polls a policy volume and applies what it asks for to one engine."""

    def __init__(self, control: LiveControl, directory: str | Path) -> None:
        self._control = control
        self._directory = Path(directory)
        self._key: ProfileKey | None = None
        self._applied: Desired | None = None
        self._refused: Desired | None = None
        self._retry_at = 0.0
        self._slo: bytes | None = None  # the file as it was read last
        self._awaited: tuple[str | None, float] | None = None  # an artefact, and since when it is not there whole

    async def run(self) -> None:
        """Poll for ever; nothing in a folder may end the loop."""
        while True:
            try:
                await self.once()
            except Exception:
                logger.exception("sere: the policy directory could not be read; trying again")
            await asyncio.sleep(POLL_SECONDS)

    async def once(self) -> None:
        """Read the folder, decide, and apply the decision if it differs from the one applied before."""
        if self._key is None:
            self._key = (await self._control.state()).key
        files = read_directory(self._directory)
        self._read_slo(files)
        want = desired(files, self._key)
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

    def _read_slo(self, files: dict[str, bytes]) -> None:
        """Give the latency limits to the metrics. A damaged file is logged once, and the limits before it stay."""
        if files.get(SLO) == self._slo:
            return
        self._slo = files.get(SLO)
        try:
            self._control.slo = named_slo(files)
        except SpecError as error:
            logger.warning("sere: %s; the latency histograms keep their bounds", error)

    def _patient(self, want: Desired, now: float) -> bool:
        """Whether to wait, reporting nothing, for shards of a similarity file that may still be on their way."""
        if not want.awaited:
            self._awaited = None
            return False
        if self._awaited is None or self._awaited[0] != want.similarity:
            self._awaited = (want.similarity, now)
        return now - self._awaited[1] < PATIENCE_SECONDS

    async def _apply(self, want: Desired, policy: Policy, now: float) -> None:
        # The override travels with the policy: nobody may read an override beside the policy that it replaced.
        who = f"{self._directory}/{want.by}"
        try:
            with ExitStack() as stack:
                try:
                    path = stack.enter_context(_whole(self._directory, want))
                except SimilarityError as error:
                    self._control.refuse("file", who, error, policy)
                    raise
                await self._control.change(
                    PolicyChange(policy=policy, similarity=path), "file", who, override=want.override, error=want.error
                )
        except SereError as error:
            self._refused, self._retry_at = want, now + RETRY_SECONDS
            logger.warning("sere: %s", error)
            await self._control.say(str(error))
        else:
            self._applied, self._refused = want, None


@contextmanager
def _whole(directory: Path, want: Desired) -> Iterator[str | None]:
    """Give the path of the wanted similarity file, None where none is wanted.

    Shards are joined into a temporary file, which exists as long as the context.

    Raises:
        SimilarityError: the shards do not make the file that their headers name.
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
