"""What every implementation of re-routing must keep: reference, CPU kernel and CUDA kernel inherit these tests.

A subclass says how to run one call; `kernel_run` does it for a compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sere_ext.contract.policy import Kind
from sere_ext.routing import kernel
from sere_ext.routing.ops import call_of
from sere_ext.routing.reference import Rerouted, reroute
from sere_ext.routing.state import LayerState
from sere_ext.similarity.file import sorted_neighbours

Call = dict[str, Any]  # the arguments of `reference.reroute`
Tensors = dict[str, torch.Tensor]  # weights and ids, which a kernel rewrites, and logits

# One strategy for all implementations; a test method that a class inherits is meant to run in several.
inherited = settings(deadline=None, suppress_health_check=[HealthCheck.differing_executors])
inherited_often = settings(inherited, max_examples=300)


def kernel_run(call: Call, launch: Callable[[LayerState, Tensors], None]) -> Rerouted:
    """One call through a compiled kernel: `launch(layer, tensors)` runs it and leaves the counters in the layer."""
    ids, weights, logits = call["ids"].clone().contiguous(), call["weights"].clone().contiguous(), call.get("logits")
    experts, tokens = call["num_experts"], call.get("real_tokens")
    layer = LayerState(
        0,
        experts,
        ids.shape[1],
        call.get("renormalise", False),
        kernel.SIGMOID if call.get("scoring") == "sigmoid" else kernel.SOFTMAX,
        kernel.MINUS_ONE if call.get("freed_minus_one") else kernel.REPEAT,
        call.get("constants", ()),
    )
    if call.get("similarity") is not None:
        layer.load_similarity(*sorted_neighbours(call["similarity"].numpy()))
    options = {name: call[name] for name in ("max_experts", "rho", "min_share") if name in call}
    layer.load_row(3, (1, 2**30), call["kind"], call.get("S", 1), **options)  # the rows before it are unused
    if tokens is not None:
        layer.real[0] = tokens
    tensors = {"weights": weights, "ids": ids, "logits": torch.zeros(ids.shape[0], experts) if logits is None else logits}
    launch(layer, tensors)
    tokens = ids.shape[0] if tokens is None else tokens
    row = 3 if tokens else -1  # an empty batch is outside every bucket
    counter = dict(zip(kernel.COUNTERS, layer.counters[row].tolist(), strict=True))
    assert layer.counters.sum() == layer.counters[row].sum(), "counted in a row of another bucket"
    assert counter.pop("calls") == 1
    assert counter.pop("tokens") == tokens
    return Rerouted(
        tensors["ids"].cpu(), tensors["weights"].cpu(), counter["activeBefore"], counter["activeAfter"], counter["slots"],
        counter["rerouted"], counter["merged"],
    )  # fmt: skip


def kernel_call(tensors: Tensors) -> kernel.Call:
    return call_of(**tensors)


@st.composite
def routings(draw: st.DrawFn) -> Call:
    """A random call: ties in weights and similarities, freed and out-of-range slots, padding, NaN similarity."""
    experts = draw(st.one_of(st.integers(1, 12), st.integers(30, 70)))
    k = draw(st.integers(1, min(8, experts)))
    tokens = draw(st.integers(0, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(list(Kind)))
    logits = rng.integers(-4, 5, (tokens, experts)).astype(np.float32) / 2
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k]
    if draw(st.booleans()):
        ids = rng.integers(0, experts, (tokens, k))  # duplicates within a token
    weights = rng.integers(0, 5, (tokens, k)).astype(np.float32) / 8
    if draw(st.booleans()):
        ids[rng.random((tokens, k)) < 0.1] = rng.choice([-1, experts, experts + 3])
        weights[rng.random((tokens, k)) < 0.05] = np.nan
        logits[rng.random(logits.shape) < 0.05] = -np.inf
    similarity = rng.integers(0, 5, (experts, experts)).astype(np.float32) / 4
    if draw(st.booleans()):
        similarity[rng.random((experts, experts)) < 0.2] = np.nan
    constants = tuple(np.flatnonzero(rng.random(experts) < 0.3).tolist()) if draw(st.booleans()) else ()
    real_tokens = draw(st.none() | st.integers(0, tokens))
    if real_tokens is not None and draw(st.booleans()):
        ids[real_tokens:] = -1
    return {
        "ids": torch.from_numpy(ids).to(draw(st.sampled_from([torch.int32, torch.int64]))),
        "weights": torch.from_numpy(weights),
        "num_experts": experts,
        "kind": kind,
        "S": draw(st.integers(1, k)),
        "min_share": draw(st.sampled_from([0.0, 0.0, 0.3, 0.5, 1.0])),
        "rho": draw(st.sampled_from([0.0, 0.25, 0.3, 1.0])),
        "max_experts": draw(st.integers(0, experts)) if kind in (Kind.BUDGET, Kind.HYBRID) else 0,
        "similarity": torch.from_numpy(similarity),
        "real_tokens": real_tokens,
        "renormalise": draw(st.booleans()),
        "logits": torch.from_numpy(logits),
        "scoring": draw(st.sampled_from(["softmax", "sigmoid"])),
        "freed_minus_one": draw(st.booleans()),
        "constants": constants,
    }


def large(kind: Kind, *, seed: int, tokens: int = 33, experts: int = 512, top_k: int = 16, **options: Any) -> Call:
    """A routing as a router makes it, of a big model."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator) + torch.randn(experts, generator=generator)
    weights, ids = logits.softmax(1).topk(top_k)
    similarity = torch.rand(experts, experts, generator=generator)
    return {
        "ids": ids, "weights": weights / weights.sum(1, keepdim=True), "num_experts": experts, "kind": kind, "S": 2, "rho": 0.95,
        "similarity": similarity, "logits": logits, "renormalise": True,
    } | options  # fmt: skip


