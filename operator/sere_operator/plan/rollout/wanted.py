"""Which routing policy is wanted, judged from the spec and what is known. Pure; nothing here reads pods' progress."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from sere_ext.contract.errors import ProfileError
from sere_ext.contract.policy import EXACT, EXACT_POLICY
from sere_ext.contract.profile import Profile, ProfileKey, ProfileSpec
from sere_ext.contract.record import canonical_json
from sere_operator.api import meta
from sere_operator.api.conditions import Reason
from sere_operator.api.deployment import RoutingMode, SereDeploymentSpec
from sere_operator.plan.chain import first
from sere_operator.plan.objects.revision import changing, replacing, what_runs
from sere_operator.plan.objects.volume import PolicyEntry
from sere_operator.plan.snapshot import Object, PodView, Similarity, Snapshot


@dataclass(frozen=True)
class Wanted:
    """The policy that the spec leads to.

    profile      the SereProfile that the policy comes from; None for Exact and Static
    problem      why the policy is exact (or blocked) although the spec asks for more
    blocked      the policy in force is kept: the answer is not known yet, or the wanted policy cannot be had
    misfits      pods that the policy was not made for, by name, with the reason: they route exactly, the others by the policy
    """

    entry: PolicyEntry
    digest: str
    source: RoutingMode
    profile_name: str | None = None
    profile: ProfileSpec | None = None
    problem: Reason | None = None
    message: str = ""
    blocked: bool = False
    misfits: dict[str, str] = field(default_factory=dict)

    @property
    def by_hand(self) -> bool:
        """Mode Static: the user answers for the policy's accuracy, so no golden prompts are asked for."""
        return self.source is RoutingMode.STATIC


def _exact(mode: RoutingMode, problem: Reason | None = None, message: str = "", *, blocked: bool = False) -> Wanted:
    return Wanted(PolicyEntry(EXACT_POLICY), EXACT, mode, problem=problem, message=message, blocked=blocked)


def blocked(chosen: Wanted, message: str) -> Wanted:
    """The same policy, but not to be rolled out as things are."""
    return replace(chosen, problem=Reason.INVALID_SPEC, message=message, blocked=True)


def overridden(snapshot: Snapshot) -> bool:
    """The kill switch, set by annotation on the resource itself."""
    return snapshot.annotations.get(meta.OVERRIDE_ANNOTATION) == meta.OVERRIDE_EXACT


def tuning_hash(spec: SereDeploymentSpec) -> str:
    """What a tuning run is for, of an `engine.effective` spec. Any change asks for another run; replicas, rollout and routing
    do not, nor where the study is kept, what else the tuning pod has, and how engine pods end. 8 hex digits."""
    state = {
        field: getattr(spec, field).to_json_dict() if getattr(spec, field) is not None else None
        for field in ("model", "engine", "resources", "slo", "accuracy", "tuning")
    }
    state["engine"] = what_runs(spec.engine)
    for part in ("storage", "podTemplate"):
        (state["tuning"] or {}).pop(part, None)
    return hashlib.sha256(canonical_json(state)).hexdigest()[:8]


def tuning_job_name(name: str, spec: SereDeploymentSpec) -> str:
    """Its children end in at most 8 further characters, and a Job's pods must stay below 63."""
    return meta.child_name(name, f"tune-{tuning_hash(spec)}", 46)


def tuning_job_of(snapshot: Snapshot, spec: SereDeploymentSpec) -> Object | None:
    """This spec's SereTuningJob, or what is remembered of one that was deleted after its run; None if there was none."""
    name = tuning_job_name(snapshot.name, spec)
    live = next((job for job in snapshot.tuning_jobs if job["metadata"]["name"] == name), None)
    runs = snapshot.status.get("tuningRuns") or []
    run = next((run for run in runs if run["name"] == name and run.get("outcome")), None)
    if live is not None or run is None:
        return live
    complete = {"type": "Complete", "status": "True", "reason": run["outcome"], "message": run.get("message", "")}
    status = {"outcome": run["outcome"], "profile": run.get("profile"), "stage": "ended", "conditions": [complete]}
    return {"metadata": {"name": name}, "status": status}


