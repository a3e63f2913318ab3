"""The benchmarks' own arithmetic: many batches at once against the reference, intervals, and tables that cannot drift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import policies, render, rerouted
from benchmarks.lanes import Lanes
from sere_ext.contract.errors import PolicyError
from sere_ext.contract.policy import Kind
from sere_ext.routing import reference

EXPERTS, TOP_K, BATCHES, BATCH = 16, 4, 3, 5
OPTIONS = {"maxExperts": "max_experts", "minShare": "min_share"}  # outside name -> argument


class Routers(Lanes):
    """A model of which only the router's shape is there."""

    def __init__(self) -> None:
        self.experts, self.top_k, self.layers = EXPERTS, TOP_K, 2
        self.config = {"norm_topk_prob": True}


@pytest.mark.parametrize("bucket", rerouted.grid((1, 2, 3), (0.3, 0.5), (4, 8), EXPERTS), ids=rerouted.describe)
def test_many_batches_at_once_are_rerouted_as_each_one_alone(bucket: dict[str, Any]) -> None:
    """Batches share a tensor and nothing else: each gets what `reference.reroute` gives it by itself; the counts are theirs."""
    given = {OPTIONS.get(name, name): value for name, value in bucket.items()} | {"kind": Kind(bucket["kind"])}
    source = torch.Generator().manual_seed(1)
    logits = torch.randn(BATCHES * BATCH, EXPERTS, generator=source) * 2
    similarity = torch.rand(2, EXPERTS, EXPERTS, generator=source)
    similarity = (similarity + similarity.mT) / 2
    model = Routers()
    weights, ids = model.top(logits)
    route = rerouted.Rerouted(model, similarity, bucket, BATCH)
    found = route(1, logits)
    active = []
    for group in range(BATCHES):
        mine = slice(group * BATCH, (group + 1) * BATCH)
        told = reference.reroute(
            ids[mine],
            weights[mine],
            num_experts=EXPERTS,
            similarity=similarity[1],
            renormalise=True,
            logits=logits[mine],
            **given,
        )
        active.append(told.active_after)
        expected = torch.zeros(BATCH, EXPERTS).scatter_add_(1, told.ids.long(), told.weights)
        torch.testing.assert_close(found[mine], expected, atol=1e-6, rtol=0)
    assert route.counts()["active"] == pytest.approx(sum(active) / BATCHES)


def test_a_policy_that_the_model_cannot_run_is_refused() -> None:
    with pytest.raises(PolicyError, match="S"):
        rerouted.Rerouted(Routers(), torch.eye(EXPERTS).expand(2, -1, -1), {"kind": "topk", "S": TOP_K + 1}, BATCH)


@pytest.mark.parametrize(("losses", "gains", "n"), [(0, 0, 4000), (7, 2, 4000), (3, 9, 4000), (400, 100, 4000), (40, 0, 200)])
def test_the_interval_of_a_drop_holds_exactly_what_the_score_test_accepts(losses: int, gains: int, n: int) -> None:
    """Against the tuner's one-sided test at each limit that it is made for (drops above 0)."""
    from scipy import stats as sps

    from sere_autotune.trial.stats import noninferiority_p

    low, high = policies.drop_interval(losses, gains, n)
    assert low <= (losses - gains) / n <= high
    assert (low, high) == pytest.approx(tuple(-edge for edge in reversed(policies.drop_interval(gains, losses, n))), abs=1e-9)
    # The tuner's p-value has the chance of seeing no loss at all as its floor.
    assert noninferiority_p(losses, gains, n, high) == pytest.approx(max(1 - sps.norm.cdf(policies.Z), (1 - high) ** n), rel=0.01)


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.name)
def test_no_table_drifts_from_its_run(page: Path) -> None:
    """Every measured table is what `benchmarks/render.py` makes of the committed results."""
    text = page.read_text()
    assert "<!-- bench:" in text
    assert render.rendered(text) == text, f"{page.name} is out of date; run `python -m benchmarks.render`"
