"""run.json -> the size and the number of steps that a student draws best, and checks of others. No torch."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.buckets import bucket_sizes
from .run_folder import image_size

RESOLUTION = 512  # pixels, without a record of the training; NUM_STEPS as well
NUM_STEPS = 20
MAX_NAMED = 6  # sizes in a warning


def sampling_defaults(run: dict[str, Any]) -> dict[str, Any]:
    """Return the default height, width and num_inference_steps, unchecked, from the content of run.json."""
    width, height = image_size(run.get("resolution", RESOLUTION))
    return {
        "height": height,
        "width": width,
        "num_inference_steps": run.get("num_inference_steps", NUM_STEPS),
    }


def check_steps(num_steps: int, schedule: dict[str, Any], source: Path | str, name: str) -> None:
    """Raise ValueError for a number of steps that a few-step student was not trained for.

    `schedule` is that of run.json; `source` is the student and `name` the argument in the error.
    """
    few_steps = schedule.get("few_steps") or []
    if few_steps and num_steps not in few_steps:
        raise ValueError(
            f"{name} {num_steps}: {source} was trained for {', '.join(map(str, few_steps))} steps. "
            f"Choose one of these, or train with --few_steps."
        )


def trained_sizes(run: dict[str, Any], unit: int, source: Path | str) -> list[tuple[int, int]]:
    """Return the training sizes (width, height) in run.json, [] if it has no resolution.

    `unit` is the side of a token in pixels; `source` is the file that errors name.
    """
    if "resolution" not in run:
        return []
    size = image_size(run["resolution"])
    settings = run.get("settings")
    ratios = settings.get("aspect_ratios") if isinstance(settings, dict) else None
    if any(type(side) is not int or side < 1 for side in size):
        raise ValueError(
            f"{source}: resolution is {run['resolution']!r}, expected pixels or [width, height]. Copy it again."
        )
    if not isinstance(ratios, list | None) or not all(isinstance(ratio, str) for ratio in ratios or ()):
        raise ValueError(
            f"{source}: aspect_ratios is {ratios!r}, expected a list of WIDTH:HEIGHT. Copy it again."
        )
    try:
        return list(dict.fromkeys([size, *bucket_sizes(size, ratios, unit)]))
    except ValueError as error:
        raise ValueError(f"{source}: {error} Copy it again.") from None


def size_warning(
    size: tuple[int, int], trained: Sequence[tuple[int, int]], advice: str = "--width {} --height {}"
) -> str | None:
    """Return a warning if a size (width, height) differs from the trained ones, else None.

    `advice` shows the nearest width and height.
    """
    if not trained or size in trained:
        return None
    nearest = min(
        trained, key=lambda each: sum(abs(math.log(side / other)) for side, other in zip(size, each))
    )
    named = ", ".join(f"{each[0]} x {each[1]}" for each in trained[:MAX_NAMED]) + (
        ", ..." if len(trained) > MAX_NAMED else ""
    )
    return (
        f"the student was trained at {named}; images of {size[0]} x {size[1]} may fail. The nearest trained "
        f"size is {advice.format(*nearest)}."
    )
