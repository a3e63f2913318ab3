"""The warm engine: a Ray actor that owns one vLLM engine, switches policies in it and runs load blocks.

`EngineHost` is the program inside the actor (async, in-process AsyncLLM, so that requests stream and arrive);
`WarmEngine` is the coordinator's side: start, apply, block, stop, with crashes told apart from slow answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sere_ext.contract.errors import EngineCrashError, SereError, UnsupportedError
from sere_ext.contract.policy import EXACT, EXACT_POLICY, Policy
from sere_ext.contract.state import OTHER, CounterRow, by_key
from sere_ext.control.switch import States, agree, read_states, switch, total_counters

from sere_autotune.trial.chat import ChatTemplate
from sere_autotune.trial.load import Block, Load, Request, Sent, run_block
from sere_autotune.trial.measures import Answer
from sere_autotune.trial.stats import DropRejector
from sere_autotune.tuning.spec import TuningSpec, engine_options

START_TIMEOUT_S = 900.0  # large models load for minutes
SWITCH_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Reject:
    """End a block early once the candidate is worse than exact by more than `limit` (a share)."""

    limit: float
    alpha: float
    exact: dict[str, Answer]


@dataclass
class BlockReport:
    """A block's results with what the routers counted meanwhile."""

    block: Block
    active_before: float | None = None  # mean experts per layer and step in the policy's buckets
    active_after: float | None = None
    covered: float | None = None  # share of router calls inside the policy's buckets


@dataclass(frozen=True)
class EngineFacts:
    """What runs: for the profile's key and the space's bounds."""

    key: dict[str, Any]
    top_k: int
    ranks: int
    layers: tuple[int, ...] = ()  # model layer numbers of the MoE layers


