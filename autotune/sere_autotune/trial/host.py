"""The program inside the Ray actor: owns one in-process AsyncLLM, switches its policy and runs load blocks on it."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from sere_autotune.trial import logs
from sere_autotune.trial.chat import ChatTemplate
from sere_autotune.trial.engine import EXACT_BY_SIZE, BlockReport, Reject, median_step
from sere_autotune.trial.load import Block, EngineGoneError, Load, Request, Sent, run_block
from sere_autotune.trial.stats import DropRejector
from sere_autotune.trial.wave import Trace, Wave, timed
from sere_ext.contract.errors import EngineCrashError, SereError, UnsupportedError
from sere_ext.contract.policy import EXACT, EXACT_POLICY, Policy
from sere_ext.contract.state import OTHER, CounterRow, by_key
from sere_ext.control.switch import States, agree, read_states, switch, total_counters


class EngineHost:
    """Inside the actor's process. Every method is a coroutine on the actor's one event loop.

    Args:
        omp_threads: OMP_NUM_THREADS as the user set it, None if it was not set.
        log: file that everything which the engine's processes print goes to; None leaves it where Ray puts it.
    """

    def __init__(self, omp_threads: str | None = None, log: str | None = None) -> None:
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
        self.log = logs.redirect(log) if log else None

    def pid(self) -> int:
        return os.getpid()

    async def start(self, arguments: list[str], similarity: str | None) -> States:
        """Start the engine with exact routing. Returns the state of every rank of every engine.

        Raises:
            UnsupportedError: the engine does not know one of the arguments.
            EngineCrashError: the engine did not start; the message ends with the root line of its log.
        """
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        parser = _serve_arguments()(FlexibleArgumentParser())
        try:
            parsed = parser.parse_args(arguments)
        except SystemExit:
            raise UnsupportedError(
                f"the engine does not know its arguments: {' '.join(arguments)}; see `vllm serve --help`"
            ) from None
        if current_platform.is_cpu():
            small_cache(os.environ, parsed)
        args = AsyncEngineArgs.from_cli_args(parsed)
        args.disable_log_stats = True
        ours: dict[str, Any] = {"policy": EXACT_POLICY.to_json_dict()}
        if similarity:
            ours["similarity"] = similarity
        args.additional_config = {**(args.additional_config or {}), "sere": ours}
        self.similarity = similarity
        self.template = ChatTemplate.of(arguments)
        try:
            self.engine = AsyncLLM.from_engine_args(args)
        except SereError:
            raise
        except Exception as error:
            raise EngineCrashError(f"the engine did not start: {self._cause(error)}") from error
        self.defaults = server_defaults(self.engine.model_config)
        return await self.states()

    async def most_requests(self) -> int:
        """How many requests may be in a step, over all data-parallel engines; more than that wait."""
        config = self.engine.vllm_config
        return int(config.scheduler_config.max_num_seqs) * int(config.parallel_config.data_parallel_size)

    async def apply(self, policy_json: str) -> None:
        """Switch every engine cleanly: drain, set, read back from every rank, drop the prefix cache, go on.

        Under exact routing steps are counted by their size.

        Raises:
            EngineCrashError: an engine is dead, ranks differ afterwards, or answers would mix two policies.
            SereError: the engine refuses the policy; it would refuse it again.
        """
        wanted = Policy.parse(policy_json)
        try:
            policy = EXACT_BY_SIZE if wanted.digest == EXACT else wanted
            states = await switch(self.engine, policy, similarity=self.similarity, clean=True)
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
        """The state of every rank of every data-parallel engine, which must all have in force what was set last.

        It is read before and after every block, so that no answer counts for a policy that some steps did not have.

        Raises:
            EngineCrashError: ranks differ, another policy is in force, or some steps were routed without it.
        """
        try:
            states = _alike(await read_states(self.engine))
        except UnsupportedError as error:
            raise EngineCrashError(str(error)) from error
        if (digest := states[0].policy_digest) != self.digest:
            raise EngineCrashError(f"the engine runs policy {digest}, and {self.digest} was set; does something else switch it?")
        if wrong := next((state.error for state in states if state.error), None):
            raise EngineCrashError(f"policy {self.digest} is not in force in every step: {wrong}")
        return states

    async def block(
        self, requests: Sequence[Request], load: Load, fillers: Sequence[Request], deadline_s: float | None, reject: Reject | None
    ) -> BlockReport:
        """Run one block under the policy in force. Raises EngineCrashError as soon as the engine is dead."""
        rejector = DropRejector(reject.limit, reject.alpha) if reject else None

        def watch(_: int, sent: Sent) -> str | None:
            if rejector is None or reject is None or sent.item is None or sent.correct is None or sent.item not in reject.exact:
                return None
            if rejector.update(reject.exact[sent.item].correct, sent.correct):
                return f"accuracy: rejected after {rejector.items} items"
            return None

        before = total_counters(await self.states())
        try:
            block = await run_block(
                self.send, requests, load, fillers=fillers, watch=watch if reject else None, deadline_s=deadline_s
            )
        except EngineGoneError as gone:
            raise EngineCrashError(f"the engine died under load: {self._cause(gone)}") from gone
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
            step_tokens=median_step(rows) if self.digest == EXACT else None,
        )

    async def record(self, on: bool) -> list[Any]:
        """`sere_record` of the first rank; all ranks see the same tokens."""
        found: list[Any] = (await self.engine.collective_rpc("sere_record", args=(on,)))[0]
        return found

    async def send(self, request: Request) -> AsyncIterator[tuple[str, int]]:
        """Stream (text, tokens) chunks of one greedy answer, sampled as `vllm serve` samples a request of temperature 0.

        The end-of-sequence token ends it unless the request fixes the length.

        Raises:
            EngineGoneError: the engine is dead. Other exceptions are of this request alone.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            async for output in self._generate(request):
                answer = output.outputs[0]
                yield answer.text, len(answer.token_ids)
        except EngineDeadError as error:
            raise EngineGoneError(str(error)) from error

    async def wave(self, requests: Sequence[Request], tokens: int, bucket: str) -> Wave:
        """Start the requests together and decode so many tokens of each, whatever ends an answer.

        Args:
            bucket: of the policy in force, whose counts are taken for those of the decode steps.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        async def trace(request: Request) -> Trace:
            arrivals, count, prompt = list[tuple[float, int]](), 0, 0
            async for output in self._generate(replace(request, max_tokens=tokens, ignore_eos=True, stop=())):
                count += len(output.outputs[0].token_ids)
                prompt = len(output.prompt_token_ids or ())
                arrivals.append((time.perf_counter(), count))
            return Trace(prompt, tuple(arrivals))

        before = by_key(total_counters(await self.states()))
        began = time.perf_counter()
        try:
            traces = await asyncio.gather(*map(trace, requests))
        except EngineDeadError as gone:
            raise EngineCrashError(f"the engine died under load: {self._cause(gone)}") from gone
        after = total_counters(await self.states())
        rows = [row.since(before.get(row.key)) for row in after if row.digest == self.digest and row.bucket == bucket]
        return timed(began, traces, rows)

    def _generate(self, request: Request) -> AsyncIterator[Any]:
        """The engine's outputs for one request, each with the tokens since the one before."""
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
        outputs: AsyncIterator[Any] = self.engine.generate(prompt, params, f"sere-{self.requests}")
        return outputs

    def _cause(self, error: BaseException) -> str:
        """What the engine's own log names as the cause, else the error's last line, and where the log is."""
        found = logs.root_cause(logs.tail(self.log)) if self.log else None
        return (found or last_line(error)) + (f" (its log: {self.log})" if self.log else "")

    async def stop(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()
            self.engine = None


def small_cache(environ: MutableMapping[str, str], parsed: argparse.Namespace) -> None:
    """Give vLLM on a CPU 1 GiB of KV cache where nobody named a size; by itself it takes what a whole machine has.

    Args:
        environ: of the engine. VLLM_CPU_KVCACHE_SPACE goes before --kv-cache-memory-bytes there, so that it may be set only
            where that argument was not given.
        parsed: the arguments of `vllm serve`.
    """
    if getattr(parsed, "kv_cache_memory_bytes", None) is None:
        environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


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


def last_line(error: BaseException) -> str:
    """The last line of an error's text that says something, else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
