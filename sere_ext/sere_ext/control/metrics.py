"""`sere_` metrics on the engine's `/metrics`: what is in force, active experts, and latency by policy and batch bucket.

The engine's scheduler statistics have no field of ours, so one task polls the workers, at most once a second and only
while requests run; a scrape costs nothing. Latencies come from vLLM's own statistics of finished requests, in the API
server, and are labelled by the policy that was in force and by the class (1, 2-3, 4-7, 8-15, ...) of the mean number of
requests that decoded beside them, so that any two policies can be compared at equal batch size. Their histograms have a bound at
each limit of the policy volume's SLO; histograms of other bounds begin anew at zero when the limits change.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from bisect import bisect_left
from collections import Counter as Counts
from collections import OrderedDict, defaultdict, deque
from typing import Any

from sere_ext.contract.slo import LatencyLimits
from sere_ext.contract.state import CounterRow, EngineState, RowKey, by_key
from sere_ext.control.live import LiveControl

logger = logging.getLogger("vllm.sere")

POLL_SECONDS = 1.0
IDLE_POLLS = 10  # an idle engine is asked at every tenth poll: an in-process caller may have changed its policy
MAX_POLICIES = 64  # whose latencies are kept: a tuner tries hundreds in one engine's life
ALL_LAYERS = "all"  # of a policy without layer groups
MIXED = "mixed"  # policy label of a request that saw a switch, which is evidence for neither policy
_HISTORY_SECONDS = 900.0
_MILLISECONDS = (
    1, 2, 3, 4, 5, 6, 7, 8, 10, 12.5, 15, 17.5, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 400, 500, 750,
    1000, 1500, 2000, 3000, 5000, 10000, 30000,
)  # fmt: skip


def bounds(limits: LatencyLimits | None) -> tuple[float, ...]:
    """Histogram bounds in seconds: a fixed ladder and every limit (ms), so that the share of requests over a limit is exact."""
    wanted = limits.limits().values() if limits is not None else ()
    return tuple(sorted({ms / 1000 for ms in (*_MILLISECONDS, *wanted)}))


class Occupancy:
    """Mean number of running requests over any window of the recent past (a step function of time)."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()
        self._areas: deque[float] = deque()  # integral of running over time up to each time
        self._running = 0

    def record(self, now: float, running: int) -> None:
        """`running` requests from `now` on."""
        area = self._areas[-1] + (now - self._times[-1]) * self._running if self._times else 0.0
        self._times.append(now)
        self._areas.append(area)
        self._running = running
        while self._times[0] < now - _HISTORY_SECONDS:
            self._times.popleft()
            self._areas.popleft()

    def mean(self, start: float, end: float) -> float:
        """Over [start, end] in the clock of `record`; what ran at the end if the window is empty."""
        if not self._times or end <= start:
            return float(self._running)
        return (self._area(end) - self._area(start)) / (end - start)

    def _area(self, when: float) -> float:
        index = bisect_left(self._times, when)
        if index == 0:
            return self._areas[0] - (self._times[0] - when) * self._slope(0)
        if index == len(self._times):
            return self._areas[-1] + (when - self._times[-1]) * self._running
        share = (when - self._times[index - 1]) / (self._times[index] - self._times[index - 1])
        return self._areas[index - 1] + share * (self._areas[index] - self._areas[index - 1])

    def _slope(self, index: int) -> float:
        if len(self._times) < 2:
            return float(self._running)
        return (self._areas[index + 1] - self._areas[index]) / max(self._times[index + 1] - self._times[index], 1e-9)


def batch_label(running: float) -> str:
    """`8-15`: the power-of-two class of a mean number of running requests.

    Not the policy's own buckets: exact routing has none, and two policies must be compared at equal batch size.
    """
    tokens = max(round(running), 1)
    low = 1 << (tokens.bit_length() - 1)
    return "1" if low == 1 else f"{low}-{2 * low - 1}"


