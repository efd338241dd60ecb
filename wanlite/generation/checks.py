"""Settings -> completed settings and prompts, or a refusal; torch is not imported."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.images import read_image_file
from ..data.prompts import read_prompts
from ..data.tables import check_text
from ..files.file_names import RUN
from ..files.json_files import shorten
from ..planning.settings import check_device
from ..schedule import TIMESTEPS, first_step, read_schedule, recorded_schedule
from ..student.loading import open_student
from ..student.location import student_folder
from ..training.run_folder import check_saved_components, read_run
from ..training.sampling_defaults import check_steps, read_sides, sampling_defaults, trained_sizes
from .settings import Settings

STRENGTH = 0.6  # of an image to change
MAX_IMAGES = 10**6  # of a command, which holds a record of each
MAX_RECORDED = 64  # validation prompts that are drawn by default


def complete(settings: Settings) -> tuple[Settings, list[str]]:
    """Complete settings from the saved run; raises OSError or ValueError if they cannot generate an image."""
    folder = student_folder(settings.model, accepts_hub=False)
    with open_student(folder) as (config, _):
        run = read_run(folder)
    schedule = recorded_schedule(run, folder / RUN)
    check_saved_components(folder)
    prompts = choose_prompts(settings, run, folder)
    filled: dict[str, Any] = {
        name: default if getattr(settings, name) is None else getattr(settings, name)
        for name, default in sampling_defaults(run).items()
    }
    settings = replace(settings, model=str(folder), **filled)
    check_numbers(settings, len(prompts))
    check_steps(filled["num_inference_steps"], schedule, folder, "--num_inference_steps")
    read_schedule(folder, schedule)
    trained_sizes(run, check_image_size(settings, folder, config), folder / RUN)
    settings = complete_editing(settings)
    check_output_dir(Path(settings.output_dir))
    check_device_and_guidance(settings)
    return settings, prompts


def complete_editing(settings: Settings) -> Settings:
    """Complete --strength; raises OSError or ValueError for an image or a mask that cannot be used."""
    if settings.image is None:
        for name in ("strength", "mask"):
            if getattr(settings, name) is not None:
                raise ValueError(f"--{name} is used with --image only; add one, or leave it out.")
        return settings
    if settings.web or settings.serve:
        raise ValueError("--image is not used with --web or --serve; leave it out.")
    strength = STRENGTH if settings.strength is None else settings.strength
    first_step(settings.num_inference_steps or 0, strength, "--strength")
    read_editing(settings)
    return replace(settings, strength=strength)


def read_editing(settings: Settings) -> dict[str, Any]:
    """Return the arguments of a WanLitePipeline for --image, {} without; raises OSError or ValueError."""
    if settings.image is None:
        return {}
    size = settings.width or 0, settings.height or 0
    found = {"image": read_image_file(settings.image, "--image", size)}
    if settings.mask is not None:
        found["mask_image"] = read_image_file(settings.mask, "--mask", size)
    return found | {"strength": settings.strength}


def check_device_and_guidance(settings: Settings) -> None:
    """Raise ValueError for an unknown device, or for a negative prompt without guidance."""
    check_device(settings.device)
    if settings.negative_prompt and settings.guidance_scale <= 1:
        raise ValueError(
            "--negative_prompt is used by guidance only; add --guidance_scale above 1 or leave it out."
        )


def check_numbers(settings: Settings, num_prompts: int) -> None:
    """Raise ValueError for counts, seeds or guidance out of range, from flags or from run.json."""
    names = ["num_inference_steps", "num_images_per_prompt"]
    names += ["batch_size"] if settings.batch_size is not None else []
    for name in names:
        if type(getattr(settings, name)) is not int or getattr(settings, name) < 1:
            raise ValueError(
                f"--{name} is {shorten(getattr(settings, name))}, expected a whole number, at least 1."
            )
    if (settings.num_inference_steps or 0) > TIMESTEPS:
        raise ValueError(
            f"--num_inference_steps is {shorten(settings.num_inference_steps)}, expected at most {TIMESTEPS}."
        )
    if (count := num_prompts * settings.num_images_per_prompt) > MAX_IMAGES:
        raise ValueError(
            f"--num_images_per_prompt {shorten(settings.num_images_per_prompt)}: {shorten(count)} images, expected at most "
            f"{MAX_IMAGES:,}. Lower it, and run again with another --seed."
        )
    last = settings.seed + num_prompts * settings.num_images_per_prompt - 1
    if settings.seed < 0 or last >= 2**63:
        raise ValueError(
            f"--seed {shorten(settings.seed)}: the seeds of all images must lie in 0..2**63 - 1; choose another."
        )
    if not math.isfinite(settings.guidance_scale) or settings.guidance_scale < 1:
        raise ValueError(f"--guidance_scale is {settings.guidance_scale}, expected 1 (none) or more.")


def check_image_size(settings: Settings, folder: Path, config: dict) -> int:
    """Return the side of a token in pixels; raises ValueError for sizes that are not multiples of it or too large."""
    token, largest = read_sides(folder, config)
    for name in ("height", "width"):
        pixels = getattr(settings, name)
        if type(pixels) is not int or pixels <= 0 or pixels % token:
            nearest = max(token, (pixels + token // 2) // token * token) if type(pixels) is int else token
            raise ValueError(
                f"--{name} {pixels!r:.40} is not divisible by {token}; the nearest is {nearest}."
            )
        if pixels > largest:
            raise ValueError(
                f"--{name} {shorten(pixels)} is more than this student's rotary tables allow, at most {largest}."
            )
    return token


def check_output_dir(output: Path) -> None:
    """Raise OSError if the folder cannot be created or written to."""
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not place.is_dir():
        raise OSError(
            f"--output_dir {output}: {place} is a file, expected a folder. Name another --output_dir."
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise OSError(f"--output_dir {output}: {place} cannot be written to. Name another --output_dir.")


def choose_prompts(settings: Settings, run: dict, folder: Path) -> list[str]:
    """Return the prompts of the command line, by default the validation prompts of the run."""
    if settings.prompt is not None and settings.prompts_file is not None:
        raise ValueError("--prompt and --prompts_file were both given; choose one.")
    if settings.prompts_file is not None:
        return read_prompts(settings.prompts_file, print)
    prompts = settings.prompt if settings.prompt is not None else recorded_prompts(run)
    if (settings.web or settings.serve) and not prompts:
        return []
    if (
        not prompts
        or not isinstance(prompts, list)
        or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)
    ):
        raise ValueError(
            f'no prompt: {folder / RUN} has no validation prompts, or --prompt is empty. Add --prompt "...".'
        )
    for prompt in prompts:
        check_text(prompt, f"{folder / RUN}: a validation prompt")
    return prompts


def recorded_prompts(run: dict) -> Any:
    """Return the validation prompts of a run, at most MAX_RECORDED."""
    found = run.get("validation_prompts", [])
    if not isinstance(found, list) or len(found) <= MAX_RECORDED:
        return found
    print(f"drawing the first {MAX_RECORDED} of {len(found):,} validation prompts", flush=True)
    return found[:MAX_RECORDED]
