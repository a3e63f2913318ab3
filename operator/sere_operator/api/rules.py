"""Rules across fields, as the API server checks them (CEL), so that bad input is refused with the operator down.

Those that a model lists in `constraints` are taken from there (`rules_of`). The others stand here, each with its twin in a
pydantic validator, for resources that an older CRD let through. Messages say what to do.
Written for Kubernetes 1.30 and newer: no two-variable comprehensions, numbers go through `'%d'.format([...])`
(`string(int)` is refused in a messageExpression), and every list they walk has maxItems (the server bounds their cost).
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel

from sere_ext.contract.constraints import Constrained
from sere_ext.contract.policy import MAX_BUCKETS, MAX_TOKENS
from sere_operator.api.deployment import NEEDS_SIMILARITY, SereDeploymentSpec
from sere_operator.api.tuning import SereTuningJobSpec


@dataclass(frozen=True)
class Rule:
    """One entry of `x-kubernetes-validations`: `rule` must hold, else the message (or what its expression says) is shown."""

    rule: str
    message: str = ""
    expression: str = ""  # messageExpression; `message` is then what shows if that fails
    field: str = ""  # path that the error names, below the place of the rule

    def to_dict(self) -> dict[str, str]:
        pairs = {"rule": self.rule, "message": self.message, "messageExpression": self.expression, "fieldPath": self.field}
        return {key: value for key, value in pairs.items() if value}


def rules_of(model: type[BaseModel]) -> dict[str, tuple[Rule, ...]]:
    """The constraints of a model and of every model inside it, by model name."""
    return {
        inner.__name__: tuple(
            Rule(c.cel, c.message, c.expression, f".{c.field}" if c.field else "") for c in inner.all_constraints()
        )
        for inner in _constrained(model)
    }


def _constrained(annotation: Any) -> Iterator[type[Constrained]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if issubclass(annotation, Constrained):
            yield annotation
        for field in annotation.model_fields.values():
            yield from _constrained(field.annotation)
    for inner in typing.get_args(annotation):
        yield from _constrained(inner)


def immutable(field: str, why: str) -> Rule:
    """A transition rule at the parent, since one at the field itself would not see the field come or go."""
    return Rule(
        f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})",
        f"{field} is immutable: {why}",
        field=f".{field}",
    )


def _bucket_table() -> tuple[Rule, ...]:
    """Neighbours ascend and do not overlap. `i` runs over the first of each pair."""
    pairs = f"[{', '.join(str(i) for i in range(MAX_BUCKETS - 1))}].filter(i, i + 1 < self.size())"
    top = f"(has(self[i].maxTokens) ? self[i].maxTokens : {MAX_TOKENS})"
    next_top = f"(has(self[i + 1].maxTokens) ? self[i + 1].maxTokens : {MAX_TOKENS})"
    start, next_start = "self[i].minTokens", "self[i + 1].minTokens"
    overlap = f"{next_start} >= {start} && {next_start} <= {top}"
    # Overlapping up to the open end: the second cannot start later, so the first has to end earlier.
    words = (
        f"({top} >= {MAX_TOKENS} ? "
        f"'buckets overlap from %d tokens on; make the first end at %d'.format([{next_start}, {next_start} - 1]) : "
        f"'buckets overlap at %d-%d tokens; make the second start at %d'"
        f".format([{next_start}, {top} < {next_top} ? {top} : {next_top}, {top} + 1]))"
    )
    return (
        Rule(f"{pairs}.all(i, {next_start} >= {start})", "buckets must be in ascending order of minTokens"),
        Rule(
            f"{pairs}.all(i, !({overlap}))",
            "buckets overlap; make each start after the one before it ends",
            f"{pairs}.filter(i, {overlap}).map(i, {words})[0]",
        ),
    )


_MODE = "(has(self.mode) ? self.mode : 'Exact')"
_TUNED = "!(has(self.routing) && has(self.routing.mode) && self.routing.mode == 'Tuned')"
_STATIC_SERE = (
    "has(self.routing) && has(self.routing.policy) && ("
    "(has(self.routing.policy.buckets) && self.routing.policy.buckets.exists(b, b.kind in ['sere', 'hybrid'])) || "
    "(has(self.routing.policy.layerGroups) && self.routing.policy.layerGroups.exists(g, g.buckets.exists(b, b.kind in ['sere', 'hybrid']))))"
)
_DRAIN = "(has(self.strategy) && self.strategy == 'DrainFirst')"

# A SereDeployment's Service has its name, and Services take less than other objects do.
SERVICE_NAME: Final = Rule(
    "self.metadata.name.size() <= 63 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
    "metadata.name is the Service's name as well: at most 63 of a-z, 0-9 and '-', beginning with a letter, without dots",
)

# A SereTuningJob's Job has its name, and the Job's pods have it as a label.
JOB_NAME: Final = Rule(
    "self.metadata.name.size() <= 63 && self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
    "metadata.name is the Job's name as well: at most 63 of a-z, 0-9 and '-', without dots",
)

# By model name, or by `Model.outsideName` where the rule belongs to a field.
_RULES: Final[dict[str, tuple[Rule, ...]]] = {
    "SereDeploymentSpec": (
        Rule(f"{_TUNED} || has(self.tuning)", "routing.mode Tuned needs tuning: how to tune", field=".tuning"),
        Rule(f"{_TUNED} || has(self.accuracy)", "routing.mode Tuned needs accuracy: how much may be given up", field=".accuracy"),
        Rule(f"{_TUNED} || has(self.slo)", "routing.mode Tuned needs slo: at least one latency limit to keep", field=".slo"),
        Rule(
            f"!({_STATIC_SERE}) || has(self.routing.similarity) || "
            "(has(self.tuning) && has(self.tuning.similarity) && has(self.tuning.similarity.uri))",
            NEEDS_SIMILARITY,
            field=".routing.similarity",
        ),
    ),
    "SereTuningJobSpec": tuple(
        immutable(info.alias or name, "a tuning job is one run; create another job (only suspend may change)")
        for name, info in SereTuningJobSpec.model_fields.items()
        if name != "suspend"
    ),
    "ProfileSpec": (Rule("self == oldSelf", "a profile is immutable, its name stands for its content; create another one"),),
    "Routing": (
        Rule(f"{_MODE} != 'Static' || has(self.policy)", "mode Static needs policy", field=".policy"),
        Rule(
            f"!has(self.policy) || {_MODE} == 'Static'", "policy is for mode Static; remove it or set the mode", field=".policy"
        ),
        Rule(f"{_MODE} != 'Profile' || has(self.profileRef)", "mode Profile needs profileRef", field=".profileRef"),
        Rule(
            f"!has(self.profileRef) || {_MODE} == 'Profile'",
            "profileRef is for mode Profile; remove it or set the mode",
            field=".profileRef",
        ),
        Rule(
            f"!has(self.similarity) || {_MODE} == 'Static'",
            "similarity is for mode Static; remove it or set the mode",
            field=".similarity",
        ),
    ),
    "Bucket": (
        Rule(
            "!has(self.maxTokens) || self.maxTokens >= self.minTokens",
            "maxTokens is below minTokens",
            "'maxTokens %d is below minTokens %d'.format([self.maxTokens, self.minTokens])",
        ),
        Rule(
            "self.kind == 'exact' || self.kind == 'budget' || has(self.S)",
            "this kind needs S, the number of top experts that a token keeps",
            "'kind %s needs S, the number of top experts that a token keeps'.format([self.kind])",
        ),
        Rule(
            "self.kind != 'budget' || has(self.maxExperts)",
            "kind budget needs maxExperts, the number of experts that may be active",
        ),
        Rule(
            "!has(self.rho) || self.rho == 0.0 || self.kind == 'sere' || self.kind == 'hybrid'",
            "rho is only meaningful for kinds sere and hybrid; leave it out",
            "'rho is only meaningful for kinds sere and hybrid, not %s; leave it out'.format([self.kind])",
        ),
        Rule(
            "!has(self.minShare) || self.kind != 'exact'",
            "minShare is only meaningful for kinds that re-route, not exact; leave it out",
        ),
        Rule(
            "!has(self.maxExperts) || self.kind == 'budget' || self.kind == 'hybrid'",
            "maxExperts is only meaningful for kinds budget and hybrid; leave it out",
            "'maxExperts is only meaningful for kinds budget and hybrid, not %s; leave it out'.format([self.kind])",
        ),
    ),
    "Policy.buckets": _bucket_table(),
    "LayerGroup.buckets": _bucket_table(),
    "LayerGroup": (Rule("self.firstLayer <= self.lastLayer", "lastLayer is below firstLayer"),),
    "Policy.layerGroups": (
        Rule(
            "[0, 1, 2, 3, 4, 5, 6].all(i, i + 1 >= self.size() || self[i].lastLayer < self[i + 1].firstLayer)",
            "layerGroups must be ascending and must not overlap",
        ),
    ),
    "Autoscaling": (
        Rule(
            "!has(self.min) || self.max >= self.min",
            "max is below min",
            "'max %d is below min %d'.format([self.max, self.min])",
        ),
    ),
    "Rollout": (
        Rule(
            f"(has(self.maxSurge) ? self.maxSurge : ({_DRAIN} ? 0 : 1)) > 0 || "
            f"(has(self.maxUnavailable) ? self.maxUnavailable : ({_DRAIN} ? 1 : 0)) > 0",
            "maxSurge and maxUnavailable are both 0, so no pod could be replaced; set one of them to 1",
        ),
    ),
}


_CONSTRAINTS = {**rules_of(SereDeploymentSpec), **rules_of(SereTuningJobSpec)}
RULES: Final = {name: (*_CONSTRAINTS.get(name, ()), *_RULES.get(name, ())) for name in {**_RULES, **_CONSTRAINTS}}
