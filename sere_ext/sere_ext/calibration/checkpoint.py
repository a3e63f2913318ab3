"""The running sums of a calibration on disk, so that a killed one goes on where it was. Beside the output, `OUT.part`.

A checkpoint holds what it was made from, field by field; sums of another model, data set or setting are never continued.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere_ext.calibration.moments import Moments
from sere_ext.contract.errors import UsageError
from sere_ext.contract.files import draft_of, write_whole

_KEY = "sere-checkpoint"
_WRITE_SHARE = 0.05  # of the time at most goes into writing checkpoints; below it, every batch is saved

Origin = dict[str, Any]  # JSON values by what they are called in a message


@dataclass
class Checkpoint:
    """The file, what its sums are made from, and how far they go."""

    path: Path
    origin: Origin
    done: int = 0  # texts that the sums hold
    _next_s: float = 0.0

    def restore(self, sums: dict[int, Moments]) -> str | None:
        """Take over `done` and the sums where the file fits.

        Returns:
            a sentence for the user: where it goes on, or why it starts anew. None if there is no file.
        """
        from safetensors import safe_open

        try:
            with safe_open(self.path, framework="np") as file:
                told = json.loads(file.metadata()[_KEY])
                differs = next((key for key in self.origin if told["origin"].get(key) != self.origin[key]), None)
                if differs is not None or set(told["origin"]) != set(self.origin):
                    return f"{self.path} is of another {differs or 'release'}, so it is not continued; starting anew"
                names = list(file.keys())
                for layer, total in sums.items():
                    prefix = f"{layer}."
                    total.restore({n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)})
            self.done = int(told["done"])
        except FileNotFoundError:
            return None
        except Exception as error:  # safetensors raises its own type for each kind of damage
            raise UsageError(f"the checkpoint {self.path} is damaged ({error}); remove it to start anew") from error
        return f"going on after {self.done} texts from {self.path}"

    def save(self, done: int, sums: dict[int, Moments]) -> None:
        """Remember that `done` texts are in the sums, unless that would spend too much of the time on writing."""
        began = time.monotonic()
        if began < self._next_s:
            return
        from safetensors.numpy import save_file

        tensors = {f"{layer}.{name}": value for layer, total in sums.items() for name, value in total.state().items()}
        told = json.dumps({"origin": self.origin, "done": done})
        write_whole(self.path, lambda draft: save_file(tensors, draft, metadata={_KEY: told}))
        ended = time.monotonic()
        self._next_s = ended + (ended - began) * (1 / _WRITE_SHARE - 1)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        draft_of(self.path).unlink(missing_ok=True)
