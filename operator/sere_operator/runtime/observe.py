"""Every read of the operator: one resource, its children and its pods, as a Snapshot."""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import replace

from sere_ext.contract.errors import SereError, SimilarityError
from sere_ext.contract.policy import Policy
from sere_ext.contract.shards import encoded, join, places

from sere_operator.api import meta
from sere_operator.api.common import SpecError, parse_spec
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.api.tuning import SereTuningJobSpec
from sere_operator.plan.decide import stable_digest
from sere_operator.plan.objects import children
from sere_operator.plan.objects import revision as engine
from sere_operator.plan.objects.artefact import verified_digest
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.rollout import evidence
from sere_operator.plan.rollout import wanted as routing
from sere_operator.plan.snapshot import Object, PodMetrics, PodView, Similarity, Snapshot, TuningSnapshot
from sere_operator.plan.tuning import objects as tuning_children
from sere_operator.plan.tuning import result as tuning_result
from sere_operator.runtime.client import Client
from sere_operator.runtime.probe import Prober


def _selector(labels: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())


async def _ours(client: Client, kind: str, namespace: str, name: str) -> Object | None:
    """One of our own resources with its type, which a read by kind leaves out; None if there is none."""
    found = await client.get(kind, namespace, name)
    return None if found is None else {**found, "apiVersion": meta.API_VERSION, "kind": kind}


async def observe(client: Client, prober: Prober, namespace: str, name: str, defaults: Defaults) -> Snapshot | None:
    """Everything about one SereDeployment, None if there is none."""
    found = await _ours(client, meta.DEPLOYMENT_KIND, namespace, name)
    if found is None:
        return None
    snapshot = Snapshot(now=time.time(), object=found)
    try:
        spec = parse_spec(SereDeploymentSpec, snapshot.spec)
    except SpecError:
        return snapshot  # decide says what is wrong
    named = {
        "Deployment": children.deployment_name(name),
        "Service": children.service_name(name),
        "ConfigMap": meta.policy_config_map(name),
        "PodDisruptionBudget": meta.fit_name(name),
        "HorizontalPodAutoscaler": meta.fit_name(name),
    }
    owned = _selector({meta.DEPLOYMENT_LABEL: meta.label_value(name), meta.MANAGED_BY_LABEL: meta.FIELD_MANAGER})
    objects, pods, jobs = await asyncio.gather(
        asyncio.gather(*(client.get(kind, namespace, child) for kind, child in named.items())),
        client.list("Pod", namespace, _selector(children.selector(name))),
        client.list(meta.TUNING_JOB_KIND, namespace, owned),
    )
    kept = {kind: {"kind": kind, **body} for kind, body in zip(named, objects, strict=True) if body is not None}
    made = tuple(job for job in jobs if children.owned(found, job))  # anybody may make one with our labels
    snapshot = replace(snapshot, children=kept, tuning_jobs=made)
    spec = engine.effective(snapshot, spec, defaults.engine_image)
    profiles = await _profiles(client, snapshot, spec)
    snapshot = replace(snapshot, profiles=profiles)
    uris = routing.similarity_uris(profiles, spec)
    found_similarities = {uri: await read_similarity(client, namespace, uri) for uri in uris}
    snapshot = replace(snapshot, shards=await _shards(client, snapshot, bool(uris)))
    views, service = await _ask(prober, snapshot, spec, pods)
    snapshot = replace(snapshot, now=time.time(), pods=tuple(views), service_digest=service, similarities=found_similarities)
    return await _golden(prober, snapshot, spec)


async def _shards(client: Client, snapshot: Snapshot, more: bool) -> dict[str, Object]:
    """The ConfigMaps with shards of similarity artefacts.

    Args:
        more: others may be written, so somebody else's objects of their names matter.
    """
    name, namespace = snapshot.name, snapshot.namespace
    ours = {meta.DEPLOYMENT_LABEL: meta.label_value(name), meta.COMPONENT_LABEL: meta.SHARD_COMPONENT}
    listed = {body["metadata"]["name"]: body for body in await client.list("ConfigMap", namespace, _selector(ours))}
    names = meta.policy_shards(name)
    others = [shard for shard in names if shard not in listed] if more else []
    bodies = await asyncio.gather(*(client.get("ConfigMap", namespace, shard) for shard in others))
    found = listed | {shard: {"kind": "ConfigMap", **body} for shard, body in zip(others, bodies, strict=True) if body}
    return {shard: found[shard] for shard in names if shard in found}


async def _profiles(client: Client, snapshot: Snapshot, spec: SereDeploymentSpec) -> dict[str, Object]:
    names = routing.profiles_needed(snapshot, spec)
    found = [await _ours(client, meta.PROFILE_KIND, snapshot.namespace, name) for name in names]
    return {name: profile for name, profile in zip(names, found, strict=True) if profile}


def pod_base(pod: Object) -> str | None:
    """`http://<pod address>:8000` of a running pod."""
    status = pod.get("status") or {}
    address = status.get("podIP")
    if not address or status.get("phase") != "Running":
        return None
    return f"http://[{address}]:{children.PORT}" if ":" in address else f"http://{address}:{children.PORT}"


