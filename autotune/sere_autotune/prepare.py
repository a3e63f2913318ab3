"""Reads and checks all input of a run and makes its plan; starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sere_autotune import calibration, planner, preflight
from sere_autotune.doctor.measure import Work
from sere_autotune.study.ledger import Ledger, Shared
from sere_autotune.study.study import study_id
from sere_autotune.study.weights import model_key
from sere_autotune.trial.duplicates import near_duplicates
from sere_autotune.trial.items import Item, load_items, split
from sere_autotune.trial.traffic import Traffic
from sere_autotune.tuning.space import Space
from sere_autotune.tuning.spec import BucketEdges, Served, TuningSpec
from sere_ext.contract.errors import SimilarityError, UsageError
from sere_ext.contract.model_config import language_config, model_config_digest
from sere_ext.contract.policy import Policy
from sere_ext.contract.similarity import read_meta


@dataclass
class Prepared:
    """Input that was read and found good; nothing was started."""

    spec: TuningSpec
    items: list[Item]
    search: list[Item]
    cert: list[Item]
    config: dict[str, object]
    source: calibration.Source
    plan: planner.Plan
    ledger: Ledger
    model: str  # digest of the model's configuration and weights

    @property
    def out(self) -> Path:
        return Path(self.spec.out)

    def work(self, traffic: Traffic) -> Work:
        """What an engine is asked for the ceiling: the requests whose latency will be judged."""
        return Work(self.spec, self.spec.workload, traffic.others or traffic.requests(self.search), True, self.config)


def prepare(spec: TuningSpec, only: Policy | None = None, shared: Shared | None = None) -> Prepared:
    """Read and check all input, and make the plan.

    Args:
        only: the policy to certify, where nothing is to be searched.
        shared: where a cluster keeps which held-out items were opened; None outside.

    Raises:
        UsageError: a missing or bad file, a prompt that does not fit, a similarity artefact of another model, too few items, a
            dense model or an incomplete one.
        PolicyError: `only` keeps more experts than the model's tokens have, or names layers that it does not have.
    """
    spec.check_files()
    items = load_items(spec.accuracy)
    if len(items) < 40:
        raise UsageError(
            f"accuracy.tasks: {len(items)} distinct items are too few to split into search and certification; give 40"
        )
    mine, held_out = split(items, spec.accuracy.search_items)
    config = read_config(spec)
    digest = model_config_digest(config)
    preflight.check(spec, config, items)
    _check_policies(spec, config, only)
    similarity = read_meta(spec.similarity) if spec.similarity else None
    if similarity is not None and similarity.config_digest != digest:
        raise SimilarityError(
            f"{spec.similarity} was made for {similarity.model_name} ({similarity.model_type}, {similarity.num_experts} experts), "
            f"not for {spec.model}; make one with `sere calibrate {spec.model} --data FILE`"
        )
    model = model_key(spec.model, digest)
    ledger = Ledger(model, Path(spec.out), shared)
    noise, pace = ledger.known()
    openings = ledger.openings(opened_items(spec, held_out), study_id(Path(spec.out)))
    source = calibration.find(spec, digest, only)
    plan = planner.make_plan(
        spec,
        len(items),
        len(held_out),
        noise,
        openings,
        pace,
        source=source,
        searches=only is None,
        warning=near_duplicates(items),
    )
    return Prepared(spec, items, mine, held_out, config, source, plan, ledger, model)


def _check_policies(spec: TuningSpec, config: dict[str, object], only: Policy | None) -> None:
    """Raise for a policy, or for values of S to search, that the model cannot have, before an engine is started for them."""
    top_k, layers = experts_per_token(config), int(str(language_config(config).get("num_hidden_layers") or 0))
    if only is None and top_k and spec.search.s_values:
        numbers = tuple(range(layers)) if spec.search.layer_groups else ()
        Space((BucketEdges(min_tokens=1),), spec.search.policies, top_k, layers=numbers, s_values=spec.search.s_values)
    if only is not None and top_k:
        only.check_model(top_k)
    if only is not None and layers:
        only.check_layers(range(layers), "layers")


def read_config(spec: Served) -> dict[str, object]:
    """The model's config.json, decoded. Raises UsageError if there is none or it has no experts."""
    from sere_ext.similarity.hub import asked_model_config

    try:
        config = asked_model_config(spec.model, spec.revision or None)
    except UsageError as error:
        raise UsageError(f"model: {error}") from error
    merged = language_config(config)
    if not any(merged.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")):
        raise UsageError(f"model: {spec.model} is a dense model ({merged.get('model_type')}): it has no experts to re-route")
    return config


def experts_per_token(config: dict[str, object]) -> int | None:
    """top-k as config.json names it, None where it does not (the engine reports it later)."""
    merged = language_config(config)
    found = next(
        (merged[key] for key in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k") if key in merged), None
    )
    return found if isinstance(found, int) and found > 0 else None


def opened_items(spec: TuningSpec, held_out: Sequence[Item]) -> list[str]:
    """Digests of the held-out items that a certificate may use, which certification opens."""
    return [item.digest for item in held_out[: spec.certify.items or len(held_out)]]
