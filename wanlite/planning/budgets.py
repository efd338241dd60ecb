"""Presets of --budget, and the quality to expect by hours; torch is not imported."""

from dataclasses import replace
from typing import Any, NamedTuple

from ..runtime.launch import is_first


class Budget(NamedTuple):
    """Settings of a run at the real size; each is used unless the command line sets it."""

    resolutions: list[int]
    num_trajectories: int  # at the first of `resolutions`; see split_trajectories()
    max_train_steps: int


# Sized for one H100 at 40 % of its rate: about 5 hours, 20 hours and 5 days.
BUDGETS = {
    "trial": Budget([512], 4_000, 5_600),
    "day": Budget([256, 512], 32_000, 36_000),
    "week": Budget([256, 512], 200_000, 200_000),
}

# H100-hours up to which a student of 0.3 billion parameters is expected to reach no more than the text says. They
# are estimates from published models of this size (docs/data.md has the table), not measurements of this project.
EXPECTATIONS = (
    (12, "layouts and colours of common prompts, without detail: a trial of the settings"),
    (60, "single objects that can be recognised, with soft detail"),
    (400, "scenes that can be recognised, with first details at 512 pixels"),
    (float("inf"), "the quality of the smallest published models (GenEval 0.5 to 0.65)"),
)


def apply_budget(settings: Any, log=print) -> Any:
    """Return the settings with those of --budget filled in; values of the command line win, with a log line."""
    if settings.budget is None:
        return settings
    preset = BUDGETS[settings.budget]._asdict()
    given = {name: value for name in preset if (value := getattr(settings, name)) is not None}
    last = preset["resolutions"][-1]
    if "resolutions" not in given and settings.resolution not in (None, last, [last]):
        given["resolution"] = settings.resolution
        del preset["resolutions"]
    if given and is_first():
        log(
            f"budget   {settings.budget}, but {', '.join(_shown(*setting) for setting in given.items())} as given"
        )
    return replace(settings, **(preset | given))


def _shown(name, value):
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"


def has_default_trajectories(settings: Any) -> bool:
    """Whether --num_trajectories is unset or that of the preset, so that --cache_gb may lower it."""
    preset = BUDGETS[settings.budget].num_trajectories if settings.budget else None
    return settings.num_trajectories in (None, preset)


def expected_quality(h100_hours: float) -> str:
    """Return the expected quality of a student of 0.3 billion parameters after a run of this length."""
    return next(text for limit, text in EXPECTATIONS if h100_hours <= limit)
