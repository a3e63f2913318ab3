"""Limits on the latencies of requests (service level objectives): what a tuner certifies by, and a canary and the metrics count by."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from pydantic import Field

from sere_ext.contract.constraints import Constrained, at_least_one
from sere_ext.contract.record import Unset

_MAX_MS: Final = 86_400_000  # a day


class LatencyLimits(Constrained):
    """Limits in milliseconds on percentiles of a latency over requests."""

    constraints: ClassVar = (at_least_one("p50", "p90", "p95", "p99"),)

    p50: Annotated[float | None, Field(gt=0, le=_MAX_MS, description="limit on the median, ms"), Unset("none")] = None
    p90: Annotated[float | None, Field(gt=0, le=_MAX_MS, description="limit on the 90th percentile, ms"), Unset("none")] = None
    p95: Annotated[float | None, Field(gt=0, le=_MAX_MS, description="limit on the 95th percentile, ms"), Unset("none")] = None
    p99: Annotated[float | None, Field(gt=0, le=_MAX_MS, description="limit on the 99th percentile, ms"), Unset("none")] = None

    def limits(self) -> dict[str, float]:
        """The limits that are set, in milliseconds by percentile: {"p95": 20.0}."""
        return {name: float(value) for name, value in self.model_dump().items() if value is not None}


class LatencySlo(Constrained):
    """Limits on the latencies of requests, which are defined as `vllm bench serve` defines them."""

    constraints: ClassVar = (at_least_one("tpot_ms", "ttft_ms", "e2el_ms"),)

    tpot_ms: Annotated[LatencyLimits | None, Field(description="time per output token after the first (TPOT), ms")] = None
    ttft_ms: Annotated[LatencyLimits | None, Field(description="time to the first token (TTFT), ms")] = None
    e2el_ms: Annotated[LatencyLimits | None, Field(description="time from request to last token, ms")] = None

    def limits(self) -> list[tuple[str, str, float]]:
        """(metric, percentile, limit in milliseconds) of every limit: [("tpot", "p95", 20.0)]."""
        found = []
        for metric in ("tpot", "ttft", "e2el"):
            limits: LatencyLimits | None = getattr(self, f"{metric}_ms")
            found += [(metric, name, limit) for name, limit in (limits.limits() if limits else {}).items()]
        return found