class Metrics:
    """Registers the collectors and feeds them until the server ends."""

    def __init__(self, control: LiveControl) -> None:
        from prometheus_client import Counter, Gauge

        self._control = control
        self._occupancy: defaultdict[int, Occupancy] = defaultdict(Occupancy)  # by data-parallel engine
        self._since = time.monotonic()  # when the policy in force was set
        self._digest = control.policy.digest  # under which the last step ran
        self._published: str | None = None  # digest of the policy that the metrics show
        self._active = True  # requests ran since the last poll
        self._info_labels: tuple[str, str] | None = None
        self._last: dict[RowKey, CounterRow] = {}
        self._switches_seen = 0
        self._refusals_seen: Counts[tuple[str, str]] = Counts()
        self._removable = "PROMETHEUS_MULTIPROC_DIR" not in os.environ  # several processes share files that only grow
        self._latency_labels: OrderedDict[str, set[tuple[Any, str]]] = OrderedDict()  # by policy, oldest use first
        self._bounds: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())  # of TPOT and TTFT, seconds
        self._tpot: Any = None
        self._ttft: Any = None
        self.bound()
        recent = {"multiprocess_mode": "mostrecent"}
        self._info = Gauge("sere_policy_info", "1 for the policy in force.", ["digest", "source"], **recent)
        self._generation = Gauge("sere_policy_generation", "Generation of the policy in force.", **recent)
        self._error = Gauge("sere_policy_error", "1 while GET /sere shows an error.", **recent)
        self._switches = Counter("sere_policy_switches", "Changes of the policy in force.")
        self._refusals = Counter("sere_policy_refusals", "Changes asked for and not made.", ["source", "type"])
        where = ["layers", "bucket"]
        self._experts = Gauge("sere_active_experts", "Mean per MoE layer and step, last second.", ["stage", *where], **recent)
        self._counters = {
            "calls": Counter("sere_router_calls", "Router calls: one per MoE layer and step.", where),
            "slots": Counter("sere_slots", "Routed slots (token and expert).", where),
            "rerouted": Counter("sere_rerouted_slots", "Slots that went to another expert.", where),
            "merged": Counter("sere_merged_slots", "Slots that were freed: their expert already serves the token.", where),
        }

    async def run(self) -> None:
        """Hook into the engine's statistics, then poll."""
        manager = getattr(self._control.engine, "logger_manager", None)
        if manager is None:
            logger.warning("sere: no latency metrics, since the engine runs with --disable-log-stats")
        else:
            manager.stat_loggers.append(_Recorder(self))
        for turn in itertools.count():
            self.bound()
            digest = self._control.policy.digest
            changed = digest != self._published
            refused = self._control.refusals != self._refusals_seen
            if self._active or changed or refused or turn % IDLE_POLLS == 0:
                self._active = False
                try:
                    self.publish(await self._control.state())
                    self._published = digest
                except Exception as error:
                    logger.warning("sere: metrics could not be read from the workers: %s", error)
            await asyncio.sleep(POLL_SECONDS)

    def bound(self) -> None:
        """Give the latency histograms a bound at each limit of the SLO in force."""
        from prometheus_client import REGISTRY, Histogram

        slo = self._control.slo
        wanted = (bounds(slo.tpot_ms), bounds(slo.ttft_ms)) if slo is not None else (bounds(None), bounds(None))
        if wanted == self._bounds:
            return
        for old in (self._tpot, self._ttft):
            if old is not None:
                REGISTRY.unregister(old)
        self._bounds, (tpot, ttft) = wanted, wanted
        self._latency_labels.clear()
        labels = ["policy", "bucket"]
        self._tpot = Histogram("sere_tpot_seconds", "Time per output token of finished requests.", labels, buckets=tpot)
        self._ttft = Histogram("sere_ttft_seconds", "Time to first token of finished requests.", labels, buckets=ttft)

    def publish(self, state: EngineState) -> None:
        """Set gauges and add to counters from an engine's state."""
        labels = (state.policy_digest, state.source)
        if self._info_labels is not None and self._info_labels != labels:
            self._info.labels(*self._info_labels).set(0)
            if self._removable:
                self._info.remove(*self._info_labels)
                self._experts.clear()  # of buckets that the new policy may not have
        self._info_labels = labels
        self._info.labels(*labels).set(1)
        self._generation.set(state.generation)
        self._error.set(state.error is not None)
        self._switches.inc(state.switches - self._switches_seen)
        self._switches_seen = state.switches
        for refusal, count in self._control.refusals.items():
            self._refusals.labels(*refusal).inc(count - self._refusals_seen[refusal])
        self._refusals_seen = self._control.refusals.copy()
        for row in state.counters:
            before = self._last.get(row.key)
            if before is not None and row.calls < before.calls:  # the worker dropped its oldest rows, and this one came again
                before = None
            gained = row.since(before)
            if not gained.calls:
                continue
            where = (row.layers or ALL_LAYERS, row.bucket)
            for field, counter in self._counters.items():
                counter.labels(*where).inc(vars(gained)[field])
            if row.digest == state.policy_digest:
                self._experts.labels("before", *where).set(gained.active_before / gained.calls)
                self._experts.labels("after", *where).set(gained.active_after / gained.calls)
        self._last = by_key(state.counters)

    def record(self, scheduler_stats: Any, iteration_stats: Any, engine: int = 0) -> None:
        """Take in the statistics of one step of one engine, as vLLM's `StatLoggerManager` gives them."""
        now = time.monotonic()
        if self._control.policy.digest != self._digest:
            self._digest, self._since = self._control.policy.digest, now
        if scheduler_stats is not None:
            self._active = self._active or scheduler_stats.num_running_reqs > 0
            self._occupancy[engine].record(now, scheduler_stats.num_running_reqs)
        for request in iteration_stats.finished_requests if iteration_stats is not None else ():
            self._active = True
            self.observe(now, request, engine)

    def observe(self, now: float, request: Any, engine: int = 0) -> None:
        """Count the latencies of a request (vLLM's `FinishedRequestStats`) that finished `now`."""
        started = now - request.decode_time
        bucket = batch_label(self._occupancy[engine].mean(started, now))
        policy = self._digest if started >= self._since else MIXED
        if request.num_generation_tokens > 1:
            self._latency(self._tpot, policy, bucket).observe(request.decode_time / (request.num_generation_tokens - 1))
        first_token = self._digest if now - request.e2e_latency >= self._since else MIXED
        self._latency(self._ttft, first_token, bucket).observe(max(request.e2e_latency - request.decode_time, 0.0))

    def _latency(self, histogram: Any, policy: str, bucket: str) -> Any:
        """The histogram of one policy and bucket. The policies unused for longest are dropped, so that memory stays flat."""
        self._latency_labels.setdefault(policy, set()).add((histogram, bucket))
        self._latency_labels.move_to_end(policy)
        if self._removable and len(self._latency_labels) > MAX_POLICIES:
            oldest, children = self._latency_labels.popitem(last=False)
            for child, its_bucket in children:
                child.remove(oldest, its_bucket)
        return histogram.labels(policy, bucket)


class _Recorder:
    """The part of vLLM's `StatLoggerBase` that its manager calls."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def record(
        self, scheduler_stats: Any = None, iteration_stats: Any = None, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        self._metrics.record(scheduler_stats, iteration_stats, engine_idx)

    def log(self) -> None: ...
    def log_engine_initialized(self) -> None: ...
    def record_sleep_state(self, is_awake: int, level: int) -> None: ...
    def record_admission_rejection(self, reason: str) -> None: ...
