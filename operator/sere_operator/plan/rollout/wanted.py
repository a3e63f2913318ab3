"""Which routing policy is wanted, judged from the spec and what is known. Pure; nothing here looks at pods' progress."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from sere_ext.contract.errors import ProfileError
from sere_ext.contract.policy import EXACT, EXACT_POLICY
from sere_ext.contract.profile import Profile, ProfileKey, ProfileSpec
from sere_ext.contract.record import canonical_json

from sere_operator.api import meta
from sere_operator.api.conditions import Reason
from sere_operator.api.deployment import RoutingMode, SereDeploymentSpec
from sere_operator.plan.objects.revision import changing, replacing
from sere_operator.plan.objects.volume import PolicyEntry
from sere_operator.plan.snapshot import Object, Similarity, Snapshot


@dataclass(frozen=True)
class Wanted:
    """The policy that the spec leads to.

    profile      the SereProfile it comes from; None for Exact and Static
    problem      why it is exact (or held) although the spec asks for more
    blocked      the policy in force is kept: the answer is not known yet, or the wanted policy cannot be had
    by_hand      mode Static: the user answers for its accuracy, so no golden prompts are asked for
    """

    entry: PolicyEntry
    digest: str
    source: RoutingMode
    profile_name: str | None = None
    profile: ProfileSpec | None = None
    problem: Reason | None = None
    message: str = ""
    blocked: bool = False

    @property
    def by_hand(self) -> bool:
        return self.source is RoutingMode.STATIC


def _exact(mode: RoutingMode, problem: Reason | None = None, message: str = "", *, blocked: bool = False) -> Wanted:
    return Wanted(PolicyEntry(EXACT_POLICY), EXACT, mode, problem=problem, message=message, blocked=blocked)


def overridden(snapshot: Snapshot) -> bool:
    """The kill switch, set by annotation on the resource itself."""
    return snapshot.annotations.get(meta.OVERRIDE_ANNOTATION) == meta.OVERRIDE_EXACT


def tuning_hash(spec: SereDeploymentSpec) -> str:
    """What a tuning run is for, of an `engine.effective` spec. Any change asks for another run; replicas, rollout and routing
    do not, nor where the study is kept. 8 hex digits."""
    state = {
        field: getattr(spec, field).to_json_dict() if getattr(spec, field) is not None else None
        for field in ("model", "engine", "resources", "slo", "accuracy", "tuning")
    }
    (state["tuning"] or {}).pop("storage", None)
    (state["engine"] or {}).pop("apiKeySecret", None)
    return hashlib.sha256(canonical_json(state)).hexdigest()[:8]


def tuning_job_name(name: str, spec: SereDeploymentSpec) -> str:
    """Its children end in at most 8 further characters, and a Job's pods must stay below 63."""
    return meta.child_name(name, f"tune-{tuning_hash(spec)}", 46)


def tuning_job_of(snapshot: Snapshot, spec: SereDeploymentSpec) -> Object | None:
    name = tuning_job_name(snapshot.name, spec)
    return next((job for job in snapshot.tuning_jobs if job["metadata"]["name"] == name), None)


def wanted(snapshot: Snapshot, spec: SereDeploymentSpec) -> Wanted:
    """The checklist, in order; the first that applies decides.

    1. Exact                  exact routing, as asked.
    2. Static                 the given policy; held while its similarity artefact cannot be had.
    3. Profile                the named profile; missing or of another digest: held, and said.
    4. Tuned                  the newest profile that this spec's tuning made, else an earlier one; none yet: exact.
    5. a profile made for another model, engine or plug-in than runs: held while pods are being replaced, since those of
       the one revision may still serve and each refuses what is not for it; then exact, PolicyStale.
    """
    routing = spec.routing
    if routing.mode is RoutingMode.EXACT:
        return _exact(routing.mode)
    if routing.mode is RoutingMode.STATIC:
        policy = routing.policy or EXACT_POLICY
        return _with_similarity(snapshot, spec, Wanted(PolicyEntry(policy), policy.digest, routing.mode), spec.static_similarity)
    name = profile_name(snapshot, spec)
    if name is None:
        return _exact(routing.mode, Reason.AWAITING_PROFILE, "routing is exact until tuning has made a profile")
    found = snapshot.profiles.get(name)
    if found is None:
        message = f"profile {name} does not exist; apply it, or correct spec.routing.profileRef"
        return _exact(routing.mode, Reason.PROFILE_MISSING, message, blocked=True)
    return _from_profile(snapshot, spec, name, found)


def profile_name(snapshot: Snapshot, spec: SereDeploymentSpec) -> str | None:
    """Profile mode: the named one. Tuned: what this spec's tuning job made, else what an earlier one made.

    While the pods are of the model or engine before, the profile that they serve by comes first.
    """
    if spec.routing.mode is RoutingMode.PROFILE:
        return spec.routing.profile_ref.name if spec.routing.profile_ref else None
    if spec.routing.mode is not RoutingMode.TUNED:
        return None
    made, served = made_profile(snapshot, spec), (snapshot.status.get("policy") or {}).get("profile")
    return served or made if changing(snapshot, spec) else made or served


