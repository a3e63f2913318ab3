"""The re-routing contract, on random and on hand-made routings: reference and CPU kernel must both keep it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sere_ext.artifact import sorted_neighbours
from sere_ext.policy import Kind
from sere_ext.reference import Rerouted, reroute

from sere_ext import kernel

CODES = {Kind.EXACT: kernel.EXACT, Kind.SERE: kernel.SERE, Kind.TOPK: kernel.TOPK, Kind.OEA: kernel.OEA}


def run_kernel(ids: torch.Tensor, weights: torch.Tensor, **options: object) -> Rerouted:
    """The compiled kernel behind the reference's signature."""
    experts = int(options["num_experts"])  # type: ignore[call-overload]
    similarity = options.get("similarity")
    if similarity is None:
        similarity = torch.zeros(experts, experts)
    neighbours, similarities = sorted_neighbours(similarity.numpy())  # type: ignore[union-attr]
    real, logits = options.get("real"), options.get("logits")
    out_ids, out_weights = ids.clone().numpy(), weights.clone().numpy()
    counter = np.zeros(len(kernel.COUNTERS), np.int64)
    kernel.reroute(
        ids.numpy(),
        weights.numpy(),
        np.zeros(0, np.bool_) if real is None else ~real.numpy(),
        CODES[options["kind"]],  # type: ignore[index]
        options.get("S", 1),
        np.float32(options.get("rho", 0.0)),
        neighbours,
        similarities,
        bool(options.get("renormalise", False)),
        np.zeros((0, 0), np.float32) if logits is None else logits.numpy(),
        kernel.SIGMOID if options.get("scoring") == "sigmoid" else kernel.SOFTMAX,
        out_ids,
        out_weights,
        counter,
    )
    assert counter[kernel.CALLS] == 1
    assert counter[kernel.TOKENS] == (ids.shape[0] if real is None else int(real.sum()))
    return Rerouted(torch.from_numpy(out_ids), torch.from_numpy(out_weights), *map(int, counter[2:]))


