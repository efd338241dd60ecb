"""Prompts and seeds -> PNG files with their settings, and a grid of the first ones."""

import hashlib
import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo

from ..data.grids import MAX_CELLS, Grid, draw_grid
from ..files.image_files import grid_names, image_names, save_image
from ..runtime.devices import free_memory
from ..runtime.progress import track
from .settings import Settings
from .student import StudentPipeline

MAX_COLUMNS = 16  # of a grid with a row per prompt
MAX_NAMED = 6  # files in a warning
MAX_FLAT = 1  # largest standard deviation of a channel, of 255, in an image of one flat colour
FLAT_ADVICE = (
    "The likely reason is a prompt unlike those of the training, an untrained size or number of steps, or an untrained "
    "student."
)
# Pixels of a batch, by type of device: more would not be faster.
MAX_BATCH_PIXELS = {"cpu": 2**18, "cuda": 2**22}
MAX_BATCH_SHARE = 0.5  # of the device's free memory
BYTES_PER_PIXEL = 2000  # of a batch, with a margin: a student of 1024 x 16 in float32, and its images


class Generated(NamedTuple):
    """A generated image; `path` is None if it was not finite and therefore not written."""

    prompt: str
    seed: int
    path: Path | None
    is_flat: bool = False


def generate_all(
    pipeline: StudentPipeline, settings: Settings, prompts: list[str]
) -> tuple[list[Generated], list]:
    """Generate and write an image for each of `prompts`; returns them and the first MAX_CELLS arrays."""
    seeds = range(settings.seed, settings.seed + len(prompts))
    batch_size = settings.batch_size or choose_batch_size(settings, pipeline.device)
    generated: list[Generated] = []
    cells: list = []
    # The thread writes a batch while the next one is drawn.
    progress = track(len(prompts), "generating", is_hidden=len(prompts) == 1)
    with ThreadPoolExecutor(1) as writer, progress:
        written: Future | None = None
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, min(start + batch_size, len(prompts)))
            images = pipeline.generate(
                prompts[batch],
                seeds[batch],
                settings.num_inference_steps,
                settings.height,
                settings.width,
                settings.guidance_scale,
                settings.negative_prompt,
            )
            generated += written.result() if written else []
            jobs = list(zip(prompts[batch], seeds[batch], images))
            written = writer.submit(write_images, settings, jobs, digests_of(pipeline))
            cells += [image for image in images if image is not None][: MAX_CELLS - len(cells)]
            progress.update(len(images))
        generated += written.result() if written else []
    return generated, cells


def choose_batch_size(settings: Settings, device: torch.device) -> int:
    """Return the number of images that are drawn together: small ones are faster so, and memory is the limit."""
    pixels = (settings.height or 1) * (settings.width or 1)
    most = MAX_BATCH_PIXELS.get(device.type, MAX_BATCH_PIXELS["cpu"])
    return max(1, min(most, fitting_pixels(device)) // pixels)


def fitting_pixels(device: torch.device) -> int:
    """Return the pixels of the images that fit in the device's free memory together."""
    return int(MAX_BATCH_SHARE * free_memory(device)[0]) // BYTES_PER_PIXEL


def digests_of(pipeline: StudentPipeline) -> dict[str, str]:
    """Return the digests of the loaded model, and those of an image to change, as an image records them."""
    names = ("weights_sha256", "model_sha256")
    return {name: getattr(pipeline, name) for name in names} | {
        f"{name}_sha256": hashlib.sha256(image.tobytes()).hexdigest()
        for name, image in pipeline.editing.items()
        if name != "strength"
    }


def write_images(settings: Settings, jobs: list[tuple], digests: dict[str, str]) -> list[Generated]:
    """Write the images of a batch of (prompt, seed, image or None), in this order."""
    written = []
    for prompt, seed, image in jobs:
        if image is None:
            written.append(Generated(prompt, seed, None))
            continue
        path = save_image(
            image,
            settings.output_dir,
            image_names(settings.output_dir, prompt, seed),
            text_chunks(replace(settings, batch_size=len(jobs)), prompt, seed, digests),
        )
        written.append(Generated(prompt, seed, path, is_flat(image)))
    return written


def text_chunks(settings: Settings, prompt: str | None, seed: int | None, digests: dict[str, str]) -> PngInfo:
    """Return the PNG text chunks with the settings of an image, or of several with neither prompt nor seed.

    They contain no path of this machine: images are published.
    """
    info = PngInfo()
    values = {
        "prompt": prompt,
        "seed": seed,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "negative_prompt": settings.negative_prompt,
        "strength": settings.strength,
        "height": settings.height,
        "width": settings.width,
        "dtype": settings.dtype,
        "batch_size": settings.batch_size,
        "model": Path(settings.model).name,
        **digests,
    }
    for name, value in values.items():
        if value is not None:
            info.add_itxt(name, str(value))
    return info


def save_grid(settings: Settings, written: list[Generated], cells: list, digests: dict[str, str]) -> Path:
    """Write the grid of the first images with their prompts; returns its path.

    Prompts with several images have a row each.
    """
    each = settings.num_images_per_prompt
    columns = each if 1 < each <= MAX_COLUMNS else math.ceil(math.sqrt(len(cells)))
    shown = written[: len(cells)]
    paths = [image.path for image in shown if image.path]
    grid = Grid({"": np.stack(cells)}, [image.prompt for image in shown], [image.seed for image in shown])
    info = text_chunks(settings, None, None, digests)
    lists = {"prompts": grid.prompts, "seeds": grid.seeds, "files": [path.name for path in paths]}
    for name, values in lists.items():
        info.add_text(name, json.dumps(values))
    names = grid_names(paths[0], paths[-1])
    return save_image(np.asarray(draw_grid(grid, columns)), settings.output_dir, names, info)


def is_flat(image: np.ndarray) -> bool:
    """Whether an image (height, width, 3) is of one flat colour."""
    return bool(image.std(axis=(0, 1)).max() < MAX_FLAT)


def flat_warning(written: list[Generated]) -> str | None:
    """Return a warning if images are one flat colour, else None."""
    flat = [each.path.name for each in written if each.path and each.is_flat]
    if not flat:
        return None
    named = ", ".join(flat[:MAX_NAMED])
    if len(flat) > MAX_NAMED:
        named += f" and {len(flat) - MAX_NAMED} more"
    advice = f" {FLAT_ADVICE}" if len(flat) == len(written) else ""
    verb = "is" if len(flat) == 1 else "are"
    return f"{len(flat)} of {len(written)} images {verb} one flat colour: {named}.{advice}"


def refuse_not_finite(generated: list[Generated], dtype: str) -> None:
    """Raise FloatingPointError if an image was not finite; all others are written before."""
    if seeds := [each.seed for each in generated if each.path is None]:
        named = ", ".join(map(str, seeds[:MAX_NAMED])) + (", ..." if len(seeds) > MAX_NAMED else "")
        advice = "Train again." if dtype == "float32" else "Add --dtype float32, or train again."
        raise FloatingPointError(
            f"{len(seeds)} of {len(generated)} images are not finite in {dtype} and were not written (seed "
            f"{named}). {advice}"
        )
