"""The Grafana dashboard asks only for metrics and labels that the code exports, and shows every one of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from sere_ext.contract.policy import Policy
from sere_ext.control.metrics import Metrics
from sere_operator.runtime.health import Health
from tests.kit import ROOT

BOARD = ROOT / "manifests" / "dashboards" / "sere.json"
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
OF_THE_SCRAPE = {"namespace", "pod", "le"}
PROMQL = {"sum", "max", "avg", "by", "rate", "increase", "histogram_quantile", "label_values"}


def families(registry: Any, known: set[Any]) -> dict[str, tuple[list[str], set[str]]]:
    """Names of the samples and the labels of each metric, by its family's name."""
    collectors = set(registry._collector_to_names) - known
    return {c._name: ([c._name + suffix for suffix in SUFFIXES[c._type]], set(c._labelnames)) for c in collectors}


@pytest.fixture
def exported() -> Iterator[dict[str, tuple[list[str], set[str]]]]:
    before = set(REGISTRY._collector_to_names)
    Metrics(SimpleNamespace(policy=Policy(), engine=None, slo=None, refusals=Counter()))  # type: ignore[arg-type]
    operator = Health(SimpleNamespace(entries={}), (SimpleNamespace(writes=0),))  # type: ignore[arg-type]
    yield families(REGISTRY, before) | families(operator._registry, set())
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


def queries(node: Any) -> Iterator[str]:
    """Every PromQL text of the dashboard."""
    if isinstance(node, dict):
        yield from (text for name in ("expr", "definition") if isinstance(text := node.get(name), str))
        node = list(node.values())
    if isinstance(node, list):
        for inner in node:
            yield from queries(inner)


def words(promql: str) -> tuple[set[str], set[str]]:
    """Names of metrics and of labels in a query: what is left of it without functions, matched values and durations."""
    label_of_variable = re.sub(r"label_values\((.*), (\w+)\)", r"max by (\2) (\1)", promql)
    text = re.sub(r"\[[^\]]*\]", "", re.sub(r'"[^"]*"', "", label_of_variable))
    labels = {name for part in re.findall(r"\{([^}]*)\}", text) for name in re.findall(r"\w+", part)}
    labels |= {name for part in re.findall(r"by \(([^)]*)\)", text) for name in re.findall(r"\w+", part)}
    text = re.sub(r"by \([^)]*\)|\{[^}]*\}", "", text)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", text)) - PROMQL, labels


def test_words_of_a_query() -> None:
    assert words('sum by (le, pod) (rate(a_total{x=~"$y"}[5m])) / b == 1') == ({"a_total", "b"}, {"le", "pod", "x"})
    assert words('label_values(a{x="1"}, pod)') == ({"a"}, {"x", "pod"})


def test_the_dashboard_asks_for_what_is_exported_and_shows_all_of_it(exported: dict[str, tuple[list[str], set[str]]]) -> None:
    labels_of = {sample: labels for samples, labels in exported.values() for sample in samples}
    found = [(text, *words(text)) for text in queries(json.loads(BOARD.read_text()))]
    assert len(found) > 15
    for text, names, labels in found:
        assert names, text
        for name in names:
            assert name in labels_of, f"nothing exports {name}: {text}"
            assert labels <= labels_of[name] | OF_THE_SCRAPE, f"{name} has no label {labels - labels_of[name]}: {text}"
    shown = {name for _, names, _ in found for name in names}
    missing = [family for family, (samples, _) in exported.items() if not shown & set(samples)]
    assert not missing, "the dashboard shows no panel of these"


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(BOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