def same(got: Rerouted, want: Rerouted, call: Call) -> None:
    """Assert that two results agree; a failure names token, slot, expert and both values."""
    settings_ = {
        name: call[name]
        for name in (
            "kind",
            "S",
            "min_share",
            "rho",
            "max_experts",
            "renormalise",
            "scoring",
            "real_tokens",
            "freed_minus_one",
            "constants",
        )
        if name in call
    }
    # Scaled and refilled weights: sums and exponentials may round differently.
    rtol = 0.0 if call["kind"] in (Kind.EXACT, Kind.SERE) else 1e-5
    close = torch.isclose(got.weights, want.weights, rtol=rtol, atol=rtol * 1e-3, equal_nan=True)
    if wrong := ((got.ids != want.ids) | ~close).nonzero().tolist():
        token, slot = wrong[0]
        at = (token, slot)
        pytest.fail(
            f"token {token}, slot {slot}: expert {got.ids[at]} with weight {got.weights[at]}, "
            f"not expert {want.ids[at]} with weight {want.weights[at]} ({len(wrong)} slots differ); "
            f"router: experts {call['ids'][token].tolist()}, weights {call['weights'][token].tolist()}; {settings_}"
        )
    assert got.ids.dtype == want.ids.dtype
    counted = [(r.active_before, r.active_after, r.slots, r.rerouted, r.merged) for r in (got, want)]
    assert counted[0] == counted[1], f"active before, after, slots, re-routed, merged; {settings_}"


def dense(out: Rerouted, experts: int) -> torch.Tensor:
    """[T, E] float64: each expert's weight; ids outside [0, E) have none."""
    valid = (out.ids >= 0) & (out.ids < experts) & ~out.weights.isnan()
    table = torch.zeros(out.ids.shape[0], experts, dtype=torch.float64)
    return table.scatter_add(1, out.ids.long().where(valid, 0), out.weights.double().where(valid, 0.0))