@st.composite
def routings(draw: st.DrawFn) -> dict[str, object]:
    """A random call: ties in weights and similarities, freed and out-of-range slots, padding, NaN similarity."""
    experts = draw(st.integers(1, 12))
    k = draw(st.integers(1, min(5, experts)))
    tokens = draw(st.integers(0, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.integers(-4, 5, (tokens, experts)).astype(np.float32) / 2
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k]
    if draw(st.booleans()):
        ids = rng.integers(0, experts, (tokens, k))  # duplicates within a token
    weights = rng.integers(0, 5, (tokens, k)).astype(np.float32) / 8
    if draw(st.booleans()):
        ids[rng.random((tokens, k)) < 0.1] = rng.choice([-1, experts, experts + 3])
        weights[rng.random((tokens, k)) < 0.05] = np.nan
    similarity = rng.integers(0, 5, (experts, experts)).astype(np.float32) / 4
    if draw(st.booleans()):
        similarity[rng.random((experts, experts)) < 0.2] = np.nan
    real = rng.random(tokens) < 0.7 if draw(st.booleans()) else None
    if real is not None and draw(st.booleans()):
        ids[~real] = -1
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return {
        "ids": torch.from_numpy(ids).to(dtype),
        "weights": torch.from_numpy(weights),
        "num_experts": experts,
        "kind": draw(st.sampled_from(list(Kind))),
        "S": draw(st.integers(1, k)),
        "rho": draw(st.sampled_from([0.0, 0.25, 0.3, 1.0])),
        "similarity": torch.from_numpy(similarity),
        "real": None if real is None else torch.from_numpy(real),
        "renormalise": draw(st.booleans()),
        "logits": torch.from_numpy(logits),
        "scoring": draw(st.sampled_from(["softmax", "sigmoid"])),
    }


@settings(max_examples=400, deadline=None)
@given(routings())
def test_kernel_equals_reference(call: dict[str, object]) -> None:
    want, got = reroute(**call), run_kernel(**call)  # type: ignore[arg-type]
    where = f"kind {call['kind']}: ids {call['ids']}, weights {call['weights']}"
    assert torch.equal(got.ids, want.ids), where
    if call["kind"] in (Kind.EXACT, Kind.SERE):
        assert torch.equal(got.weights.nan_to_num(-1), want.weights.nan_to_num(-1)), where
    else:  # scaled weights: the sums of the scale may round differently
        torch.testing.assert_close(got.weights, want.weights, equal_nan=True, msg=where)
    assert got.__dict__ | {"ids": 0, "weights": 0} == want.__dict__ | {"ids": 0, "weights": 0}, where


@settings(max_examples=300, deadline=None)
@given(routings())
def test_contract(call: dict[str, object]) -> None:
    ids, weights, real = call["ids"], call["weights"], call["real"]
    out = reroute(**call)  # type: ignore[arg-type]
    assert isinstance(ids, torch.Tensor)
    assert isinstance(weights, torch.Tensor)
    assert out.ids.shape == ids.shape
    assert out.ids.dtype == ids.dtype
    assert out.weights.dtype == torch.float32
    if isinstance(real, torch.Tensor):  # padding rows stay as they are
        assert torch.equal(out.ids[~real], ids[~real])
        assert torch.equal(out.weights[~real].nan_to_num(-1), weights[~real].nan_to_num(-1))
    experts = int(call["num_experts"])  # type: ignore[call-overload]
    for row in range(ids.shape[0]):
        if isinstance(real, torch.Tensor) and not real[row]:
            continue
        valid = (ids[row] >= 0) & (ids[row] < experts) & (weights[row] != 0) & ~weights[row].isnan()
        outside = {int(i) for i in ids[row] if i < 0 or i >= experts}
        assert {int(i) for i in out.ids[row] if i < 0 or i >= experts} == outside, "an id was freed to outside [0, E)"
        held = out.weights[row] != 0
        if call["kind"] is not Kind.EXACT and valid.any():
            used = int(held.sum())
            assert held[:used].all(), "slots with a weight must stand left"
        if call["kind"] is Kind.SERE and not weights[row].isnan().any():
            torch.testing.assert_close(out.weights[row].sum(), weights[row].sum())
            kept = [int(i) for i, w in zip(out.ids[row], out.weights[row], strict=True) if 0 <= i < experts and w != 0]
            assert len(kept) == len(set(kept)), "slots on one expert must be merged"
    assert out.active_after <= out.active_before or call["kind"] is Kind.OEA
    assert out.active_after <= out.active_before, "re-routing may not wake an expert"


def example(kind: Kind, **options: object) -> Rerouted:
    """Three tokens, k = 2, E = 4. Tops are 0, 0, 1; secondaries 2, 3, 3. 2 is like 1, 3 is like nothing much."""
    similarity = torch.tensor(
        [[1, 0.1, 0.2, 0.3], [0.1, 1, 0.9, 0.2], [0.2, 0.9, 1, 0.1], [0.3, 0.2, 0.1, 1]], dtype=torch.float32
    )
    call = {
        "ids": torch.tensor([[2, 0], [0, 3], [3, 1]], dtype=torch.int32),
        "weights": torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.125, 0.875]]),
        "num_experts": 4, "kind": kind, "S": 1, "similarity": similarity,
    } | options  # fmt: skip
    both = reroute(**call), run_kernel(**call)  # type: ignore[arg-type]
    assert torch.equal(both[0].ids, both[1].ids)
    return both[0]


def test_sere_takes_the_most_similar_primary_and_keeps_critical_experts() -> None:
    out = example(Kind.SERE, rho=0.5)
    assert out.ids.tolist() == [[1, 0], [0, 3], [3, 1]]
    assert out.weights.tolist() == [[0.25, 0.75], [0.75, 0.25], [0.125, 0.875]]
    assert (out.active_before, out.active_after, out.slots, out.rerouted, out.merged) == (4, 3, 6, 1, 0)


