"""run.json -> the size and the number of steps that a student draws best, and checks of others. No torch."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.buckets import MAX_SIDE, bucket_sizes
from ..files.file_names import CONFIG
from ..files.json_files import DOWNLOADED, read_json, shorten
from .run_folder import image_size

RESOLUTION = 512  # pixels, without a record of the training; NUM_STEPS as well
NUM_STEPS = 20
MAX_NAMED = 6  # sizes in a warning, numbers of steps in an error
MAX_RATIOS = 100


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
        named = ", ".join(map(str, few_steps[:MAX_NAMED])) + ", ..." * (len(few_steps) > MAX_NAMED)
        raise ValueError(
            f"{name} {num_steps}: {source} was trained for {named} steps. "
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
    if any(type(side) is not int or not 0 < side <= MAX_SIDE for side in size):
        raise ValueError(
            f"{source}: resolution is {shorten(run['resolution'])}, expected pixels or [width, height], at most "
            f"{MAX_SIDE:,}. Copy it again."
        )
    is_list = isinstance(ratios, list | None) and all(isinstance(ratio, str) for ratio in ratios or ())
    if not is_list or len(ratios or ()) > MAX_RATIOS:
        raise ValueError(
            f"{source}: aspect_ratios is {shorten(ratios)}, expected a list of WIDTH:HEIGHT, at most {MAX_RATIOS}. Copy "
            "it again."
        )
    try:
        return list(dict.fromkeys([size, *bucket_sizes(size, ratios, unit)]))
    except ValueError as error:
        raise ValueError(f"{source}: {error} Copy it again.") from None


def read_sides(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Return the side of a token and the largest side of an image, in pixels, of a student with this `config`.

    Raises ValueError if `config` or vae/config.json lacks them.
    """
    try:
        stride = int(read_json(folder / "vae" / CONFIG, DOWNLOADED).get("scale_factor_spatial") or 8)
        token = stride * int(config.get("patch_size", (1, 2, 2))[1])
        largest = token * int(config.get("rope_max_seq_len", 1024))
    except (OSError, ValueError, TypeError, OverflowError, LookupError):
        raise ValueError(
            f"{folder}: {CONFIG} or vae/{CONFIG} lacks the patch size, the stride or the largest size. Copy the "
            "folder again."
        ) from None
    if not 0 < token <= MAX_SIDE:
        raise ValueError(
            f"{folder}: {CONFIG} has a patch of {shorten(token)} pixels, expected 1 to {MAX_SIDE:,}. Copy the folder again."
        )
    return token, largest


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
