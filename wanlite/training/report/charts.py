"""Points of curves -> charts for an SVG: every position in pixels, every label as text."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

Point = tuple[float, float]
Item = TypeVar("Item")

WIDTH, HEIGHT = 520, 240  # pixels of a chart
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 20, 28  # margins, for the labels of the axes
MAX_POINTS = 300  # of a curve
MAX_TICKS = 6
MAX_DOTS = 45  # a curve of more points is drawn without dots


class Curve(NamedTuple):
    """A curve by step."""

    label: str
    points: list[Point]  # (step, value)


class Mark(NamedTuple):
    """A label at a position in pixels."""

    at: float
    label: str


class Line(NamedTuple):
    """A curve as it is drawn."""

    label: str
    last: str  # its last value
    points: str  # "x,y x,y ..."
    dots: list[Point]


@dataclass(frozen=True)
class Chart:
    """Curves over the steps of a run.

    `bounds` are {label: value} of horizontal lines; `phases` is {name: its last step}; `kept` is the step of the
    student that is saved, if there is one.
    """

    title: str
    note: str
    curves: list[Curve]
    last_step: int
    is_log: bool = False
    bounds: dict[str, float] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)
    kept: int | None = None

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM  # edges of the plot

    @property
    def lines(self) -> list[Line]:
        return [self._draw(curve) for curve in self.curves if curve.points]

    def _draw(self, curve):
        points = [(round(self.x(step), 1), round(self.y(value), 1)) for step, value in thin(curve.points)]
        return Line(
            curve.label,
            format_number(curve.points[-1][1]),
            " ".join(f"{x},{y}" for x, y in points),
            points if len(points) <= MAX_DOTS else [],
        )

    @cached_property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest value, with the bounds."""
        values = [value for curve in self.curves for _, value in curve.points] + [*self.bounds.values()]
        low, high = min(values), max(values)
        if self.is_log:
            return (low / 1.15, high * 1.15)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return (low - margin, high + margin)

    def x(self, step: float) -> float:
        """Return the position of a step."""
        return self.left + (self.right - self.left) * step / max(1, self.last_step)

    def y(self, value: float) -> float:
        """Return the position of a value."""
        low, high = (math.log(limit) if self.is_log else limit for limit in self.range)
        height = (math.log(value) if self.is_log else value) - low
        return self.bottom - (self.bottom - self.top) * height / (high - low)

    @property
    def y_ticks(self) -> list[Mark]:
        values = log_ticks(*self.range) if self.is_log else linear_ticks(*self.range)
        return [Mark(round(self.y(value), 1), format_number(value)) for value in values]

    @property
    def x_ticks(self) -> list[Mark]:
        return [
            Mark(round(self.x(step), 1), f"{step:,.0f}") for step in linear_ticks(0, max(1, self.last_step))
        ]

    @property
    def bound_marks(self) -> list[Mark]:
        return [Mark(round(self.y(value), 1), label) for label, value in self.bounds.items()]

    @property
    def phase_marks(self) -> list[Mark]:
        """The position where each phase begins, and its name."""
        starts = [0, *self.phases.values()]
        return [Mark(round(self.x(start), 1), name) for start, name in zip(starts, self.phases)]

    @property
    def kept_at(self) -> float | None:
        return None if self.kept is None else round(self.x(self.kept), 1)


def select_points(pairs: Iterable[tuple[object, object]], is_log: bool = False) -> list[Point]:
    """Return the pairs of finite numbers, on a logarithmic axis those above 0."""
    return [
        (float(step), float(value))
        for step, value in pairs
        if isinstance(step, (int, float)) and isinstance(value, (int, float))
        if math.isfinite(step) and math.isfinite(value) and (value > 0 or not is_log)
    ]


def thin(items: Sequence[Item], most: int = MAX_POINTS) -> list[Item]:
    """Return at most `most` (above 1) items at even distances, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def linear_ticks(low: float, high: float) -> list[float]:
    """Return at most MAX_TICKS round numbers from low to high."""
    rough = (high - low) / MAX_TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten from low to high, with multiples of them if the range is short."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3)):
        ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= MAX_TICKS:
            return inside or linear_ticks(low, high)
    return thin([10.0**exponent for exponent in exponents if low <= 10.0**exponent <= high], MAX_TICKS)


def format_number(value: float) -> str:
    """Return a number with as many digits as a reader needs."""
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.1e}"
