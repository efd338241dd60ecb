"""Arguments of a call, and the record of the training -> the size of the images and the number of steps."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..data.buckets import MAX_SIDE
from ..files.file_names import RUN
from ..files.json_files import shorten
from ..schedule import TIMESTEPS, recorded_schedule
from ..training.run_folder import DRAWING, SEAL
from ..training.sampling_defaults import check_steps, sampling_defaults, size_warning, trained_sizes

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def recorded_defaults(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of run.json that the defaults of a call follow from; it names no path of this machine."""
    kept = {name: record[name] for name in (*DRAWING, SEAL) if name in record}
    settings = record.get("settings")
    if isinstance(settings, dict) and settings.get("aspect_ratios"):
        kept["settings"] = {"aspect_ratios": settings["aspect_ratios"]}
    return kept


def choose_size(
    record: Mapping[str, Any], sizes: Mapping[str, Any], latents: Tensor | None, stride: int, unit: int
) -> tuple[int, int]:
    """Return (width, height) in pixels, by default those of the latents, or of the training.

    `sizes` are the given width and height, None if unset. `stride` is the side of a latent in pixels, `unit` that
    of a token. Raises ValueError for a size that is unusable, or not that of the latents.
    """
    defaults = sampling_defaults(dict(record))
    if latents is not None and latents.ndim not in (4, 5):
        raise ValueError(f"latents are {tuple(latents.shape)}, expected (B, C, H, W) or (B, C, 1, H, W).")
    if latents is not None:
        defaults |= {"height": stride * latents.shape[-2], "width": stride * latents.shape[-1]}
    given = [*sizes.values()]
    sizes = {name: defaults[name] if size is None else size for name, size in sizes.items()}
    for name, size in sizes.items():
        if type(size) is int and size > MAX_SIDE:
            raise ValueError(f"{name} is {shorten(size)}, expected at most {MAX_SIDE:,} pixels.")
        if type(size) is not int or size < 1 or size % unit:
            nearest = max(unit, (size + unit // 2) // unit * unit) if type(size) is int else unit
            raise ValueError(f"{name} {size!r:.40} is not divisible by {unit}; the nearest is {nearest}.")
        if latents is not None and size != defaults[name]:
            raise ValueError(
                f"{name} is {size}, but latents {tuple(latents.shape)} are of {defaults[name]} pixels."
            )
    if "resolution" not in record and latents is None and None in given:
        warnings.warn(
            f"there is no {RUN} beside the student: its default of {sizes['width']}x{sizes['height']} may not fit. "
            "Pass width, height and num_inference_steps.",
            stacklevel=5,
        )
    trained = trained_sizes(dict(record), unit, RUN)
    if text := size_warning((sizes["width"], sizes["height"]), trained, "width={}, height={}"):
        warnings.warn(text, stacklevel=5)
    return sizes["width"], sizes["height"]


def choose_steps(record: Mapping[str, Any], num_steps: Any, source: str) -> int:
    """Return the number of steps, by default that of the training; `source` is the student in errors."""
    if num_steps is None:
        num_steps = sampling_defaults(dict(record))["num_inference_steps"]
    if type(num_steps) is not int or not 0 < num_steps <= TIMESTEPS:
        raise ValueError(
            f"num_inference_steps is {shorten(num_steps)}, expected a whole number from 1 to {TIMESTEPS}."
        )
    check_steps(num_steps, recorded_schedule(dict(record), RUN), source, "num_inference_steps")
    return num_steps


def check_options(output_type: Any, num_frames: Any, num_images: Any) -> None:
    """Raise ValueError for an unknown type of output, for videos, or for a wrong number of images."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {shorten(output_type)}, expected one of {', '.join(OUTPUT_TYPES)}.")
    if num_frames != 1:
        raise ValueError(
            f"num_frames is {shorten(num_frames)}; the student generates single frames. Leave it out."
        )
    if type(num_images) is not int or num_images < 1:
        raise ValueError(
            f"num_images_per_prompt is {shorten(num_images)}, expected a whole number, at least 1."
        )
