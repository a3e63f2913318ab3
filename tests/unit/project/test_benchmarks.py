"""The benchmarks' own arithmetic: dense policies against the reference, intervals, and tables that cannot drift."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sere_ext.contract.policy import Kind
from sere_ext.routing import reference

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

import dense  # noqa: E402
import policies  # noqa: E402
import render  # noqa: E402

EXPERTS, TOP_K, BATCHES, BATCH = 16, 4, 3, 5
OPTIONS = {"maxExperts": "max_experts", "minShare": "min_share"}  # outside name -> argument


@pytest.mark.parametrize("bucket", [b for b in policies.grid() if b["kind"] in set(Kind)], ids=policies.describe)
def test_dense_policies_are_the_references(bucket: dict[str, Any]) -> None:
    """Many batches at once give each batch what `reference.reroute` gives it alone."""
    given = {OPTIONS.get(name, name): value for name, value in bucket.items()} | {"kind": Kind(bucket["kind"])}
    source = torch.Generator().manual_seed(1)
    logits = torch.randn(BATCHES, BATCH, EXPERTS, generator=source) * 2
    similarity = torch.rand(EXPERTS, EXPERTS, generator=source)
    similarity = (similarity + similarity.T) / 2
    scores = logits.softmax(-1)
    weights, ids = scores.topk(TOP_K, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    mix = torch.zeros_like(scores).scatter_(2, ids, weights)
    found = dense.reroute(bucket, mix, scores, similarity, TOP_K)
    for group in range(BATCHES):
        told = reference.reroute(
            ids[group],
            weights[group],
            num_experts=EXPERTS,
            similarity=similarity,
            renormalise=True,
            logits=logits[group],
            **given,
        )
        expected = torch.zeros(BATCH, EXPERTS).scatter_add_(1, told.ids.long(), told.weights)
        difference = (found[group] - expected).abs()
        token, expert = divmod(int(difference.argmax()), EXPERTS)
        assert difference.max() < 1e-6, (
            f"batch {group} token {token} expert {expert}: {found[group, token, expert]} is not {expected[token, expert]}"
        )


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
    assert render.rendered(text) == text, f"{page.name} is out of date; run `python benchmarks/render.py`"
