"""The source of the CUDA kernel keeps the contract, has no data race, and would be caught without any of its barriers.

No GPU is involved: see emulator.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sere_ext.contract.policy import Kind
from sere_ext.routing import kernel
from sere_ext.routing.state import LayerState
from tests.emulated.emulator import BARRIER, SOURCE, Emulated, build, without_barrier
from tests.kit.reroute_contract import Call, KernelContract, Tensors, kernel_call, kernel_run, large, same

MOST_BARRIERS, LONGEST_CHAIN = 5, 8


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Emulated]:
    """The kernel as it is, the same with the race check, and with the race check but without one of its barriers."""
    folder: Path = tmp_path_factory.mktemp("emulated")
    sources = {"plain": SOURCE, "checked": SOURCE} | {f"without {n}": without_barrier(n) for n in range(SOURCE.count(BARRIER))}
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda item: build(folder, item[0], races=item[0] != "plain", source=item[1]), sources.items())
        return dict(zip(sources, made, strict=True))


@pytest.fixture(scope="class")
def emulated(request: pytest.FixtureRequest, versions: dict[str, Emulated]) -> None:
    request.cls.version = versions["plain"]


@pytest.mark.usefixtures("emulated")
class TestEmulatedCudaKernel(KernelContract):
    version: Emulated

    def launch(self, layer: LayerState, tensors: Tensors) -> None:
        self.version.launch(layer, tensors)


def calls() -> list[Call]:
    """Every kind, one and several tiles of tokens, every width of a group of lanes, both widths of ids, padding."""
    found = []
    for n, kind in enumerate([*Kind, *Kind, *Kind]):
        tokens, experts, top_k = (3, 40, 150)[n % 3], (16, 64, 128)[n // 2 % 3], (2, 8, 12)[n // 3 % 3]
        budget = experts // 4 if kind in (Kind.BUDGET, Kind.HYBRID) else 0
        call = large(kind, seed=n, tokens=tokens, experts=experts, top_k=top_k, rho=0.5, S=1 + n % 2, max_experts=budget)
        call["ids"] = call["ids"].to((torch.int32, torch.int64)[n % 2])
        call["freed_minus_one"] = n % 4 == 0
        if n % 3 == 1:
            call["real_tokens"] = tokens - 7
        found.append(call)
    return found


def on_cpu(layer: LayerState, tensors: Tensors) -> None:
    kernel.reroute_cpu(layer.struct, kernel_call(tensors))


def trouble(call: Call, launch: Callable[[LayerState, Tensors], None]) -> str | None:
    """What is wrong with a call: what the emulator found, or a difference to the CPU kernel."""
    try:
        same(kernel_run(call, launch), kernel_run(call, on_cpu), call)
    except (RuntimeError, AssertionError, pytest.fail.Exception) as error:
        return str(error)
    return None


def test_no_call_has_a_data_race(versions: dict[str, Emulated]) -> None:
    found = {n: why for n, call in enumerate(calls()) if (why := trouble(call, versions["checked"].launch))}
    assert not found


def test_every_barrier_is_needed(versions: dict[str, Emulated]) -> None:
    """And so no barrier is missing that the check would not see: taking out any of them is found."""
    assert 1 <= SOURCE.count(BARRIER) <= MOST_BARRIERS
    for name, version in versions.items():
        if name.startswith("without"):
            assert any(trouble(call, version.launch) for call in calls()), f"nothing notices the kernel {name}"


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("experts", [128, 512])
def test_the_chain_of_loads_at_one_token_is_short(versions: dict[str, Emulated], kind: Kind, experts: int) -> None:
    """At one token a launch takes as long as its loads that wait for each other. None is similar enough: the longest look."""
    chains = []

    def launch(layer: LayerState, tensors: Tensors) -> None:
        layer.limits[:] = experts - 1  # all of its neighbours may stand in, and few are active
        chains.append(versions["checked"].chain(layer, tensors))

    for S in (1, 2):
        budget = 4 if kind in (Kind.BUDGET, Kind.HYBRID) else 0
        kernel_run(large(kind, seed=S, tokens=1, experts=experts, top_k=8, S=S, rho=0.0, max_experts=budget), launch)
    assert 1 <= max(chains) <= LONGEST_CHAIN, chains