@dataclass(frozen=True)
class Question:
    """A snapshot and its spec, and the profile that they lead to, read once."""

    snapshot: Snapshot
    spec: SereDeploymentSpec

    @property
    def mode(self) -> RoutingMode:
        return self.spec.routing.mode

    @cached_property
    def name(self) -> str | None:
        """The wanted profile's name."""
        return profile_name(self.snapshot, self.spec)

    @cached_property
    def profile(self) -> ProfileSpec | ProfileError | None:
        """The wanted profile, why it cannot be read, or None where there is none."""
        found = self.snapshot.profiles.get(self.name or "")
        try:
            return _parse(found) if found is not None else None
        except ProfileError as error:
            return error

    @cached_property
    def misfits(self) -> dict[str, str]:
        """Pods that the wanted profile was not made for."""
        return misfits(self.snapshot, self.profile.key) if isinstance(self.profile, ProfileSpec) else {}

    def missing(self, message: str) -> Wanted:
        return _exact(self.mode, Reason.PROFILE_MISSING, message, blocked=True)


def wanted(snapshot: Snapshot, spec: SereDeploymentSpec) -> Wanted:
    """The answer of the first of `CHECKS` that has one.

    Args:
        spec: with the engine image that the pods get (`revision.effective`).
    """
    answer = first(CHECKS, Question(snapshot, spec))
    assert answer is not None, "policy_of_the_profile always answers"
    return answer


def exact_was_asked_for(q: Question) -> Wanted | None:
    """Mode Exact."""
    return _exact(q.mode) if q.mode is RoutingMode.EXACT else None


def static_policy(q: Question) -> Wanted | None:
    """Mode Static: the given policy, blocked while its similarity artefact cannot be had."""
    if q.mode is not RoutingMode.STATIC:
        return None
    policy = q.spec.routing.policy or EXACT_POLICY
    chosen = Wanted(PolicyEntry(policy), policy.digest, q.mode)
    return _with_similarity(q.snapshot, chosen, q.spec.static_similarity)


def no_profile_yet(q: Question) -> Wanted | None:
    """Mode Tuned before the first run has made a profile: exact."""
    if q.name is not None:
        return None
    return _exact(q.mode, Reason.AWAITING_PROFILE, "routing is exact until tuning has made a profile")


def profile_is_missing(q: Question) -> Wanted | None:
    """The profile was deleted, or never applied: the policy in force is kept."""
    if q.profile is not None:
        return None
    tuned = f"tune again with annotation {meta.RETUNE_ANNOTATION}={tuning_job_name(q.snapshot.name, q.spec)}"
    way_out = tuned if q.mode is RoutingMode.TUNED else "apply it, or correct spec.routing.profileRef"
    return q.missing(f"profile {q.name} does not exist; {way_out}")


def profile_cannot_be_read(q: Question) -> Wanted | None:
    """The profile is of another release's form: the policy in force is kept."""
    return q.missing(f"profile {q.name} cannot be read: {q.profile}") if isinstance(q.profile, ProfileError) else None


def profile_is_of_other_content(q: Question) -> Wanted | None:
    """The spec pins a digest, and the profile of that name has another: the policy in force is kept."""
    assert isinstance(q.profile, ProfileSpec)
    pinned = q.spec.routing.profile_ref.digest if q.spec.routing.profile_ref else None
    if pinned is None or pinned == q.profile.digest:
        return None
    return q.missing(f"profile {q.name} has digest {q.profile.digest}, spec.routing.profileRef asks for {pinned}")


