"""Train a LoRA on captioned images, for a saved student; its images of other prompts stay as they are.

    wanlite-lora --images ./photos --output_dir ./outputs/lora          # on ./outputs/wan_t2i

Writes pytorch_lora_weights.safetensors for diffusers and comfyui.safetensors for ComfyUI:

    pipeline = WanLitePipeline.from_pretrained("outputs/wan_t2i")
    pipeline.load_lora_weights("outputs/lora")
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..data.grammar import varied_prompts
from ..data.images import CaptionedImage, choose_images
from ..data.prompts import read_prompts
from ..files.atomic import new_folder
from ..files.file_names import RUN
from ..files.locks import alone
from ..planning.settings import check_bounds, check_device, make_parser, setting
from ..runtime.terminal import EXIT_CODE, EXPLAINED, explain, keep_output_open, print_error
from ..schedule import read_schedule, recorded_schedule
from ..student.loading import open_student
from ..student.location import student_folder
from ..training.run_folder import check_saved_components, prompt_settings, read_run
from ..training.sampling_defaults import read_sides, sampling_defaults, trained_sizes
from ..world.record import read_world

LOG_STEPS = 50


@dataclass(frozen=True)
class Settings:
    model: str = setting(
        "./outputs/wan_t2i",
        "folder of the saved student to adapt, the one that will draw with the LoRA",
        is_path=True,
    )
    images: str | None = setting(
        None,
        "captioned images: a folder with a .txt file per image or with metadata.jsonl or .csv, or the other "
        "forms that train_distillation.py reads (default: none, required)",
        is_path=True,
    )
    prompts: str | None = setting(
        None,
        "file of other prompts, whose images must stay as they are (default: prompts as in the student's training)",
        is_path=True,
    )
    num_prompts: int = setting(256, "number of other prompts to use", least=1)
    output_dir: str = setting("./outputs/lora", "folder of the LoRA", is_path=True)
    overwrite: bool = setting(False, "replace an earlier LoRA in --output_dir (default: off)")
    rank: int = setting(16, "rank of the LoRA matrices", least=1, most=1024)
    max_train_steps: int = setting(800, "training steps", least=1)
    train_batch_size: int = setting(
        16, "captioned images per step, beside twice as many of the student's own images", least=1
    )
    learning_rate: float = setting(
        2e-3, "learning rate of AdamW, which falls to 0 along a cosine", above=0, most=1
    )
    device: str | None = setting(None, "cpu, cuda, cuda:N or mps (default: cuda if available, else cpu)")
    seed: int = setting(0, "seed of all random numbers", least=0, below=2**32)


@dataclass(frozen=True)
class Task:
    """What a command trains on and how the student draws."""

    settings: Settings
    images: list[CaptionedImage]
    prompts: list[str]
    schedule: dict[str, Any]  # arguments of the student's scheduler
    few_steps: list[int]  # [] for a student of the first phase
    num_steps: int


def read_task(arguments: Sequence[str] | None = None) -> Task:
    """Read and check the command line without importing torch."""
    parser = make_parser(Settings, __doc__)
    parser.prog = "wanlite-lora"
    settings = Settings(**vars(parser.parse_args(arguments)))
    try:
        task = complete(settings)
    except (OSError, ValueError) as error:
        parser.error(explain(error))
    return task


def complete(settings: Settings) -> Task:
    """Return the task of the settings; raises OSError or ValueError."""
    check_bounds(settings)
    check_device(settings.device)
    if not find_spec("peft"):
        raise ValueError("LoRAs need the package peft. Install it with: pip install wanlite[lora]")
    if settings.images is None:
        raise ValueError("--images is missing, expected a folder of captioned images.")
    output = Path(settings.output_dir)
    if output.exists() and not (settings.overwrite and output.is_dir()):
        raise OSError(f"--output_dir {output}: exists. Name another, or add --overwrite for an earlier LoRA.")
    folder = student_folder(settings.model)
    with open_student(folder) as (config, _):
        check_saved_components(folder)
    run = read_run(folder)
    recorded = recorded_schedule(run, folder / RUN)
    schedule = read_schedule(folder, recorded)
    defaults, (token, _) = sampling_defaults(run), read_sides(folder, config)
    sizes = trained_sizes(run, token, folder / RUN) or [(defaults["width"], defaults["height"])]
    prompts = other_prompts(settings, run)
    images = choose_images(settings.images, sizes, log=print)
    few_steps, num_steps = recorded.get("few_steps") or [], defaults["num_inference_steps"]
    return Task(replace(settings, model=str(folder)), images, prompts, schedule, few_steps, num_steps)


def other_prompts(settings: Settings, run: dict[str, Any]) -> list[str]:
    """Return the prompts of --prompts, or else prompts as in the student's training, by its record."""
    recorded, count = prompt_settings(run, RUN), settings.num_prompts
    path, teacher = settings.prompts or recorded.get("prompts"), recorded.get("teacher")
    if path:
        return read_prompts(path, print, count, settings.seed)
    world = read_world(teacher) if teacher else None
    return (world.captions if world else varied_prompts)(settings.seed, count)


