"""What must be read next for one SereDeployment, from what has been read so far. Pure.

`runtime.observe` carries out what `needs` asks for, adds the answers with `taken`, and asks again until nothing is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sere_ext.contract.errors import SpecError
from sere_operator.api import meta
from sere_operator.api.common import parse_spec
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.plan.objects import children
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.objects.revision import effective
from sere_operator.plan.objects.volume import stable_digest
from sere_operator.plan.reads import Artefact, Child, Events, Golden, Listed, Metrics, Read, ServiceToken, State, Token
from sere_operator.plan.rollout import evidence
from sere_operator.plan.rollout.wanted import profiles_needed, similarity_uris, wanted
from sere_operator.plan.snapshot import Object, PodView, Snapshot


def needs(snapshot: Snapshot, defaults: Defaults) -> tuple[Read, ...]:
    """The reads to do next: those of the first round that are not in the snapshot yet. Empty: the snapshot is whole.

    Where the spec is suspended or cannot be read, the objects are all that is needed: nothing is asked of pods.
    """
    if missing := _missing(snapshot, _objects(snapshot)):
        return missing
    try:
        spec = effective(parse_spec(SereDeploymentSpec, snapshot.spec), defaults.engine_image)
    except SpecError:
        return ()
    if spec.suspend:
        return ()
    for round_of_reads in (_profiles, _artefacts, _states, _pod_answers, _service, _golden):
        if missing := _missing(snapshot, round_of_reads(snapshot, spec)):
            return missing
    return ()


def _missing(snapshot: Snapshot, reads: Iterator[Read]) -> tuple[Read, ...]:
    return tuple(read for read in reads if read not in snapshot.read)


def _objects(snapshot: Snapshot) -> Iterator[Read]:
    """The resource's children, its pods, its tuning jobs, and the ConfigMaps with shards of similarity artefacts."""
    name = snapshot.name
    for kind, child in children.names(name).items():
        yield Child(kind, child)
    yield Listed("Pod", children.text(children.selector(name)))
    yield _jobs(name)
    yield _shards(name)


def _jobs(name: str) -> Listed:
    owned = {meta.DEPLOYMENT_LABEL: meta.label_value(name), meta.MANAGED_BY_LABEL: meta.FIELD_MANAGER}
    return Listed(meta.TUNING_JOB_KIND, children.text(owned))


def _shards(name: str) -> Listed:
    ours = {meta.DEPLOYMENT_LABEL: meta.label_value(name), meta.COMPONENT_LABEL: meta.SHARD_COMPONENT}
    return Listed("ConfigMap", children.text(ours))


def _profiles(snapshot: Snapshot, spec: SereDeploymentSpec) -> Iterator[Read]:
    for name in profiles_needed(snapshot, spec):
        yield Child(meta.PROFILE_KIND, name)


def _artefacts(snapshot: Snapshot, spec: SereDeploymentSpec) -> Iterator[Read]:
    """The artefacts that a policy names; and, since shards may be written then, whatever has a shard's name."""
    uris = similarity_uris(snapshot.profiles, spec)
    for uri in uris:
        yield Artefact(uri)
    if uris:
        for shard in meta.policy_shards(snapshot.name):
            if shard not in snapshot.shards:
                yield Child("ConfigMap", shard)


def _states(snapshot: Snapshot, spec: SereDeploymentSpec) -> Iterator[Read]:
    for pod in snapshot.live_pods:
        base = children.pod_base(pod.object)
        if base is not None:
            yield State(pod.uid, base)


def _answering(snapshot: Snapshot) -> Iterator[tuple[PodView, str]]:
    for pod in snapshot.live_pods:
        base = children.pod_base(pod.object)
        if base is not None and pod.state is not None:
            yield pod, base


def _pod_answers(snapshot: Snapshot, spec: SereDeploymentSpec) -> Iterator[Read]:
    """A token of each ready pod; histograms while a canary is compared."""
    limits = evidence.slo_limits(spec.slo)
    for pod, base in _answering(snapshot):
        if pod.ready:
            yield Token(pod.uid, base, _model(snapshot, spec, pod), (pod.uid, str(pod.restarts)), pod.digest)
        if evidence.metrics_needed(snapshot.status):
            yield Metrics(pod.uid, base, limits)