def made_profile(snapshot: Snapshot, spec: SereDeploymentSpec) -> str | None:
    """The name of what this spec's tuning made."""
    return ((tuning_job_of(snapshot, spec) or {}).get("status") or {}).get("profile")


def profiles_needed(snapshot: Snapshot, spec: SereDeploymentSpec) -> list[str]:
    """The profiles that `observe` must read for this spec."""
    names = [profile_name(snapshot, spec)]
    if spec.routing.mode is RoutingMode.TUNED:
        names.append(made_profile(snapshot, spec))
    return sorted({name for name in names if name})


def read_profile(snapshot: Snapshot, name: str | None) -> ProfileSpec | None:
    """None where there is no such profile, or none that this release can read."""
    found = snapshot.profiles.get(name or "")
    try:
        return _parse(found) if found is not None else None
    except ProfileError:
        return None


def _parse(found: Object) -> ProfileSpec:
    return Profile.parse({key: found[key] for key in ("apiVersion", "kind", "spec") if key in found}).spec


def _from_profile(snapshot: Snapshot, spec: SereDeploymentSpec, name: str, found: Object) -> Wanted:
    mode = spec.routing.mode
    try:
        profile = _parse(found)
    except ProfileError as error:
        return _exact(mode, Reason.PROFILE_MISSING, f"profile {name} cannot be read: {error}", blocked=True)
    pinned = spec.routing.profile_ref.digest if spec.routing.profile_ref else None
    if pinned is not None and pinned != profile.digest:
        message = f"profile {name} has digest {profile.digest}, spec.routing.profileRef asks for {pinned}"
        return _exact(mode, Reason.PROFILE_MISSING, message, blocked=True)
    stale = stale_reason(snapshot, profile.key)
    rolling = replacing(snapshot)
    if stale is not None and rolling is not None:
        message = f"{stale}, but pods are being replaced ({rolling}); the policy in force stays until they are"
        return Wanted(PolicyEntry(EXACT_POLICY), EXACT, mode, name, profile, Reason.POLICY_PENDING, message, blocked=True)
    if stale is not None:
        message = f"{stale}; serving exact routing until the next tuning"
        return Wanted(PolicyEntry(EXACT_POLICY), EXACT, mode, name, profile, Reason.POLICY_STALE, message)
    entry = PolicyEntry(profile.policy, key=profile.key)
    chosen = Wanted(entry, profile.policy.digest, mode, name, profile)
    return _with_similarity(snapshot, spec, chosen, profile.similarity.uri if profile.similarity else None)


def stale_reason(snapshot: Snapshot, key: ProfileKey) -> str | None:
    """The first difference between what a profile was measured on and what some pod says it runs."""
    for pod in snapshot.live_pods:
        reason = key.mismatch(pod.state.key) if pod.state is not None else None
        if reason is not None:
            return reason
    return None


def _with_similarity(snapshot: Snapshot, spec: SereDeploymentSpec, chosen: Wanted, uri: str | None) -> Wanted:
    policy = chosen.entry.policy
    if not policy.needs_similarity():
        return chosen
    found = snapshot.similarities.get(uri) if uri else Similarity(problem="no similarity artefact is named")
    expected = policy.similarity_digest
    if found is None or not found.shards or found.digest is None:
        why = found.problem if found else f"{uri} cannot be read"
        message = f"policy {chosen.digest} re-routes by similarity, but {why}; the policy in force is kept"
        return blocked(chosen, message)
    if expected is not None and found.digest != expected:
        message = f"policy {chosen.digest} was made with similarity {expected}, but {uri} holds {found.digest}"
        return blocked(chosen, message)
    # The plug-in finds the artefact by the digest in the policy, so a policy that names none gets this one.
    policy = policy.model_copy(update={"similarity_digest": found.digest})
    entry = PolicyEntry(policy, chosen.entry.key, (found.digest, found.shards))
    return Wanted(entry, policy.digest, chosen.source, chosen.profile_name, chosen.profile)


def blocked(chosen: Wanted, message: str) -> Wanted:
    """The same, but not to be rolled out as things are."""
    return Wanted(
        chosen.entry,
        chosen.digest,
        chosen.source,
        chosen.profile_name,
        chosen.profile,
        Reason.INVALID_SPEC,
        message,
        blocked=True,
    )


def similarity_uris(snapshot_profiles: dict[str, Object], spec: SereDeploymentSpec) -> list[str]:
    """The artefacts that `observe` must read for this spec."""
    uris = [spec.static_similarity] if spec.routing.mode is RoutingMode.STATIC else []
    for profile in snapshot_profiles.values():
        reference: Any = profile.get("spec", {}).get("similarity")
        uris.append(reference.get("uri") if isinstance(reference, dict) else None)
    return [uri for uri in uris if uri]