def train_lora(task: Task) -> Path:
    """Train and save a LoRA; returns its folder."""
    import torch
    from diffusers import UniPCMultistepScheduler

    from train_distillation import WanLiteStudent

    from ..flow import set_steps
    from ..runtime.devices import choose_device
    from ..runtime.progress import track
    from .training import add_lora, batches, draw_levels, draw_own, encode, save_lora, train

    settings = task.settings
    folder, seed, device = Path(settings.model), settings.seed, choose_device(settings.device)
    torch.manual_seed(seed)
    scheduler: Any = UniPCMultistepScheduler(**task.schedule)
    groups = encode(folder, task.images, device)
    student = WanLiteStudent.from_pretrained(folder, dtype=torch.float32, device=device)
    own = draw_own(student, folder, groups, task.prompts, scheduler, task.num_steps)
    parameters = add_lora(student, settings.rank)
    print(
        f"training {sum(map(torch.numel, parameters)):,} values of rank {settings.rank} on {device}, with "
        f"{len(task.images)} captioned images and {len(task.prompts)} of the student's own",
        flush=True,
    )
    states = {
        (float(timestep), float(level))
        for count in task.few_steps
        for timestep, level in set_steps(scheduler, count, "cpu")
    }
    levels = partial(draw_levels, sorted(states, reverse=True), task.schedule["flow_shift"])
    rows = batches(groups, own, settings.train_batch_size, seed)
    steps = train(student, rows, levels, settings.max_train_steps, settings.learning_rate, seed)
    losses = []
    with track(settings.max_train_steps, "training") as progress:
        for each in steps:
            losses.append(each)
            progress.update()
    print_losses(losses)
    with new_folder(settings.output_dir) as output:
        save_lora(student, output, {"wanlite.model": folder.name, "wanlite.rank": str(settings.rank)})
    return Path(settings.output_dir)


def print_losses(losses: Sequence[tuple[float, float]]) -> None:
    """Print the mean of both losses over the first and over the last steps."""
    for name, values in zip(("captioned images", "own images"), zip(*losses)):
        first, last = mean(values[:LOG_STEPS]), mean(values[-LOG_STEPS:])
        print(f"loss of {name}: {first:.4f} at first, {last:.4f} at last")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a refusal is one line with exit code 2."""
    task = read_task(arguments)
    try:
        with alone(Path(task.settings.output_dir)):
            folder = train_lora(task)
    except EXPLAINED as error:
        print_error("wanlite-lora", error)
        sys.exit(EXIT_CODE)
    print(f"saved to {folder}; use it: pipeline.load_lora_weights({str(folder)!r})")


if __name__ == "__main__":
    keep_output_open()
    main()