class RerouteContract:
    """Inherit it and say how to run a call."""

    def run(self, call: Call) -> Rerouted:
        raise NotImplementedError

    @inherited_often
    @given(routings())
    def test_equals_the_reference(self, call: Call) -> None:
        same(self.run(call), reroute(**call), call)

    @inherited_often
    @given(routings())
    def test_what_holds_for_every_kind(self, call: Call) -> None:
        ids, weights, kind, experts = call["ids"], call["weights"], call["kind"], call["num_experts"]
        real = ids.shape[0] if call["real_tokens"] is None else call["real_tokens"]
        out = self.run(call)
        assert out.ids.shape == ids.shape
        assert out.weights.dtype == torch.float32
        assert torch.equal(out.ids[real:], ids[real:]), "padding rows stay as they are"
        assert torch.equal(out.weights[real:].nan_to_num(-1), weights[real:].nan_to_num(-1))
        for row in range(real):
            valid = (ids[row] >= 0) & (ids[row] < experts) & (weights[row] != 0) & ~weights[row].isnan()
            constant = torch.isin(ids[row], torch.tensor(call["constants"], dtype=ids.dtype))
            valid &= ~constant
            for expert in call["constants"]:
                given, left = (w[i == expert].nansum() for i, w in ((ids[row], weights[row]), (out.ids[row], out.weights[row])))
                assert left == given, "a constant costs nothing, so it keeps its weight, and nobody is sent to it"
            outside = {int(i) for i in ids[row] if i < 0 or i >= experts}
            held = out.weights[row] != 0
            if call["freed_minus_one"]:
                used = [int(i) for i, w in zip(out.ids[row], out.weights[row], strict=True) if 0 <= i < experts and w != 0]
                distinct = len(set(ids[row].tolist())) == ids.shape[1] and not weights[row].isnan().any()
                assert not distinct or len(used) == len(set(used)), "a token names an expert twice"
            else:
                assert {int(i) for i in out.ids[row] if i < 0 or i >= experts} == outside, "an id was freed to outside [0, E)"
            if kind is not Kind.EXACT and valid.any():
                assert held[: int(held.sum())].all(), "slots with a weight must stand left"
            if kind is Kind.SERE and not weights[row].isnan().any():
                torch.testing.assert_close(out.weights[row].sum(), weights[row].sum())
                slots = zip(out.ids[row].tolist(), out.weights[row].tolist(), strict=True)
                kept = [i for i, w in slots if 0 <= i < experts and w != 0 and i not in call["constants"]]
                assert len(kept) == len(set(kept)), "slots on one expert must be merged"
        assert out.active_after <= out.active_before, "re-routing may not wake an expert"

    @inherited
    @given(routings())
    def test_the_same_call_gives_the_same_bits(self, call: Call) -> None:
        one, two = self.run(call), self.run(call)
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(one.weights.view(torch.int32), two.weights.view(torch.int32))

    @inherited
    @given(routings())
    def test_merged_weights_are_those_of_the_unmerged_form(self, call: Call) -> None:
        """Every slot sent to its stand-in one by one, without merging: each expert gets the same weight."""
        call = call | {"kind": Kind.SERE, "min_share": 0.0, "max_experts": 0, "weights": call["weights"].nan_to_num(0.125)}
        experts, similarity = call["num_experts"], call["similarity"].nan_to_num(-1).tolist()
        want = torch.zeros(len(call["ids"]), experts, dtype=torch.float64)
        rows = []
        for row, (ids, weights) in enumerate(zip(call["ids"].tolist(), call["weights"].tolist(), strict=True)):
            is_real = call["real_tokens"] is None or row < call["real_tokens"]
            slots = [(w, e) for w, e in zip(weights, ids, strict=True) if 0 <= e < experts and w]
            by_rank = sorted(slots, key=lambda slot: (-slot[0], slot[1]))
            rows.append((is_real, [slot for slot in by_rank if slot[1] not in call["constants"]]))
            for weight, expert in slots:
                want[row, expert] += weight if expert in call["constants"] else 0.0
        primary = sorted({e for is_real, slots in rows for _, e in slots[: call["S"]] if is_real})
        for row, (is_real, slots) in enumerate(rows):
            for weight, expert in slots:
                best = max(primary, key=lambda p: (similarity[expert][p], -p), default=expert)
                moves = is_real and expert not in primary and similarity[expert][best] >= np.float32(call["rho"])
                want[row, best if moves else expert] += weight
        torch.testing.assert_close(dense(self.run(call), experts), want, rtol=1e-6, atol=1e-7)

    @inherited
    @given(routings())
    def test_a_budget_is_kept_unless_the_tops_are_more(self, call: Call) -> None:
        limit = call["num_experts"] // 2 + 1
        tops = self.run(call | {"kind": Kind.TOPK, "max_experts": 0}).active_after
        for kind in (Kind.BUDGET, Kind.HYBRID):
            similarity = torch.ones_like(call["similarity"])
            out = self.run(call | {"kind": kind, "max_experts": limit, "similarity": similarity})
            assert out.active_after <= max(limit, tops)

    @inherited
    @given(routings())
    def test_dropping_twice_drops_no_more(self, call: Call) -> None:
        for kind in (Kind.TOPK, Kind.BUDGET):
            call = call | {"kind": kind, "renormalise": False, "max_experts": 3 if kind is Kind.BUDGET else 0}
            once = self.run(call | {"freed_minus_one": False})
            twice = self.run(call | {"ids": once.ids, "weights": once.weights, "freed_minus_one": False})
            assert torch.equal(twice.weights.nan_to_num(-1), once.weights.nan_to_num(-1))
            assert (twice.rerouted, twice.merged) == (0, 0)

    @inherited
    @given(routings())
    def test_hybrid_is_sere_where_everything_is_alike(self, call: Call) -> None:
        alike = call | {"rho": 0.0, "max_experts": 0, "similarity": call["similarity"].nan_to_num(0)}
        hybrid, sere = (self.run(alike | {"kind": kind}) for kind in (Kind.HYBRID, Kind.SERE))
        assert torch.equal(hybrid.ids, sere.ids)
        assert torch.equal(hybrid.weights.nan_to_num(-1), sere.weights.nan_to_num(-1))

    def test_hybrid_is_oea_where_nothing_is_alike(self) -> None:
        both = [self.run(large(kind, seed=0, experts=64, top_k=8, rho=1.0)) for kind in (Kind.HYBRID, Kind.OEA)]
        torch.testing.assert_close(*(dense(out, 64) for out in both), rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("kind", list(Kind))
    @pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
    def test_the_largest_models(self, kind: Kind, wide: bool) -> None:
        for seed, top_k, limit in ((1, 16, 0), (2, kernel.MAX_TOP_K, 200), (3, 1, 0)):
            call = large(kind, seed=seed, top_k=top_k, S=min(2, top_k), max_experts=limit)
            call["ids"] = call["ids"].to(torch.int64 if wide else torch.int32)
            same(self.run(call), reroute(**call), call)

    @pytest.mark.parametrize("kind", list(Kind))
    @pytest.mark.parametrize("shape", [(0, 2), (1, 1)])
    def test_empty_and_smallest_batches(self, kind: Kind, shape: tuple[int, int]) -> None:
        call = {"ids": torch.zeros(shape, dtype=torch.int32), "weights": torch.ones(shape), "num_experts": 1, "kind": kind,
                "similarity": torch.ones(1, 1), "logits": torch.zeros(shape[0], 1)}  # fmt: skip
        out = self.run(call)
        assert out.ids.shape == shape
        assert out.active_after == min(shape[0], 1)

    def test_a_thousand_tokens(self) -> None:
        call = large(Kind.SERE, seed=4, tokens=1000, experts=64, top_k=4, rho=0.9, real_tokens=667)
        same(self.run(call), reroute(**call), call)

    # By hand: three tokens, k = 2, E = 4. Tops are 0, 0, 1; secondaries 2, 3, 3. 2 is like 1, 3 is like nothing much.

    def example(self, kind: Kind, **options: Any) -> Rerouted:
        similarity = torch.tensor(
            [[1, 0.1, 0.2, 0.3], [0.1, 1, 0.9, 0.2], [0.2, 0.9, 1, 0.1], [0.3, 0.2, 0.1, 1]], dtype=torch.float32
        )
        call = {
            "ids": torch.tensor([[2, 0], [0, 3], [3, 1]], dtype=torch.int32),
            "weights": torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.125, 0.875]]),
            "num_experts": 4,
            "kind": kind,
            "S": 1,
            "similarity": similarity,
        } | options
        return self.run(call)

    def test_sere_takes_the_most_similar_primary_and_keeps_critical_experts(self) -> None:
        out = self.example(Kind.SERE, rho=0.5)
        assert out.ids.tolist() == [[1, 0], [0, 3], [3, 1]]
        assert out.weights.tolist() == [[0.25, 0.75], [0.75, 0.25], [0.125, 0.875]]
        assert (out.active_before, out.active_after, out.slots, out.rerouted, out.merged) == (4, 3, 6, 1, 0)

    def test_sere_merges_slots_of_one_token(self) -> None:
        out = self.example(Kind.SERE, rho=0.0)
        assert out.ids.tolist() == [[1, 0], [0, 0], [0, 1]]
        assert out.weights.tolist() == [[0.25, 0.75], [1.0, 0.0], [0.125, 0.875]]
        assert (out.active_after, out.rerouted, out.merged) == (2, 3, 1)

    def test_every_expert_critical_is_exact(self) -> None:
        out = self.example(Kind.SERE, rho=1.0)
        assert out.ids.tolist() == [[2, 0], [0, 3], [3, 1]]
        assert (out.rerouted, out.merged) == (0, 0)

    def test_nan_similarity_never_qualifies(self) -> None:
        out = self.example(Kind.SERE, rho=0.0, similarity=torch.full((4, 4), torch.nan))
        assert out.ids.tolist() == [[2, 0], [0, 3], [3, 1]]

    def test_ties_in_similarity_go_to_the_lower_id(self) -> None:
        out = self.example(Kind.SERE, rho=0.0, similarity=torch.ones(4, 4))
        assert out.ids.tolist() == [[0, 0], [0, 0], [0, 1]]

    def test_ties_in_weight_rank_the_lower_id_first(self) -> None:
        ids = torch.tensor([[3, 1]], dtype=torch.int64)
        out = self.run({"ids": ids, "weights": torch.tensor([[0.5, 0.5]]), "num_experts": 4, "kind": Kind.TOPK, "S": 1})
        assert out.ids.tolist() == [[1, 1]]
        assert out.weights.tolist() == [[0.5, 0.0]]

    def test_primaries_are_the_union_over_real_rows_only(self) -> None:
        out = self.example(Kind.SERE, rho=0.0, real_tokens=2)
        assert out.ids.tolist() == [[0, 0], [0, 0], [3, 1]], "expert 1 is a primary of a padding row alone"

    def test_topk_drops_the_rest_and_renormalises_where_the_model_does(self) -> None:
        out = self.example(Kind.TOPK)
        assert out.ids.tolist() == [[0, 0], [0, 0], [1, 1]]
        assert out.weights.tolist() == [[0.75, 0.0], [0.75, 0.0], [0.875, 0.0]]
        assert self.example(Kind.TOPK, renormalise=True).weights.tolist() == [[1.0, 0.0]] * 3

    def test_oea_refills_from_the_tokens_own_scores_among_active_experts(self) -> None:
        logits = torch.tensor([[2.0, 1.0, 1.5, 0.0], [2.0, 0.5, 0.0, 1.5], [0.0, 2.0, 0.0, 1.0]])
        out = self.example(Kind.OEA, logits=logits)
        assert out.ids.tolist() == [[1, 0], [0, 1], [0, 1]]
        torch.testing.assert_close(out.weights[0, 0], 0.75 * torch.tensor(-1.0).exp())

    def test_a_token_keeps_only_what_has_a_share_of_its_largest_weight(self) -> None:
        weights = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.625, 0.375]])
        for share, kept in ((0.5, [1, 2, 2]), (1.0, [1, 2, 1]), (0.0, [2, 2, 2])):
            out = self.example(Kind.TOPK, S=2, min_share=share, weights=weights)
            assert (out.weights != 0).sum(1).tolist() == kept, share
        assert self.example(Kind.SERE, S=2, min_share=0.5, weights=weights).active_after == 3, "2 is no token's top expert"

    def test_budget_keeps_every_top_and_adds_experts_by_summed_weight(self) -> None:
        # Tops 0, 0, 1; left over: 2 with 0.25, 3 with 0.25 + 0.125.
        out = self.example(Kind.BUDGET, max_experts=3)
        assert out.ids.tolist() == [[0, 0], [0, 3], [3, 1]]
        assert out.weights.tolist() == [[0.75, 0.0], [0.75, 0.25], [0.125, 0.875]]
        assert (out.active_after, out.rerouted, out.merged) == (3, 0, 1)
        assert self.example(Kind.BUDGET, max_experts=3, renormalise=True).weights[0].tolist() == [1.0, 0.0]
        assert self.example(Kind.BUDGET, max_experts=1).active_after == 2, "every token's top S stays, whatever the budget"

    def test_budget_takes_the_lower_id_of_equals(self) -> None:
        weights = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
        call = {
            "ids": torch.tensor([[0, 3], [0, 2]]),
            "weights": weights,
            "num_experts": 4,
            "kind": Kind.BUDGET,
            "max_experts": 2,
        }
        assert self.run(call).ids.tolist() == [[0, 0], [0, 2]]

    def test_a_constant_is_no_active_expert_and_stays_where_it_is(self) -> None:
        # Expert 0 is two tokens' top expert; as a constant it is free, so their next experts are their tops.
        out = self.example(Kind.SERE, rho=0.0, constants=(0,))
        assert out.ids.tolist() == [[2, 0], [0, 3], [3, 1]]
        assert (out.active_before, out.active_after, out.slots, out.rerouted) == (3, 3, 4, 0)
        out = self.example(Kind.TOPK, constants=(3,))
        assert out.ids.tolist() == [[0, 0], [0, 3], [3, 1]], "2 is freed; 3 costs nothing, so it is not"
        assert out.weights.tolist() == [[0.75, 0.0], [0.75, 0.25], [0.125, 0.875]]
        assert (out.active_before, out.active_after, out.slots, out.merged) == (3, 2, 4, 1)

    def test_hybrid_stands_in_where_alike_and_refills_elsewhere(self) -> None:
        logits = torch.tensor([[2.0, 1.0, 1.5, 0.0], [2.0, 0.5, 0.0, 1.5], [0.0, 2.0, 0.0, 1.0]])
        out = self.example(Kind.HYBRID, rho=0.5, logits=logits)
        assert out.ids.tolist() == [[1, 0], [0, 1], [0, 1]], "2 goes to 1, which it resembles; 3 resembles nothing"
        assert out.weights[0].tolist() == [0.25, 0.75]
        torch.testing.assert_close(out.weights[1, 1], 0.75 * torch.tensor(-1.5).exp())
        assert (out.active_after, out.rerouted, out.merged) == (2, 3, 0)