def profile_waits_for_its_pods(q: Question) -> Wanted | None:
    """Pods are not what the profile was made for, but they are being replaced: the policy in force is kept until then.

    Pods of the one revision may still serve by their policy, and each pod refuses a policy that was not made for it.
    """
    assert isinstance(q.profile, ProfileSpec)
    rolling = replacing(q.snapshot)
    if rolling is None or not q.misfits:
        return None
    message = f"{_told(q.misfits)}, but pods are being replaced ({rolling}); the policy in force stays until they are"
    return replace(_exact(q.mode, Reason.POLICY_PENDING, message, blocked=True), profile_name=q.name, profile=q.profile)


def profile_is_stale(q: Question) -> Wanted | None:
    """No pod is what the profile was made for: exact."""
    assert isinstance(q.profile, ProfileSpec)
    if not _all_misfit(q.snapshot, q.misfits):
        return None
    message = f"{_told(q.misfits)}; serving exact routing until the next tuning"
    return replace(_exact(q.mode, Reason.POLICY_STALE, message), profile_name=q.name, profile=q.profile)


def policy_of_the_profile(q: Question) -> Wanted | None:
    """The profile's policy, blocked while its similarity artefact cannot be had."""
    assert isinstance(q.profile, ProfileSpec)
    entry = PolicyEntry(q.profile.policy, key=q.profile.key)
    chosen = Wanted(entry, q.profile.policy.digest, q.mode, q.name, q.profile, misfits=q.misfits)
    return _with_similarity(q.snapshot, chosen, q.profile.similarity.uri if q.profile.similarity else None)


CHECKS = (
    exact_was_asked_for,
    static_policy,
    no_profile_yet,
    profile_is_missing,
    profile_cannot_be_read,
    profile_is_of_other_content,
    profile_waits_for_its_pods,
    profile_is_stale,
    policy_of_the_profile,
)


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
    """The profile of that name; None where there is none, or none that this release can read."""
    found = snapshot.profiles.get(name or "")
    try:
        return _parse(found) if found is not None else None
    except ProfileError:
        return None


def _parse(found: Object) -> ProfileSpec:
    return Profile.parse({key: found[key] for key in ("apiVersion", "kind", "spec") if key in found}).spec


def misfits(snapshot: Snapshot, key: ProfileKey) -> dict[str, str]:
    """Pods that say that they are not what a profile was measured on, by name, with the first difference."""
    found = {}
    for pod in snapshot.live_pods:
        running = pod.key
        reason = key.mismatch(running) if running is not None else None
        if reason is not None:
            found[pod.name] = reason
    return found


def suited(snapshot: Snapshot, chosen: Wanted) -> list[PodView]:
    """Pods, not on their way out, that the wanted policy was made for as far as they say what they are."""
    return [pod for pod in snapshot.live_pods if pod.name not in chosen.misfits]


def all_misfit(snapshot: Snapshot, key: ProfileKey) -> bool:
    """Whether there are pods that tell what they are, and the profile was made for none of them."""
    return _all_misfit(snapshot, misfits(snapshot, key))


def _all_misfit(snapshot: Snapshot, found: dict[str, str]) -> bool:
    return bool(found) and all(pod.name in found for pod in snapshot.live_pods if pod.key is not None)


def _told(found: dict[str, str]) -> str:
    """The first misfit in words: `profile was made for engine 0.31.0, this pod runs 0.32.0 (pod m-1, and 2 more)`."""
    (name, reason), more = min(found.items()), len(found) - 1
    return f"{reason} (pod {name}{f', and {more} more' if more else ''})"


def _with_similarity(snapshot: Snapshot, chosen: Wanted, uri: str | None) -> Wanted:
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
    return replace(chosen, entry=entry, digest=policy.digest)


def similarity_uris(snapshot_profiles: dict[str, Object], spec: SereDeploymentSpec) -> list[str]:
    """The artefacts that `observe` must read for this spec."""
    uris = [spec.static_similarity] if spec.routing.mode is RoutingMode.STATIC else []
    for profile in snapshot_profiles.values():
        reference: Any = profile.get("spec", {}).get("similarity")
        uris.append(reference.get("uri") if isinstance(reference, dict) else None)
    return [uri for uri in uris if uri]
