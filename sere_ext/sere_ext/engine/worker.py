"""The worker's side: installs the seam once the model is loaded and answers the RPC methods of live control.

Callers in the same process (an `LLM`, an `AsyncLLM` inside a Ray actor) use `sere_ext.control.switch`, which asks every rank
first, drops the prefix cache where KV computed under the old policy would matter, and raises what a worker refuses.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from sere_ext import __version__
from sere_ext.contract.errors import SereError, SimilarityError, UnsupportedError
from sere_ext.contract.policy import EXACT_POLICY, Policy
from sere_ext.contract.profile import ProfileKey
from sere_ext.contract.similarity import read_content
from sere_ext.contract.state import ModelShape, Note, RankState, Readiness, Refusal
from sere_ext.engine.offer import Offer
from sere_ext.engine.settings import Settings, resolve

logger = logging.getLogger("vllm.sere")

# Part of the compile cache's key (through additional_config): changes when what we put into a compiled graph changes.
GRAPH_FORM = 2


def patch_worker_base() -> None:
    """Give WorkerBase our RPC methods, and have every worker read the settings as it is made. Safe to call again."""
    from vllm.v1.worker.worker_base import WorkerBase

    if getattr(WorkerBase, "_sere_patched", False):
        return
    original = WorkerBase.__init__

    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        settings = resolve(vllm_config.additional_config)
        if settings is not None:
            _attach(self, vllm_config, settings)

    WorkerBase.__init__ = init
    WorkerBase.sere_check = SereWorker.sere_check
    WorkerBase.sere_offer = SereWorker.sere_offer
    WorkerBase.sere_apply = SereWorker.sere_apply
    WorkerBase.sere_note = SereWorker.sere_note
    WorkerBase.sere_state = SereWorker.sere_state
    WorkerBase.sere_record = SereWorker.sere_record
    WorkerBase._sere_patched = True


def _attach(worker: Any, vllm_config: Any, settings: Settings) -> None:
    """Wrap this worker's model loading, warm-up and steps, and mark the compile cache as ours."""
    from sere_ext.engine.backends import prefer_modular
    from sere_ext.engine.features import check_features
    from sere_ext.engine.proof import prove_hit
    from sere_ext.engine.versions import check_engine_version, engine_version
    from sere_ext.routing import ops

    device = vllm_config.device_config.device_type
    check_engine_version(engine_version(), device)
    check_features(vllm_config)
    if isinstance(vllm_config.additional_config, dict):
        ours = vllm_config.additional_config.get("sere") or {}
        # A compiled graph holds the numbers of its layers, which follow those of engines that this process had before: a graph
        # of another number would re-route by another engine's policy.
        vllm_config.additional_config["sere"] = {**ours, "graph": f"{__version__}/{GRAPH_FORM}/{ops.next_slot()}"}
    load_model, warm_up = worker.load_model, worker.compile_or_warm_up_model
    execute, execute_dummy = worker.execute_model, worker.execute_dummy_batch

    def load_and_install(*args: Any, **kwargs: Any) -> Any:
        if device == "cuda":
            prefer_modular()
        result = load_model(*args, **kwargs)
        worker.sere = _install(worker, vllm_config, device, settings)
        return result

    def warm_up_and_prove(*args: Any, **kwargs: Any) -> Any:
        result = warm_up(*args, **kwargs)
        prove_hit(worker, device)
        return result

    # Rows that pad a step up to a captured size stand behind the scheduled tokens, so their number is all that is to be known.
    # A step is counted once it is launched: whoever reads the counters meanwhile finds too many calls, never too few.
    def execute_counted(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = scheduler_output.total_num_scheduled_tokens
        worker.sere.set_real(tokens)
        result = execute(scheduler_output, *args, **kwargs)
        if tokens:  # without tokens vLLM only does its bookkeeping, and the model does not run
            worker.sere.count_step()
        return result

    def execute_dummy_counted(*args: Any, **kwargs: Any) -> Any:
        worker.sere.set_real(0)
        result = execute_dummy(*args, **kwargs)
        worker.sere.count_step()
        return result

    worker.load_model, worker.compile_or_warm_up_model = load_and_install, warm_up_and_prove
    worker.execute_model, worker.execute_dummy_batch = execute_counted, execute_dummy_counted


def _install(worker: Any, vllm_config: Any, device: str, settings: Settings) -> Any:
    from sere_ext.engine import seam
    from sere_ext.routing.state import Mirror, WorkerState

    layers = seam.install(worker.get_model(), device)
    mirror: Mirror | None = None
    if device == "cuda":
        from sere_ext.routing.cuda import CudaMirror

        mirror = CudaMirror(layers)
    state = WorkerState(layers, running_key(vllm_config).to_json_dict(), mirror)
    policy = settings.policy
    stale = settings.key.mismatch(running_key(vllm_config)) if settings.key else None
    if stale:
        policy = EXACT_POLICY
    similarity = None
    if settings.similarity and not stale:
        content, _ = read_content(settings.similarity)
        similarity = _neighbours_of(worker, state, content, settings.similarity)
    state.apply(policy, 0, similarity)
    state.set_real(0)  # what runs before the first request is a profile run or a capture
    if stale:
        state.error = f"PolicyStale: {stale}; serving exact routing"
        logger.warning("sere: %s", state.error)
    logger.info("sere: re-routing %d MoE layers, policy %s: %s", len(layers), policy.digest, policy.describe())
    return state


def _neighbours_of(worker: Any, state: Any, content: bytes, where: str) -> Any:
    """Parse a whole similarity file, check that it fits the model, and sort its matrices. Takes seconds for large models."""
    from sere_ext.routing.state import Neighbours
    from sere_ext.similarity.file import check_fits, parse_similarity
    from sere_ext.similarity.hub import model_config_dict

    similarity = parse_similarity(content, where)
    model = worker.vllm_config.model_config
    numbers = tuple(layer.number for layer in state.layers)
    config = model_config_dict(model.model, model.revision)
    check_fits(similarity, where, config=config, layers=numbers, experts=state.layers[0].experts)
    return Neighbours.of(similarity, numbers)


def running_key(vllm_config: Any) -> ProfileKey:
    """What this engine is, for comparison with what a profile was made on."""
    from vllm.platforms import current_platform

    from sere_ext.contract.model_config import model_config_digest, weight_format
    from sere_ext.engine.versions import engine_version
    from sere_ext.similarity.hub import commit_of, model_config_dict

    model = vllm_config.model_config
    config = model_config_dict(model.model, model.revision)
    return ProfileKey(
        model_name=model.model,
        model_revision=commit_of(model.model, model.revision) or model.revision or "",
        config_digest=model_config_digest(config),
        weight_format=weight_format(config, str(model.dtype).removeprefix("torch."), model.quantization),
        engine_version=engine_version(),
        plugin_version=__version__,
        device="cpu" if current_platform.is_cpu() else current_platform.get_device_name(),
        tensor_parallel_size=vllm_config.parallel_config.tensor_parallel_size,
    )


def _state_of(worker: Any) -> Any:
    state = getattr(worker, "sere", None)
    if state is None:
        raise UnsupportedError(
            "this engine was started without sere; start it with `sere serve`, or with additional_config={'sere': {}} in Python"
        )
    return state


def _offer_of(state: Any, digest: str | None) -> Any:
    """The `Offer` that a change brings; None where its matrices are in force already, or it brings none.

    Raises:
        SimilarityError: nobody handed the file over.
    """
    if digest is None or digest == state.similarity_digest:
        return None
    if state.offer is None or state.offer.digest != digest:
        raise SimilarityError(f"the similarity {digest} was not handed to this worker; use `sere_ext.control.switch`")
    return state.offer


class SereWorker:
    """Methods that `collective_rpc` finds on every worker. `self` is vLLM's worker; answers are plain JSON values."""

    def sere_check(self, policy_json: str, generation: int | None = None, similarity_digest: str | None = None) -> dict[str, Any]:
        """Whether `sere_apply` would refuse this change here; changes nothing.

        All ranks are asked first, so that a change which one rank must refuse is made on none. They are asked again until
        none of them lacks the similarity file or is still at work on it.

        Returns:
            the `Readiness`, or the `Refusal`.
        """
        try:
            state = _state_of(self)
            state.check(Policy.parse(policy_json), generation, similarity_digest)
            if similarity_digest in (None, state.similarity_digest):
                return Readiness.READY.answer()
            if state.offer is None or state.offer.digest != similarity_digest:
                return Readiness.LACKS_FILE.answer()
            if not state.offer.ready:
                return Readiness.AT_WORK.answer()
            state.offer.neighbours()
        except SereError as error:
            return Refusal.of(error)
        return Readiness.READY.answer()

    def sere_offer(self, similarity_digest: str, content: bytes, where: str) -> None:
        """Take a similarity file and begin to prepare it for `sere_apply`. Returns at once.

        Args:
            content: the whole file; a worker on another node cannot read the path that the change names.
            where: names the file in messages.
        """
        state = _state_of(self)
        state.offer = Offer(similarity_digest, functools.partial(_neighbours_of, self, state, bytes(content), where))

    def sere_apply(
        self,
        policy_json: str,
        generation: int | None = None,
        similarity_digest: str | None = None,
        note: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Put a policy in force between two steps. `sere_ext.control.switch` calls this in the right order on every rank.

        Args:
            policy_json: `sere_ext.contract.policy.Policy` as JSON text.
            generation: number of the change, not below the one in force; None takes the next.
            similarity_digest: of the matrices to use, which are in force or were offered; None keeps those in force.
            note: what the source of the change says of it (`Note`); None keeps what was noted before.

        Returns:
            the `RankState` after the change with the digest that it `replaced`, or the `Refusal`: then the old policy stays.
        """
        try:
            state = _state_of(self)
            policy = Policy.parse(policy_json)
            offer = _offer_of(state, similarity_digest)
            replaced = state.policy.digest
            state.apply(policy, generation, offer.neighbours() if offer else None)
        except SereError as error:
            return Refusal.of(error)
        state.offer = None
        if note is not None:
            state.note = note
        return {**SereWorker.sere_state(self), "replaced": replaced}

    def sere_note(self, note: dict[str, Any]) -> None:
        """Keep fields of a `Note` without a change of policy; the other fields stay as they are."""
        state = _state_of(self)
        state.note = {**state.note, **note}

    def sere_record(self, on: bool) -> list[dict[str, Any]]:
        """Begin to keep some router calls of every MoE layer (bounded, see `Recorder`), or end it; hands over what was kept.

        Exact routing must be in force meanwhile. Only the CPU's operator can keep calls: elsewhere there are none.

        Returns:
            per MoE layer renormalise, scoring (as in `LayerState`) and calls, each with tokens, experts, and the bytes of ids
            (int32 [T, k]; -1 for an expert that answers with a constant), weights (float32 [T, k]) and logits (float16 [T, E]).
        """
        from sere_ext.routing.record import Recorder

        found = []
        for layer in _state_of(self).layers:
            calls = layer.recorder.calls if layer.recorder else []
            found.append({"renormalise": layer.renormalise, "scoring": layer.scoring, "calls": calls})
            layer.recorder = Recorder(layer.constants) if on else None
        return found

    def sere_state(self) -> dict[str, Any]:
        """What is in force on this rank: a `RankState`.

        Raises:
            UnsupportedError: the engine was started without sere.
        """
        state = _state_of(self)
        worker: Any = self
        counters = state.counters()
        shape = ModelShape(
            num_experts=state.layers[0].experts, top_k=state.top_k, moe_layers=tuple(layer.number for layer in state.layers)
        )
        return RankState(
            rank=worker.rank, policy=state.policy, policy_digest=state.policy.digest, similarity_digest=state.similarity_digest,
            generation=state.generation, switches=state.switches, error=state.error or state.bypassed(), note=Note(**state.note),
            key=ProfileKey(**state.key), model=shape, counters=counters,
        ).to_json_dict()  # fmt: skip


__all__ = ["GRAPH_FORM", "SereWorker", "patch_worker_base", "running_key"]
