"""What may be spent and what was. Pure; the clock is given."""

from __future__ import annotations

from dataclasses import dataclass

from sere_autotune.tuning.spec import SearchSpec


@dataclass
class Budget:
    """Device seconds count from an engine's start to its end, times its devices, over all restarts of the tuner."""

    device_limit_s: float
    wall_limit_s: float | None
    devices: int = 1
    device_spent_s: float = 0.0  # before this process, from the study
    wall_spent_s: float = 0.0
    began: float = 0.0  # of this process, on the caller's clock
    engine_began: float | None = None

    @classmethod
    def of(cls, search: SearchSpec, devices: int) -> Budget:
        return cls(search.device_hours * 3600, search.wall_minutes * 60 if search.wall_minutes else None, devices)

    def engine_started(self, now: float) -> None:
        self.engine_began = now

    def engine_stopped(self, now: float) -> None:
        self.device_spent_s = self.device_used(now)
        self.engine_began = None

    def device_used(self, now: float) -> float:
        running = now - self.engine_began if self.engine_began is not None else 0.0
        return self.device_spent_s + running * self.devices

    def wall_used(self, now: float) -> float:
        return self.wall_spent_s + now - self.began

    def left_s(self, now: float) -> float:
        """Seconds on the clock that one engine may still run."""
        left = (self.device_limit_s - self.device_used(now)) / self.devices
        if self.wall_limit_s is not None:
            left = min(left, self.wall_limit_s - self.wall_used(now))
        return left

    def which(self, now: float) -> str:
        """The budget that is nearest its end, for a message."""
        device_left = (self.device_limit_s - self.device_used(now)) / self.devices
        if self.wall_limit_s is not None and self.wall_limit_s - self.wall_used(now) < device_left:
            return f"wallMinutes {self.wall_limit_s / 60:g}"
        return f"deviceHours {self.device_limit_s / 3600:g}"
