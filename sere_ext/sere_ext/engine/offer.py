"""A similarity file on its way into a worker: parsed, checked and sorted by a thread, while the engine goes on stepping.

Sorting takes seconds for 60 layers of 512 experts, and an RPC keeps the engine from its next step until it answers.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sere_ext.routing.state import Neighbours


class Offer:
    """One file, from the moment when its bytes arrive until a change uses them or another file takes their place."""

    def __init__(self, digest: str, prepare: Callable[[], Neighbours]) -> None:
        self.digest = digest  # that the file's header names
        thread = ThreadPoolExecutor(1, thread_name_prefix="sere-similarity")
        self._neighbours = thread.submit(prepare)
        thread.shutdown(wait=False)

    @property
    def ready(self) -> bool:
        """Whether `neighbours` answers at once."""
        return self._neighbours.done()

    def neighbours(self) -> Neighbours:
        """What the thread made of the file.

        Raises:
            SimilarityError: the file is damaged, or was made for another model.
        """
        return self._neighbours.result()