def _model(snapshot: Snapshot, spec: SereDeploymentSpec, pod: PodView) -> str:
    return children.served_by(pod.object, children.served_name(snapshot.name, spec))


def _service(snapshot: Snapshot, spec: SereDeploymentSpec) -> Iterator[Read]:
    """A token through the Service. It is proven anew whenever the pods behind the Service, or what they run, are others."""
    service = snapshot.children.get("Service")
    address = (service or {}).get("spec", {}).get("clusterIP")
    ready = [pod for pod in snapshot.live_pods if pod.ready and pod.proven]
    if service is None or not address or address == "None" or not ready:
        return
    key = (service["metadata"]["uid"], *sorted(f"{pod.uid}/{pod.restarts}/{pod.proven}" for pod in ready))
    yield ServiceToken(children.base(address), _model(snapshot, spec, ready[0]), key)


def _golden(snapshot: Snapshot, spec: SereDeploymentSpec) -> Iterator[Read]:
    """Golden prompts, one run at a time: two pods on one node would share its cores."""
    chosen = wanted(snapshot, spec)
    if chosen.profile is None:
        return
    for pod, digest in evidence.golden_needed(snapshot, chosen, stable_digest(snapshot)):
        base = children.pod_base(pod.object)
        if base is None:
            continue
        run = Golden(
            pod.uid, base, _model(snapshot, spec, pod), digest,
            evidence.golden_in_flight(chosen.profile.policy), chosen.profile.golden_prompts,
        )  # fmt: skip
        yield run
        if not any((result.pod_uid, result.digest) == (pod.uid, digest) for result in snapshot.golden):
            return  # it is under way


def taken(snapshot: Snapshot, answers: Mapping[Read, Any]) -> Snapshot:
    """The snapshot with these answers, each of the type that its read's docstring names."""
    for read, answer in answers.items():
        snapshot = replace(_with(snapshot, read, answer), read=snapshot.read | {read})
    return snapshot


def _with(snapshot: Snapshot, read: Read, answer: Any) -> Snapshot:
    match read:
        case Child(kind, name):
            return _with_object(snapshot, kind, name, answer)
        case Listed("Pod"):
            return replace(snapshot, pods=tuple(PodView(pod) for pod in answer))
        case Listed("ConfigMap"):
            found = {body["metadata"]["name"]: body for body in answer}
            names = meta.policy_shards(snapshot.name)
            return replace(snapshot, shards={name: found[name] for name in names if name in found})
        case Listed():
            # Anybody may make one with our labels.
            return replace(snapshot, tuning_jobs=tuple(job for job in answer if children.ours(snapshot.object, job)))
        case Events():
            return snapshot  # asked for tuning runs alone
        case Artefact(uri):
            return replace(snapshot, similarities={**snapshot.similarities, uri: answer})
        case State(uid):
            return _with_pod(snapshot, uid, state=answer)
        case Token(uid):
            return _with_pod(snapshot, uid, proven=answer)
        case Metrics(uid):
            return _with_pod(snapshot, uid, metrics=answer)
        case ServiceToken():
            return replace(snapshot, service_digest=answer)
        case Golden():
            return replace(snapshot, golden=(*snapshot.golden, *([] if answer is None else [answer])))


def _with_object(snapshot: Snapshot, kind: str, name: str, body: Object | None) -> Snapshot:
    if body is None:
        return snapshot
    if kind == meta.PROFILE_KIND:
        return replace(snapshot, profiles={**snapshot.profiles, name: body})
    if kind == "ConfigMap" and name != meta.policy_config_map(snapshot.name):
        found = {**snapshot.shards, name: body}
        return replace(snapshot, shards={shard: found[shard] for shard in meta.policy_shards(snapshot.name) if shard in found})
    return replace(snapshot, children={**snapshot.children, kind: body})


def _with_pod(snapshot: Snapshot, uid: str, **answer: Any) -> Snapshot:
    return replace(snapshot, pods=tuple(replace(pod, **answer) if pod.uid == uid else pod for pod in snapshot.pods))