class KernelContract(RerouteContract):
    """What only a compiled kernel has: a table of buckets that changes in place, logits of other types."""

    def launch(self, layer: LayerState, tensors: Tensors) -> None:
        raise NotImplementedError

    def run(self, call: Call) -> Rerouted:
        return kernel_run(call, self.launch)

    def test_the_bucket_is_chosen_by_real_tokens_and_the_table_may_change(self) -> None:
        call = large(Kind.EXACT, seed=5, tokens=6, experts=16, top_k=4)
        layer = LayerState(0, 16, 4, True, kernel.SOFTMAX)
        for table, padded, row, width in (
            ([(1, 3, 1), (4, 8, 2)], 0, 1, 2),
            ([(1, 3, 1), (4, 8, 2)], 3, 0, 1),
            ([(7, 2**20, 1)], 0, -1, 4),
            ([], 0, -1, 4),  # the kill switch
        ):
            layer.load_table(())
            for index, (low, high, S) in enumerate(table):
                layer.load_row(index, (low, high), Kind.TOPK, S)
            layer.real[0] = 6 - padded
            tensors = {"weights": call["weights"].clone(), "ids": call["ids"].clone(), "logits": call["logits"]}
            calls = layer.counters[row, kernel.CALLS].item()
            self.launch(layer, tensors)
            assert layer.counters[row, kernel.CALLS] == calls + 1, table
            used = (tensors["weights"][: 6 - padded] != 0).sum(1)
            assert set(used.tolist()) == {width}, table

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", [Kind.OEA, Kind.HYBRID])
    def test_logits_of_half_the_width(self, kind: Kind, dtype: torch.dtype) -> None:
        call = large(kind, seed=6)
        call["logits"] = call["logits"].to(dtype)
        same(self.run(call), reroute(**call | {"logits": call["logits"].float()}), call)