async def _ask(
    prober: Prober, snapshot: Snapshot, spec: SereDeploymentSpec, pods: list[Object]
) -> tuple[list[PodView], str | None]:
    with_metrics, limits = evidence.metrics_needed(snapshot.status), slo_limits(spec)

    async def one(pod: Object) -> PodView:
        base, view = pod_base(pod), PodView(pod)
        if base is None or view.terminating:
            return view
        state = await prober.state(base)
        if state is None:
            return view
        view = replace(view, state=state)
        model = children.served_by(pod, children.served_name(snapshot.name, spec))
        proven = await prober.proven(base, model, (view.uid, str(view.restarts)), view.digest) if view.ready else None
        metrics: PodMetrics | None = await prober.metrics(base, limits) if with_metrics else None
        return replace(view, proven=proven, metrics=metrics)

    views = list(await asyncio.gather(*(one(pod) for pod in pods)))
    service = snapshot.children.get("Service")
    address = (service or {}).get("spec", {}).get("clusterIP")
    ready = [view for view in views if view.ready and view.proven]
    if service is None or not address or address == "None" or not ready:
        return views, None
    # Proven anew whenever the pods behind it, or what they run, are others.
    key = (service["metadata"]["uid"], *sorted(f"{view.uid}/{view.restarts}/{view.proven}" for view in ready))
    host = f"[{address}]" if ":" in address else address
    model = children.served_by(ready[0].object, children.served_name(snapshot.name, spec))
    return views, await prober.through_service(f"http://{host}:{children.PORT}", model, key)


def slo_limits(spec: SereDeploymentSpec) -> set[str]:
    """The limits of the SLO as keys of `Histogram.over`; other bounds are not needed and would swell the status."""
    parts = (spec.slo.tpot_ms, spec.slo.ttft_ms) if spec.slo else ()
    return {f"{limit:g}" for part in parts if part for limit in (part.p50, part.p95, part.p99) if limit is not None}


async def _golden(prober: Prober, snapshot: Snapshot, spec: SereDeploymentSpec) -> Snapshot:
    wanted = routing.wanted(snapshot, spec)
    if wanted.profile is None:
        return snapshot
    needed = evidence.golden_needed(snapshot, wanted, stable_digest(snapshot))
    results = []
    for pod, digest in needed:  # one after the other: two pods on one node would share its cores
        base = pod_base(pod.object)
        if base is not None:
            results.append(
                await prober.golden(
                    base, children.served_by(pod.object, children.served_name(snapshot.name, spec)), wanted.profile.golden_prompts,
                    golden_concurrency(wanted.profile.policy), pod.uid, digest,
                )
            )  # fmt: skip
    return replace(snapshot, now=time.time(), golden=tuple(results))


def golden_concurrency(policy: Policy) -> int:
    """Requests at a time that bring decode batches into the policy's largest-reaching bucket, at most 64."""
    edges = [bucket.min_tokens for table in policy.tables() for bucket in table if bucket.kind.value != "exact"]
    return min(64, max([8, *edges]))


async def read_similarity(client: Client, namespace: str, uri: str) -> Similarity:
    """The artefact behind `configmap://name/key`, checked; the key may be its first shard's. A claim cannot be read from here."""
    if not uri.startswith("configmap://"):
        return Similarity(problem=f"{uri} cannot be read by the operator; put the artefact into a ConfigMap")
    name, _, key = uri.removeprefix("configmap://").partition("/")
    try:
        sharded = places(name, key)
        parts = await asyncio.gather(*(_binary(client, namespace, *place) for place in sharded or [(name, key)]))
        content = join(parts) if sharded else parts[0]
        return Similarity(encoded(content), verified_digest(content))
    except SereError as error:
        return Similarity(problem=f"{uri}: {error}")


async def _binary(client: Client, namespace: str, name: str, key: str) -> bytes:
    config_map = await client.get("ConfigMap", namespace, name)
    text = ((config_map or {}).get("binaryData") or {}).get(key)
    if text is None:
        raise SimilarityError(f"ConfigMap {name} has no binary key {key}")
    return base64.b64decode(text)


async def observe_tuning(client: Client, namespace: str, name: str, defaults: Defaults) -> TuningSnapshot | None:
    """Everything about one SereTuningJob, None if there is none."""
    found = await _ours(client, meta.TUNING_JOB_KIND, namespace, name)
    if found is None:
        return None
    snapshot = TuningSnapshot(now=time.time(), object=found)
    try:
        spec = parse_spec(SereTuningJobSpec, snapshot.spec)
    except SpecError:
        return snapshot
    if snapshot.status.get("outcome"):
        return snapshot
    result = await client.get("ConfigMap", namespace, tuning_children.result_name(name))
    uri = tuning_result.similarity_uri(result)
    similarity = await read_similarity(client, namespace, uri) if uri else None
    snapshot = replace(snapshot, result=result, similarity=similarity)
    wanted = [(body["kind"], body["metadata"]["name"]) for body in tuning_children.build(snapshot, spec, defaults)]
    wanted += [(body["kind"], body["metadata"]["name"]) for body in tuning_result.read_result(snapshot, spec).objects]
    label = _selector({meta.INSTANCE_LABEL: meta.label_value(name), meta.COMPONENT_LABEL: meta.TUNER_COMPONENT})
    objects, pods = await asyncio.gather(
        asyncio.gather(*(client.get(kind, namespace, child) for kind, child in wanted)), client.list("Pod", namespace, label)
    )
    there = {key: {"kind": key[0], **body} for key, body in zip(wanted, objects, strict=True) if body is not None}
    if ("Role", tuning_children.run_name(name)) not in there:
        # Before the tuner is given the right to write them: what stands there already is somebody else's.
        names = tuning_children.result_names(name)
        bodies = await asyncio.gather(*(client.get("ConfigMap", namespace, one) for one in names))
        there |= {("ConfigMap", one): {"kind": "ConfigMap", **body} for one, body in zip(names, bodies, strict=True) if body}
    return replace(snapshot, now=time.time(), children=there, pods=tuple(pods))
