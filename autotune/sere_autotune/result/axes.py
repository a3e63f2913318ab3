"""The axes of the report's plots: from values to places on an SVG, with round ticks. Pure."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

WIDTH, HEIGHT = 860, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 24, 48  # margins


@dataclass(frozen=True)
class Axes:
    """Two linear axes; each is given as (lowest, highest) value that is shown."""

    horizontal: tuple[float, float]
    vertical: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.horizontal
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.vertical
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def grid(self, below: str, beside: str) -> str:
        """Lines and figures at round values, and what each axis shows, as SVG elements."""
        parts = []
        for tick in ticks(*self.horizontal):
            x = self.x(tick)
            parts.append(f'<line x1={x:.1f} y1={TOP} x2={x:.1f} y2={HEIGHT - BOTTOM} stroke="var(--line)"/>')
            parts.append(f"<text class=soft x={x:.1f} y={HEIGHT - BOTTOM + 18} text-anchor=middle>{tick:g}</text>")
        for tick in ticks(*self.vertical):
            y = self.y(tick)
            parts.append(f'<line x1={LEFT} y1={y:.1f} x2={WIDTH - RIGHT} y2={y:.1f} stroke="var(--line)"/>')
            parts.append(f"<text class=soft x={LEFT - 8} y={y + 4:.1f} text-anchor=end>{tick:g}</text>")
        parts.append(f"<text x={(LEFT + WIDTH - RIGHT) / 2} y={HEIGHT - 8} text-anchor=middle>{html.escape(below)}</text>")
        parts.append(
            f'<text x=16 y={HEIGHT / 2} text-anchor=middle transform="rotate(-90 16 {HEIGHT / 2})">{html.escape(beside)}</text>'
        )
        return "".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """About six round numbers inside [low, high]."""
    raw = (high - low) / 6
    if raw <= 0:
        return []
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
