"""The SereProfile of the chosen candidate: its policy, what it was measured on, and the evidence."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from sere_autotune.calibration import checked_digest
from sere_autotune.search.learned import noise_floor
from sere_autotune.study.run import Run
from sere_autotune.study.schema import ENGINE, FINGERPRINT, MADE, SIMILARITY, SPENT, Candidate, Made, Spent, Verdict
from sere_autotune.trial.measures import Answer
from sere_autotune.tuning.spec import TuningSpec
from sere_ext.contract.policy import Policy
from sere_ext.contract.profile import (
    AccuracyEvidence,
    ChatMessage,
    Evidence,
    GoldenPrompt,
    Paired,
    Profile,
    ProfileKey,
    ProfileSpec,
    Ratio,
    SimilarityRef,
)

GOLDEN_PROMPTS = 24


def headline(spec: TuningSpec) -> str:
    """The TPOT statistic that is shown first: the strictest percentile that is limited, else the mean."""
    named = [name for metric, name, _ in spec.slo.limits() if metric == "tpot"]
    return named[-1] if named else "mean"


def condition(spec: TuningSpec) -> str:
    """What every comparison of the run holds equal."""
    load = spec.workload.load
    if load.concurrency and len(load.concurrency) > 1:
        return "equal concurrency " + ", ".join(map(str, load.concurrency))
    return load.condition(load.levels[0])


def _paired(result: Verdict, metric: str, name: str, limit: float | None) -> Paired:
    return Paired(exact=result.latency_ms["exact"][metric][name], chosen=result.latency_ms["chosen"][metric][name], limit=limit)


def build_profile(
    run: Run, candidate: Candidate, result: Verdict, number: int, of: int, similarity: Path | None, *, advisory: bool
) -> Profile:
    """The SereProfile of the chosen candidate.

    Args:
        number: of the candidate on the ladder, from 1, of `of` candidates.
        similarity: path of the artefact that the policy needs, None where it needs none.
        advisory: whether it was chosen without a certificate.

    Raises:
        UsageError: the similarity artefact is no longer the one that was certified.
    """
    spec, study = run.spec, run.study
    policy = Policy.parse(candidate.policy)
    limits = {metric: (name, limit) for metric, name, limit in spec.slo.limits()}
    name = headline(spec)
    noise = noise_floor(run)
    made = study.get(MADE)
    if made is None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        made = Made(now, (study.get(SPENT) or Spent()).device_s)
        study.put(MADE, made)

    def optional(metric: str) -> Paired | None:
        return _paired(result, metric, *limits[metric]) if metric in limits else None

    def ratio(statistic: str) -> Ratio:
        found = result.speedup[statistic]
        blocks = f"TPOT {statistic}, {condition(spec)}"
        return Ratio(value=found.value, low=found.low, high=found.high, pairs=found.pairs, condition=blocks)

    evidence = Evidence(
        certified=result.verdict == "passed" and not advisory,
        speed_verdict=result.speed.verdict if result.speed else None,
        tpot_ms=_paired(result, "tpot", name, limits.get("tpot", (name, None))[1]),
        tpot_mean_ms=_paired(result, "tpot", "mean", None),
        ttft_ms=optional("ttft"),
        e2el_ms=optional("e2el"),
        speedup=ratio(name),
        speedup_mean=ratio("mean"),
        accuracy=AccuracyEvidence(
            exact=result.exact_accuracy,
            chosen=result.chosen_accuracy,
            items=result.items,
            max_drop_points=spec.accuracy.max_drop_points,
            confidence=1 - result.alpha,
            drop_points=result.drop * 100,
            upper_bound_points=result.upper_bound * 100,
            p_value=result.p_value,
            discordant_share=(result.losses + result.gains) / max(result.items, 1),
            noise_floor=noise.differ,
        ),
        active_experts=(
            Paired(exact=result.active_before, chosen=result.active_after)
            if result.active_before is not None and result.active_after is not None
            else None
        ),
        rung=number,
        rungs=of,
        trials=len(study.complete()),
        device_hours=made.device_s / 3600,
        workload=_workload(spec),
        study=study.get(FINGERPRINT) or "",
        created=made.created,
    )
    reference = None
    if policy.needs_similarity() and similarity is not None:
        digest = checked_digest(similarity, study.get(SIMILARITY), study.out)
        reference = SimilarityRef(uri=similarity.resolve().as_uri(), digest=digest)
    body = ProfileSpec(
        policy=policy,
        key=ProfileKey.model_validate(study.get(ENGINE)),
        similarity=reference,
        evidence=Evidence.model_validate(rounded(evidence.to_json_dict())),
        golden_prompts=golden(run),
    )
    return Profile(metadata={"name": policy.digest}, spec=body)


def rounded(value: Any) -> Any:
    """Floats to five significant digits, all the way down: people read a profile, and nothing was measured finer."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _workload(spec: TuningSpec) -> str:
    source = "accuracy items"
    if spec.workload.dataset:
        source = Path(spec.workload.dataset).name
    elif spec.workload.synthetic:
        source = f"synthetic {spec.workload.synthetic.input_tokens}/{spec.workload.synthetic.output_tokens} tokens"
    return f"{source}, {condition(spec)}"


def golden(run: Run) -> tuple[GoldenPrompt, ...]:
    """Search items that exact routing answers right, for the canary."""
    answers: dict[str, Answer] = run.study.exact_answers(0)
    right = [item for item in run.search if item.digest in answers and answers[item.digest].correct]
    return tuple(
        GoldenPrompt(
            prompt=item.prompt,
            messages=tuple(ChatMessage(**m) for m in item.messages) or None,
            answer=item.answer,
            max_tokens=min(item.task.max_tokens, 512),
            metric=item.task.metric,
            pattern=item.task.pattern,
            stop=item.task.stop,
        )
        for item in right[:GOLDEN_PROMPTS]
    )
