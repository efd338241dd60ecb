"""Train a LoRA on captioned images, for a student and for its few-step version.

    wanlite-lora --images ./photos --output_dir ./outputs/lora          # on ./outputs/wan_t2i/base, the base of a run

Writes pytorch_lora_weights.safetensors for diffusers and comfyui.safetensors for ComfyUI:

    pipeline = WanLitePipeline.from_pretrained("outputs/wan_t2i")
    pipeline.load_lora_weights("outputs/lora")
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..data.images import CaptionedImage, choose_images
from ..files.atomic import new_folder
from ..files.file_names import CONFIG, RUN
from ..files.json_files import DOWNLOADED, read_json
from ..planning.settings import check_bounds, make_parser, setting
from ..runtime.terminal import keep_output_open, one_line
from ..schedule import read_schedule, recorded_schedule
from ..student.loading import open_student
from ..student.location import student_folder
from ..training.run_folder import check_saved_components, read_run
from ..training.sampling_defaults import sampling_defaults, trained_sizes

LOG_STEPS = 50


@dataclass(frozen=True)
class Settings:
    model: str = setting(
        "./outputs/wan_t2i/base",
        "folder of the saved student to adapt; base/ of a few-step run",
        is_path=True,
    )
    images: str | None = setting(
        None,
        "captioned images: a folder with a .txt file per image or with metadata.jsonl or .csv, or the other "
        "forms that train_distillation.py reads (default: none, required)",
        is_path=True,
    )
    output_dir: str = setting("./outputs/lora", "folder of the LoRA", is_path=True)
    overwrite: bool = setting(False, "replace an earlier LoRA in --output_dir (default: off)")
    rank: int = setting(8, "rank of the LoRA matrices", least=1, most=1024)
    max_train_steps: int = setting(500, "training steps", least=1)
    train_batch_size: int = setting(4, "images per step", least=1)
    learning_rate: float = setting(1e-4, "learning rate of AdamW, constant", above=0, most=1)
    device: str | None = setting(None, "cpu, cuda or mps (default: cuda if available, else cpu)")
    seed: int = setting(0, "seed of all random numbers", least=0, below=2**32)


def read_settings(
    arguments: Sequence[str] | None = None,
) -> tuple[Settings, list[CaptionedImage], dict[str, Any]]:
    """Read and check the command line without importing torch; returns settings, images and the schedule."""
    parser = make_parser(Settings, __doc__)
    parser.prog = "wanlite-lora"
    settings = Settings(**vars(parser.parse_args(arguments)))
    try:
        found = complete(settings)
    except (OSError, ValueError) as error:
        parser.error(one_line(str(error)))
    return found


def complete(settings: Settings) -> tuple[Settings, list[CaptionedImage], dict[str, Any]]:
    """Return the settings, the usable images and the student's schedule; raises OSError or ValueError."""
    check_bounds(settings)
    if not find_spec("peft"):
        raise ValueError("LoRAs need the package peft. Install it with: pip install wanlite[lora]")
    if settings.images is None:
        raise ValueError("--images is missing, expected a folder of captioned images.")
    output = Path(settings.output_dir)
    if output.exists() and not (settings.overwrite and output.is_dir()):
        raise OSError(f"--output_dir {output}: exists. Name another, or add --overwrite for an earlier LoRA.")
    folder = student_folder(settings.model)
    with open_student(folder) as (config, _):
        patch = config["patch_size"][1]
    check_saved_components(folder)
    run = read_run(folder)
    schedule = read_schedule(folder, recorded_schedule(run, folder / RUN))
    stride = read_json(folder / "vae" / CONFIG, DOWNLOADED).get("scale_factor_spatial") or 8
    defaults = sampling_defaults(run)
    sizes = trained_sizes(run, stride * patch, folder / RUN) or [(defaults["width"], defaults["height"])]
    images = choose_images(settings.images, sizes, log=print)
    return replace(settings, model=str(folder)), images, schedule


def train_lora(settings: Settings, images: Sequence[CaptionedImage], schedule: dict[str, Any]) -> Path:
    """Train and save a LoRA; returns its folder."""
    import torch
    from tqdm import tqdm

    from train_distillation import WanLiteStudent

    from .training import add_lora, encode, save_lora, train

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    groups = encode(Path(settings.model), images, device)
    student = WanLiteStudent.from_pretrained(settings.model, dtype=torch.float32, device=device)
    parameters = add_lora(student, settings.rank)
    print(
        f"training {sum(map(torch.numel, parameters)):,} values of rank {settings.rank} on {device}",
        flush=True,
    )
    losses: list[float] = []
    steps = train(
        student,
        groups,
        schedule["flow_shift"],
        settings.max_train_steps,
        settings.train_batch_size,
        settings.learning_rate,
        settings.seed,
    )
    for loss in tqdm(steps, total=settings.max_train_steps, desc="training", unit="step"):
        losses.append(loss)
    print(f"loss {mean(losses[:LOG_STEPS]):.4f} at first, {mean(losses[-LOG_STEPS:]):.4f} at last")
    with new_folder(settings.output_dir) as folder:
        save_lora(student, folder, {"wanlite.model": settings.model, "wanlite.rank": str(settings.rank)})
    return Path(settings.output_dir)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a refusal is one line with exit code 2."""
    settings, images, schedule = read_settings(arguments)
    try:
        folder = train_lora(settings, images, schedule)
    except (OSError, ValueError) as error:
        print(f"wanlite-lora: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    print(f"saved to {folder}; use it: pipeline.load_lora_weights({str(folder)!r})")


if __name__ == "__main__":
    keep_output_open()
    main()
