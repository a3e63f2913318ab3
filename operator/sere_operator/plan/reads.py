"""Every kind of read that the operator does, as a value: `needs` asks for reads, `runtime.observe` carries them out.

A read holds all that is needed to carry it out, so whoever carries it out decides nothing. Namespaces are the resource's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sere_ext.contract.profile import GoldenPrompt


@dataclass(frozen=True)
class Child:
    """One object of the API server. Answer: the object with apiVersion and kind, or None where there is none."""

    kind: str
    name: str


@dataclass(frozen=True)
class Listed:
    """The objects of one kind that have these labels. Answer: a list of objects."""

    kind: str
    selector: str


@dataclass(frozen=True)
class Events:
    """The Events about one object. Answer: a list of core/v1 Events."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True)
class Artefact:
    """A similarity artefact. Answer: a `snapshot.Similarity`, which says why where the artefact cannot be had."""

    uri: str


@dataclass(frozen=True)
class State:
    """`GET /sere` of one pod. Answer: the decoded body, or None where the pod does not answer."""

    uid: str
    base: str  # http://<pod address>:<port>


@dataclass(frozen=True)
class Token:
    """One real token of one container. Answer: the policy digest that is proven, or None.

    container  uid and restart count: another container must prove itself anew
    digest     the policy that the pod says it applies; None while its ranks differ
    """

    uid: str
    base: str
    model: str
    container: tuple[str, str]
    digest: str | None


@dataclass(frozen=True)
class Metrics:
    """The latency histograms of one pod. Answer: a `snapshot.PodMetrics`, or None.

    limits  histogram bounds to keep, milliseconds as text (`20`, `35.5`)
    """

    uid: str
    base: str
    limits: frozenset[str]


@dataclass(frozen=True)
class ServiceToken:
    """One real token through the Service. Answer: the policy digest of the pod that gave it, or None.

    key  the Service, the pods behind it and what they are proven to run; another key must be proven anew
    """

    base: str
    model: str
    key: tuple[str, ...]


@dataclass(frozen=True)
class Golden:
    """Golden prompts, answered by one pod under one policy. Answer: a `snapshot.GoldenResult`, or None.

    concurrency  requests to keep in flight, so that decode steps are of the sizes that the policy re-routes
    """

    uid: str
    base: str
    model: str
    digest: str
    concurrency: int
    prompts: tuple[GoldenPrompt, ...] = field(compare=False)


Read = Child | Listed | Events | Artefact | State | Token | Metrics | ServiceToken | Golden
