"""The worker's side: installs the seam once the model is loaded and answers the RPC methods of live control.

Callers in the same process (an `LLM`, an `AsyncLLM` inside a Ray actor) use `sere_ext.control.switch`, which asks every rank
first, drops the prefix cache where KV computed under the old policy would matter, and raises what a worker refuses.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from sere_ext import __version__
from sere_ext.contract.errors import SereError, UnsupportedError
from sere_ext.contract.policy import EXACT_POLICY, Policy
from sere_ext.contract.profile import ProfileKey
from sere_ext.contract.state import ModelShape, Note, RankState, Refusal
from sere_ext.engine.settings import Settings, resolve

logger = logging.getLogger("vllm.sere")

# Part of the compile cache's key (through additional_config): changes when what we put into a compiled graph changes.
GRAPH_FORM = 2


def patch_worker_base() -> None:
    """Give WorkerBase our methods and a look at the settings. Safe to call again."""
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
    WorkerBase.sere_apply = SereWorker.sere_apply
    WorkerBase.sere_note = SereWorker.sere_note
    WorkerBase.sere_state = SereWorker.sere_state
    WorkerBase.sere_record = SereWorker.sere_record
    WorkerBase._sere_patched = True


def _attach(worker: Any, vllm_config: Any, settings: Settings) -> None:
    """Hook this worker's model loading and warm-up; mark the compile cache as ours."""
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
    def execute_counted(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        worker.sere.set_real(scheduler_output.total_num_scheduled_tokens)
        return execute(scheduler_output, *args, **kwargs)

    def execute_dummy_counted(*args: Any, **kwargs: Any) -> Any:
        worker.sere.set_real(0)
        return execute_dummy(*args, **kwargs)

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
    similarity = _read_similarity(worker, state, settings.similarity) if settings.similarity and not stale else None
    state.apply(policy, 0, similarity)
    state.set_real(0)  # what runs before the first request is a profile run or a capture
    if stale:
        state.error = f"PolicyStale: {stale}; serving exact routing"
        logger.warning("sere: %s", state.error)
    logger.info("sere: re-routing %d MoE layers, policy %s: %s", len(layers), policy.digest, policy.describe())
    return state


def _read_similarity(worker: Any, state: Any, path: str) -> Any:
    from sere_ext.routing.state import Neighbours
    from sere_ext.similarity.file import check_fits, read_similarity
    from sere_ext.similarity.hub import model_config_dict

    similarity = read_similarity(path)
    model = worker.vllm_config.model_config
    numbers = tuple(layer.number for layer in state.layers)
    config = model_config_dict(model.model, model.revision)
    check_fits(similarity, path, config=config, layers=numbers, experts=state.layers[0].experts)
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


def _similarity_for(worker: Any, state: Any, policy: Policy, path: str | None) -> Any:
    """The matrices that a change brings, None where it keeps those in force. Reads the file at most once a change."""
    if not path or (policy.similarity_digest and policy.similarity_digest == state.similarity_digest):
        return None  # what is loaded has the digest already: its content is the same
    if state.checked and state.checked[0] == path:
        return state.checked[1]
    return _read_similarity(worker, state, path)


class SereWorker:
    """Methods that `collective_rpc` finds on every worker. `self` is vLLM's worker; answers are plain JSON values."""

    def sere_check(self, policy_json: str, generation: int | None = None, similarity_path: str | None = None) -> dict[str, Any]:
        """Whether `sere_apply` would refuse this change here; changes nothing, and keeps what it had to read for `sere_apply`.

        All ranks are asked first, so that a change which one rank must refuse is made on none.

        Returns:
            an empty object, or the `Refusal`.
        """
        try:
            state = _state_of(self)
            state.checked = None  # an earlier change that came to nothing; its file may have been replaced since
            policy = Policy.parse(policy_json)
            similarity = _similarity_for(self, state, policy, similarity_path)
            state.check(policy, generation, similarity)
        except SereError as error:
            return Refusal.of(error)
        state.checked = (similarity_path, similarity) if similarity else None
        return {}

    def sere_apply(
        self,
        policy_json: str,
        generation: int | None = None,
        similarity_path: str | None = None,
        note: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Put a policy in force between two steps. `sere_ext.control.switch` calls this in the right order on every rank.

        Args:
            policy_json: `sere_ext.contract.policy.Policy` as JSON text.
            generation: number of the change, not below the one in force; None takes the next.
            similarity_path: file to load the matrices from, visible to the worker; None keeps those in force.
            note: what the source of the change says of it (`Note`); None keeps what was noted before.

        Returns:
            the `RankState` after the change with the digest that it `replaced`, or the `Refusal`: then the old policy stays.
        """
        try:
            state = _state_of(self)
            policy = Policy.parse(policy_json)
            similarity = _similarity_for(self, state, policy, similarity_path)
            replaced = state.policy.digest
            state.apply(policy, generation, similarity)
        except SereError as error:
            return Refusal.of(error)
        state.checked = None
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