def test_sere_merges_slots_of_one_token() -> None:
    out = example(Kind.SERE, rho=0.0)
    assert out.ids.tolist() == [[1, 0], [0, 0], [0, 1]]
    assert out.weights.tolist() == [[0.25, 0.75], [1.0, 0.0], [0.125, 0.875]]
    assert (out.active_after, out.rerouted, out.merged) == (2, 3, 1)


def test_rho_of_one_re_routes_nothing_and_all_critical_is_exact() -> None:
    out = example(Kind.SERE, rho=1.0)
    assert out.ids.tolist() == [[2, 0], [0, 3], [3, 1]]
    assert (out.rerouted, out.merged) == (0, 0)


def test_nan_similarity_never_qualifies() -> None:
    out = example(Kind.SERE, rho=0.0, similarity=torch.full((4, 4), torch.nan))
    assert out.ids.tolist() == [[2, 0], [0, 3], [3, 1]]


def test_ties_in_similarity_go_to_the_lower_id() -> None:
    out = example(Kind.SERE, rho=0.0, similarity=torch.ones(4, 4))
    assert out.ids.tolist() == [[0, 0], [0, 0], [0, 1]]


def test_ties_in_weight_rank_the_lower_id_first() -> None:
    ids = torch.tensor([[3, 1]], dtype=torch.int64)
    out = reroute(ids, torch.tensor([[0.5, 0.5]]), num_experts=4, kind=Kind.TOPK, S=1)
    assert out.ids.tolist() == [[1, 1]]
    assert out.weights.tolist() == [[0.5, 0.0]]


def test_primaries_are_the_union_over_real_rows_only() -> None:
    padding = torch.tensor([True, True, False])
    out = example(Kind.SERE, rho=0.0, real=padding)
    assert out.ids.tolist() == [[0, 0], [0, 0], [3, 1]], "expert 1 is a primary of a padding row alone"


def test_topk_drops_the_rest_and_renormalises_where_the_model_does() -> None:
    out = example(Kind.TOPK)
    assert out.ids.tolist() == [[0, 0], [0, 0], [1, 1]]
    assert out.weights.tolist() == [[0.75, 0.0], [0.75, 0.0], [0.875, 0.0]]
    assert example(Kind.TOPK, renormalise=True).weights.tolist() == [[1.0, 0.0]] * 3


def test_oea_refills_from_the_tokens_own_scores_among_active_experts() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.5, 0.0], [2.0, 0.5, 0.0, 1.5], [0.0, 2.0, 0.0, 1.0]])
    out = example(Kind.OEA, logits=logits)
    assert out.ids.tolist() == [[1, 0], [0, 1], [0, 1]]
    torch.testing.assert_close(out.weights[0, 0], 0.75 * torch.tensor(-1.0).exp())


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("shape", [(0, 2), (1, 1)])
def test_empty_and_smallest_batches(kind: Kind, shape: tuple[int, int]) -> None:
    call = {"ids": torch.zeros(shape, dtype=torch.int32), "weights": torch.ones(shape), "num_experts": 1, "kind": kind,
            "similarity": torch.ones(1, 1), "logits": torch.zeros(shape[0], 1)}  # fmt: skip
    for out in (reroute(**call), run_kernel(**call)):  # type: ignore[arg-type]
        assert out.ids.shape == shape
        assert out.active_after == min(shape[0], 1)


def test_columns_in_use_counts_the_widest_row() -> None:
    weights = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0]], np.float32)
    assert kernel.columns_in_use(weights) == 2
    assert kernel.columns_in_use(np.zeros((2, 4), np.float32)) == 1
    assert kernel.columns_in_use(np.array([[0, 0, 0, 1]], np.float32)) == 4