class EngineHost:
    """Inside the actor's process. Every method is a coroutine on the actor's one event loop.

    Args:
        omp_threads: OMP_NUM_THREADS as the user set it, None if it was not set.
    """

    def __init__(self, omp_threads: str | None = None) -> None:
        # Ray sets OMP_NUM_THREADS for its workers, which would be vLLM's too; only the user's own may be.
        os.environ.pop("OMP_NUM_THREADS", None)
        if omp_threads is not None:
            os.environ["OMP_NUM_THREADS"] = omp_threads
        self.engine: Any = None
        self.requests = 0
        self.similarity: str | None = None
        self.digest = EXACT
        self.template = ChatTemplate()
        self.defaults: dict[str, Any] = {}

    def pid(self) -> int:
        return os.getpid()

    async def start(self, arguments: list[str], similarity: str | None) -> States:
        """Start the engine with exact routing. Returns the state of every rank of every engine."""
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        if current_platform.is_cpu():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        parser = _serve_arguments()(FlexibleArgumentParser())
        try:
            parsed = parser.parse_args(arguments)
        except SystemExit:
            raise UnsupportedError(
                f"the engine does not know its arguments: {' '.join(arguments)}; see `vllm serve --help`"
            ) from None
        args = AsyncEngineArgs.from_cli_args(parsed)
        args.disable_log_stats = True
        ours: dict[str, Any] = {"policy": EXACT_POLICY.to_json_dict()}
        if similarity:
            ours["similarity"] = similarity
        args.additional_config = {**(args.additional_config or {}), "sere": ours}
        self.similarity = similarity
        self.template = ChatTemplate.of(arguments)
        self.engine = AsyncLLM.from_engine_args(args)
        self.defaults = server_defaults(self.engine.model_config)
        return await self.states()

    async def apply(self, policy_json: str) -> None:
        """Switch every engine cleanly: drain, set, read back from every rank, drop the prefix cache, go on.

        Raises:
            EngineCrashError: an engine is dead, ranks differ afterwards, or answers would mix two policies.
            SereError: the engine refuses the policy; it would refuse it again.
        """
        wanted = Policy.parse(policy_json)
        try:
            states = await switch(self.engine, wanted, similarity=self.similarity, clean=True)
        except SereError as error:
            if self.engine.errored:
                raise EngineCrashError(f"the engine died: {error}") from error
            raise
        if (digest := _alike(states)[0].policy_digest) != wanted.digest:
            raise EngineCrashError(f"the engine runs policy {digest} after {wanted.digest} was set")
        # Nothing runs between two blocks, so this holds; an engine that cannot do it would answer from the old policy's cache.
        if not await self.engine.reset_prefix_cache():
            raise EngineCrashError("the prefix cache could not be dropped, so answers would mix two policies")
        self.digest = wanted.digest

    async def states(self) -> States:
        """The state of every rank of every data-parallel engine, which must all have the same in force."""
        try:
            return _alike(await read_states(self.engine))
        except UnsupportedError as error:
            raise EngineCrashError(str(error)) from error

    async def block(
        self, requests: Sequence[Request], load: Load, fillers: Sequence[Request], deadline_s: float | None, reject: Reject | None
    ) -> BlockReport:
        """Run one block under the policy in force."""
        rejector = DropRejector(reject.limit, reject.alpha) if reject else None

        def watch(_: int, sent: Sent) -> str | None:
            if rejector is None or reject is None or sent.item is None or sent.correct is None or sent.item not in reject.exact:
                return None
            if rejector.update(reject.exact[sent.item].correct, sent.correct):
                return f"accuracy: rejected after {rejector.items} items"
            return None

        before = total_counters(await self.states())
        block = await run_block(
            self.send, requests, load, fillers=fillers, watch=watch if reject else None, deadline_s=deadline_s
        )
        dead = next((s.error for s in block.sent if s.error and "Dead" in s.error), None)
        if dead:
            raise EngineCrashError(f"the engine died under load: {dead}")
        after = total_counters(await self.states())
        return self._report(block, before, after)

    def _report(self, block: Block, before: Iterable[CounterRow], after: Iterable[CounterRow]) -> BlockReport:
        old = by_key(before)
        rows = [row.since(old.get(row.key)) for row in after if row.digest == self.digest]
        calls = sum(row.calls for row in rows)
        inside = [row for row in rows if row.bucket != OTHER or self.digest == EXACT]
        routed = sum(row.calls for row in inside)
        if not routed:
            return BlockReport(block, covered=0.0 if calls else None)
        return BlockReport(
            block,
            active_before=sum(row.active_before for row in inside) / routed,
            active_after=sum(row.active_after for row in inside) / routed,
            covered=routed / calls,
        )

    async def send(self, request: Request) -> AsyncIterator[tuple[str, int]]:
        """Stream (text, tokens) chunks of one greedy answer, sampled as `vllm serve` samples a request of temperature 0.

        The end-of-sequence token ends it unless the request fixes the length.
        """
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self.requests += 1
        defaults = dict(self.defaults)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=min(request.max_tokens, defaults.pop("max_tokens", request.max_tokens)),
            **defaults,
            stop=list(request.stop) or None,
            ignore_eos=request.ignore_eos,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt: Any = request.prompt
        if request.messages:
            prompt = {"prompt_token_ids": self.template.tokens(self.engine.get_tokenizer(), request.messages, request.place)}
        if request.cut_tokens is not None:
            tokenizer = self.engine.get_tokenizer()
            prompt = {"prompt_token_ids": tokenizer.encode(request.prompt)[: request.cut_tokens]}
        async for output in self.engine.generate(prompt, params, f"sere-{self.requests}"):
            answer = output.outputs[0]
            yield answer.text, len(answer.token_ids)

    async def stop(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()
            self.engine = None


_SAMPLING = ("repetition_penalty", "presence_penalty", "frequency_penalty", "top_k", "top_p", "min_p")


def server_defaults(model_config: Any) -> dict[str, Any]:
    """What `vllm serve` puts into a request that does not say it: of generation_config.json and --override-generation-config.

    Args:
        model_config: vLLM's ModelConfig.

    Returns:
        Arguments of SamplingParams; `max_tokens` is there where the server never answers longer.
    """
    given = model_config.get_diff_sampling_param()
    found = {name: given[name] for name in _SAMPLING if name in given}
    if model_config.generation_config in ("auto", "vllm"):
        longest = (model_config.override_generation_config or {}).get("max_new_tokens")
    else:
        longest = given.get("max_tokens")
    return found if longest is None else {**found, "max_tokens": longest}


def _serve_arguments() -> Any:
    """The function that adds the flags of `vllm serve` to a parser; vLLM moved it between the releases that are supported."""
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    return make_arg_parser


def _alike(states: States) -> States:
    if agree(states):
        return states
    said = ", ".join(f"{s.engine}/{s.rank}: {s.policy_digest}, generation {s.generation}" for s in states)
    raise EngineCrashError(f"the engine's ranks differ in what is in force (engine/rank: policy): {said}")


@dataclass
class WarmEngine:
    """One engine in one actor, started on first use and again after a crash."""

    spec: TuningSpec
    similarity: str | None
    actor: Any = None
    facts: EngineFacts | None = None
    start_seconds: float = 0.0
    switch_seconds: float = 0.0  # summed over switches
    switches: int = 0
    on_start: Any = None  # called when device time begins and ends: (running: bool) -> None
    _ray: Any = field(default=None, repr=False)

    def start(self, timeout_s: float = START_TIMEOUT_S) -> EngineFacts:
        """Start Ray and the engine. Raises EngineCrashError, or the engine's own refusal (UnsupportedError, SimilarityError)."""
        ray = self._ray = _ray()
        began = time.monotonic()
        if self.on_start:
            self.on_start(True)
        devices = ray.cluster_resources().get("GPU", 0)
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 64}
        if devices:
            options["num_gpus"] = min(self.spec.engine.tensor_parallel_size, devices)
        self.actor = ray.remote(EngineHost).options(**options).remote(os.environ.get("OMP_NUM_THREADS"))
        states: States = self._call(
            self.actor.start.remote(["--model", self.spec.model, *engine_options(self.spec)], self.similarity),
            timeout_s,
            "starting",
        )
        self.start_seconds = time.monotonic() - began
        key, model = states[0].key, states[0].model
        self.facts = EngineFacts(
            key=key.to_json_dict(), top_k=model.top_k, ranks=len(states), layers=tuple(sorted(model.moe_layers))
        )
        return self.facts

    def apply(self, policy: Policy) -> None:
        """Put a policy in force on every rank, with a clean prefix cache; also where it already is, for the cache's sake."""
        if self.actor is None:
            self.start()
        began = time.monotonic()
        self._call(self.actor.apply.remote(json.dumps(policy.to_json_dict())), SWITCH_TIMEOUT_S, f"switching to {policy.digest}")
        self.switch_seconds += time.monotonic() - began
        self.switches += 1

    def block(
        self,
        requests: Sequence[Request],
        load: Load,
        fillers: Sequence[Request] = (),
        deadline_s: float | None = None,
        reject: Reject | None = None,
    ) -> BlockReport:
        """Run one block. Raises EngineCrashError if the engine dies or does not end within its time."""
        patience = (deadline_s or 3600.0) + 300.0
        return self._call(
            self.actor.block.remote(list(requests), load, list(fillers), deadline_s, reject), patience, "running a block"
        )

    def stop(self) -> None:
        """End the engine and its actor; nothing is left running."""
        if self.actor is None or self._ray is None:
            return
        try:
            self._ray.get(self.actor.stop.remote(), timeout=30)
        except Exception:  # a dead actor is what we want
            pass
        self._ray.kill(self.actor)
        self.actor = None
        if self.on_start:
            self.on_start(False)

    def _call(self, reference: Any, timeout_s: float, doing: str) -> Any:
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference, timeout=timeout_s)
        except exceptions.GetTimeoutError as error:
            self.stop()
            raise EngineCrashError(f"the engine hung while {doing} (over {timeout_s:.0f} s)") from error
        except exceptions.RayTaskError as error:
            cause = error.cause
            self.stop()
            if isinstance(cause, SereError):
                raise cause from None
            raise EngineCrashError(f"the engine failed while {doing}: {_root_line(cause or error)}") from error
        except exceptions.RayError as error:
            self.stop()
            raise EngineCrashError(f"the engine's process died while {doing}: {_root_line(error)}") from error


def _root_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _ray() -> Any:
    """Ray, started on this machine alone with little memory, or joined where a cluster is configured (RAY_ADDRESS)."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray lowers its workers' priority by 15, which would slow down the engine that we measure.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    if not ray.is_initialized():
        on_term = signal.getsignal(signal.SIGTERM)
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, logging_level="error")
        else:
            ray.init(
                num_cpus=max(2, os.cpu_count() or 2),
                include_dashboard=False,
                object_store_memory=100 * 1024 * 1024,
                log_to_driver=bool(os.environ.get("SERE_ENGINE_LOGS")),
                logging_level="error",
                _node_ip_address="127.0.0.1",
            )
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, on_term)  # Ray puts in its own, which aborts with a stack trace
    return ray


def shut_ray() -> None:
    import sys

    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
