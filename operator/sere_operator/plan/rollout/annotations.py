"""The annotations that steer the policy of single pods. Pure."""

from __future__ import annotations

import hashlib
import re

from sere_ext.contract.policy import EXACT
from sere_ext.contract.record import canonical_json
from sere_operator.api import meta
from sere_operator.plan.rollout.step import Step
from sere_operator.plan.rollout.wanted import overridden
from sere_operator.plan.snapshot import Object, PodPatch, PodView, Snapshot

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
CANARY_COST = "1000"
REFRESH_AGAIN_S = 15.0  # a pod that shows another policy than its own so long after its last nonce gets a new nonce


def expected_digest(snapshot: Snapshot, step: Step, pod: PodView) -> str:
    """The policy that this pod is meant to run at this moment; a pod that it was not made for refuses it and routes exactly."""
    if overridden(snapshot) or pod.name in step.misfits:
        return EXACT
    return step.pod_policy.get(pod.name, step.stable)


def right_digests(snapshot: Snapshot, step: Step, pod: PodView) -> set[str]:
    """The policies that this pod may run at this moment: two of them where the candidate and the stable one take turns."""
    right = {expected_digest(snapshot, step, pod)}
    return right | {step.stable, str((step.rollout or {}).get("candidate"))} if pod.name in step.in_turns else right


def pod_patch(snapshot: Snapshot, step: Step, config_map: Object, pod: PodView) -> PodPatch | None:
    """The change of this pod's annotations, or None if they are as they should be.

    Args:
        config_map: the policy ConfigMap as it is to be.
    """
    wanted: dict[str, str | None] = {
        meta.POLICY_ANNOTATION: step.pod_policy.get(pod.name),
        meta.OVERRIDE_ANNOTATION: meta.OVERRIDE_EXACT if overridden(snapshot) else None,
        meta.REFRESH_ANNOTATION: refresh_nonce(snapshot, step, config_map, pod),
        DELETION_COST: _deletion_cost(step, pod),
    }
    changed = {key: value for key, value in wanted.items() if pod.annotations.get(key) != value}
    return PodPatch(pod.name, pod.uid, changed) if changed else None


def override_patch(pod: PodView, override: bool) -> PodPatch | None:
    """The change of the kill switch alone, or None if it is as it should be."""
    wanted = meta.OVERRIDE_EXACT if override else None
    if pod.annotations.get(meta.OVERRIDE_ANNOTATION) == wanted:
        return None
    return PodPatch(pod.name, pod.uid, {meta.OVERRIDE_ANNOTATION: wanted})


def _deletion_cost(step: Step, pod: PodView) -> str | None:
    """A canary is the last pod that a scale-down takes. What somebody else wrote there stays."""
    given = pod.annotations.get(DELETION_COST)
    if pod.name in ((step.rollout or {}).get("canaryPods") or ()):
        return CANARY_COST if given is None else given
    return None if given == CANARY_COST else given


def refresh_nonce(snapshot: Snapshot, step: Step, config_map: Object, pod: PodView) -> str:
    """`<hash of the ConfigMap's content>.<unix seconds>`: changes with the content, so that the kubelet reads it at once.

    The kubelet may have read from a cache that was a moment old. A pod that answers, names no error and still shows
    another policy after `REFRESH_AGAIN_S` gets a new time, so that the kubelet reads again.
    """
    content = {key: config_map.get(key) for key in ("data", "binaryData")}
    fingerprint = hashlib.sha256(canonical_json(content)).hexdigest()[:10]
    match = re.fullmatch(r"([0-9a-f]{10})\.(\d+)", pod.annotations.get(meta.REFRESH_ANNOTATION, ""))
    if match is None or match[1] != fingerprint:
        return f"{fingerprint}.{int(snapshot.now)}"
    silent = pod.state is None or bool(pod.state.error) or not pod.state.ready
    behind = pod.digest != expected_digest(snapshot, step, pod)
    if behind and not silent and snapshot.now - int(match[2]) > REFRESH_AGAIN_S:
        return f"{fingerprint}.{int(snapshot.now)}"
    return match[0]
