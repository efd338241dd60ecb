"""A History -> the charts of its curves."""

from collections.abc import Iterator
from functools import partial

from ..metrics import GUARDS
from .charts import Chart, Curve, Point, select_points
from .history import History, format_steps
from .tables import EXPLAINED

HELD_OUT_NOTE = (
    "The part of the teacher's velocity that the student misses, on trajectories that it was not trained on."
)
CURVES = {  # {measure: (whether its axis is logarithmic, its limit)}
    "image_error": (True, None),
    "diversity": (True, GUARDS["diversity"][0]),
    "channel_drift": (False, GUARDS["channel_drift"][1]),
}


def make_charts(history: History) -> list[Chart]:
    """Return the charts that have points."""
    return [chart for chart in _all_charts(history) if any(curve.points for curve in chart.curves)]


def _all_charts(history: History) -> Iterator[Chart]:
    kept = history.kept.step if history.kept else None
    ends = {phase["name"]: phase["last"] for phase in history.phases}
    chart = partial(Chart, last_step=history.max_steps, phases=ends, kept=kept)
    note = "Each phase has a loss of its own. Lower is better."
    yield chart("Loss", note, loss_curves(history), is_log=True)
    errors = select_points(((each.step, each.held_out_error) for each in history.validations), is_log=True)
    yield chart("Held-out error", HELD_OUT_NOTE, [Curve("error", errors)], is_log=True)
    for name, (is_log, limit) in CURVES.items():
        title, note = EXPLAINED[name]
        bounds = {} if limit is None else {f"limit {limit:g}": limit}
        yield chart(title, note, measure_curves(history, name, is_log), is_log=is_log, bounds=bounds)


def loss_curves(history: History) -> list[Curve]:
    """Return a curve of the loss for each phase."""
    points: dict[str, list[Point]] = {}
    for record in history.records:
        if "loss" in record:
            name = history.phase_at(record["step"]).get("name", "loss")
            points.setdefault(name, []).append((record["step"], record["loss"]))
    return [Curve(name, select_points(own, is_log=True)) for name, own in points.items()]


def measure_curves(history: History, name: str, is_log: bool) -> list[Curve]:
    """Return a curve of a measure for each number of sampling steps."""
    counts = sorted({count for each in history.validations for count in each.figures}, reverse=True)
    return [
        Curve(
            format_steps(count),
            select_points(
                (
                    (each.step, each.figures[count][name])
                    for each in history.validations
                    if count in each.figures
                ),
                is_log,
            ),
        )
        for count in counts
    ]
