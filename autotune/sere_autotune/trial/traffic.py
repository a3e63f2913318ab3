"""Which requests a block sends: the labelled items themselves, or mixed one to one with a workload of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sere_autotune.trial.items import Item
from sere_autotune.trial.load import Request
from sere_autotune.tuning.spec import WorkloadSpec
from sere_ext.contract.errors import UsageError
from sere_ext.contract.records import prompt_of, read_rows

_DATASET = "workload.dataset"


def dataset_requests(workload: WorkloadSpec) -> list[Request]:
    """A request for every row of `workload.dataset`; of a conversation the first question, as `vllm bench serve` takes it.

    Raises:
        UsageError: with file and line, for what cannot be read or asks nothing; a file without a row.
    """
    if workload.dataset is None:
        return []
    found = []
    for row in read_rows(workload.dataset, _DATASET):
        prompt = prompt_of(row, _DATASET, first_turn=True)
        found.append(Request(prompt.text, workload.dataset_max_tokens, messages=prompt.messages, place=row.place))
    if not found:
        raise UsageError(f"{_DATASET}: no prompts in {workload.dataset}")
    return found


class Traffic:
    """Makes the requests of a block from labelled items. Deterministic, so that both arms of a pair get the same."""

    def __init__(self, workload: WorkloadSpec, items: Sequence[Item]) -> None:
        self.others: list[Request] = []
        if workload.dataset:
            own = {item.prompt for item in items}
            self.others = [request for request in dataset_requests(workload) if request.prompt not in own]
        elif workload.synthetic:
            self.others = synthetic_requests(workload, [item.prompt for item in items])
        random.Random(workload.seed).shuffle(self.others)

    @property
    def labelled_share(self) -> float:
        return 0.5 if self.others else 1.0

    @property
    def timed(self) -> str:
        """Whose latency is judged: the workload's own prompts where there are any."""
        return "unlabelled" if self.others else "all"

    def requests(self, items: Sequence[Item], offset: int = 0) -> list[Request]:
        """The items in order; each followed by one prompt of the workload where it has its own."""
        found = []
        for index, item in enumerate(items):
            found.append(Request.of(item))
            if self.others:
                found.append(self.others[(offset + index) % len(self.others)])
        return found


def synthetic_requests(workload: WorkloadSpec, texts: Sequence[str]) -> list[Request]:
    """Prompts of the wanted length: texts joined until long enough, cut by the engine's tokenizer."""
    assert workload.synthetic is not None
    rng = random.Random(workload.seed)
    wanted = workload.synthetic
    found = []
    for _ in range(256):
        text = ""
        while len(text) < wanted.input_tokens * 8:  # a token rarely stands for more than 8 characters
            text += rng.choice(texts) + "\n"
        found.append(Request(text, wanted.output_tokens, ignore_eos=True, cut_tokens=wanted.input_tokens))
    return found
