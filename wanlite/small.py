"""Give a saved student a small text encoder and a small decoder, made of its large ones, in a folder of its own.

    python -m wanlite.small --model outputs/wan_t2i        # writes outputs/wan_t2i/small

Both parts start from the large ones' weights, and learn from prompts and the student's own images alone. The folder
loads like any other saved student, in stock diffusers as well; the large parts stay in theirs. After an interruption,
the same command resumes.
"""

import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from wanlite.files.file_names import RUN
from wanlite.planning.settings import check_bounds, check_device, make_parser, setting
from wanlite.runtime.signals import Stopped, StopSignal
from wanlite.runtime.terminal import keep_output_open, one_line
from wanlite.schedule import recorded_schedule
from wanlite.student.loading import open_student
from wanlite.student.location import student_folder
from wanlite.training.run_folder import check_saved_components, read_run

SMALL = "small"  # folder in that of the student
STOPPED = 3  # exit code after a signal
PARTS = ("small", "large")


class Steps(NamedTuple):
    """Default steps for the parts of a tiny world, and for real ones."""

    tiny: int
    real: int

    def __str__(self) -> str:
        return f"{self.real:,}, {self.tiny:,} for the tiny world's"


# Those of the tiny world are measured by benchmarks/small_parts.py, the others are estimates.
STEPS = {"decoder": Steps(1500, 20_000), "reading": Steps(1500, 15_000), "velocity": Steps(400, 4000)}
LARGE_WIDTH = 1024  # of a text encoder: from here on its parts are real ones


@dataclass(frozen=True)
class Settings:
    model: str = setting("./outputs/wan_t2i", "folder of a trained student", is_path=True)
    output_dir: str | None = setting(
        None, f"folder of the student with small parts (default: {SMALL}/ in --model)", is_path=True
    )
    text_encoder: str = setting("small", "small, or that of the student", choices=PARTS)
    decoder: str = setting("small", "small, or that of the student", choices=PARTS)
    prompts: str | None = setting(
        None,
        "file of prompts, as in training (default: the prompts of the student's run)",
        is_path=True,
        group="data",
    )
    num_images: int = setting(4000, "images of the student to learn from", least=1)
    text_width: int | None = setting(
        None,
        "width of the text encoder (default: half of the large one's, at most 768)",
        group="sizes",
        least=1,
    )
    text_depth: int | None = setting(None, "its blocks (default: half of the large one's)", least=1)
    text_heads: int | None = setting(
        None, "its attention heads (default: in proportion to its width)", least=1
    )
    text_ffn_dim: int | None = setting(None, "its inner width (default: in proportion to its width)", least=1)
    decoder_base_dim: int | None = setting(
        None, "channels of the decoder's last layers (default: half of the large one's, at most 32)", least=1
    )
    decoder_steps: int | None = setting(
        None, f"steps of the decoder (default: {STEPS['decoder']})", group="steps", least=1
    )
    reading_steps: int | None = setting(
        None,
        f"steps of the text encoder towards what the student reads (default: {STEPS['reading']})",
        least=1,
    )
    velocity_steps: int | None = setting(
        None,
        f"steps of the text encoder towards the student's velocity (default: {STEPS['velocity']})",
        least=1,
    )
    decoder_batch_size: int = setting(16, "images of a step, crops of 256 pixels at most", least=1)
    text_batch_size: int = setting(64, "prompts of a step", least=1)
    learning_rate: float = setting(2e-3, "peak for AdamW", above=0, most=1)
    checkpointing_steps: int = setting(500, "save the training every this many steps", least=1)
    seed: int = setting(0, "seed of all random numbers", least=0, below=2**32)
    device: str | None = setting(None, "cpu, cuda, cuda:N or mps (default: cuda if available, else cpu)")
    overwrite: bool = setting(False, "replace a finished folder, and start an unfinished one again")


def read_settings(arguments: list[str] | None = None) -> Settings:
    """Read and check the command line without importing torch; exits with one line and code 2 on an error."""
    parser = make_parser(Settings, __doc__)
    parser.prog = "wanlite-small"
    parser.usage = "%(prog)s [options]"
    settings = Settings(**vars(parser.parse_args(arguments)))
    try:
        settings = complete(settings)
    except (OSError, ValueError) as error:
        parser.error(one_line(str(error)))
    return settings


def complete(settings: Settings) -> Settings:
    """Complete settings from the saved student; raises OSError or ValueError if no parts can be made."""
    check_bounds(settings)
    check_device(settings.device)
    if settings.text_encoder == settings.decoder == "large":
        raise ValueError("--text_encoder large and --decoder large leave nothing to make; name one small.")
    folder = student_folder(settings.model)
    with open_student(folder):
        record = read_run(folder)
    if not isinstance(record.get("settings"), dict):
        raise ValueError(
            f"{folder}: has no {RUN} of a training, expected a student that train_distillation.py saved."
        )
    recorded_schedule(record, folder / RUN)
    check_saved_components(folder)
    if "parts" in record:
        raise ValueError(
            f"{folder}: has small parts already. Name the folder of the student with large ones."
        )
    output = Path(settings.output_dir or folder / SMALL)
    if output.resolve() == folder.resolve():
        raise ValueError(
            f"--output_dir {output}: is the student's own folder. Choose another; the large parts stay."
        )
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir {output}: is a file, expected a folder. Choose another.")
    if (output / RUN).exists() and not settings.overwrite:
        raise ValueError(
            f"{output}: holds a finished student. Add --overwrite, or choose another --output_dir."
        )
    return replace(settings, model=str(folder), output_dir=str(output))


if __name__ == "__main__":  # arguments and paths are checked before torch is imported, which takes seconds
    keep_output_open()
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # see train_distillation.py
    SETTINGS = read_settings()

import shutil
from types import SimpleNamespace

import torch
from diffusers import UniPCMultistepScheduler
from safetensors import SafetensorError

from train_distillation import WanLiteStudent
from wanlite.data.autoencoder import load_video_autoencoder
from wanlite.data.text_encoder import load_text_encoder
from wanlite.parts.making import PartOptions, Pipeline, SmallParts
from wanlite.parts.saving import save_small
from wanlite.parts.text_projection import TextShape, default_shape
from wanlite.planning.defaults import choose_prompts
from wanlite.runtime.devices import choose_device, disable_cudnn_attention
from wanlite.schedule import read_schedule
from wanlite.training.metrics import prompt_accuracy
from wanlite.training.sampling_defaults import sampling_defaults
from wanlite.world.record import read_world

WORK = "work"  # checkpoints and drawn latents of an unfinished training, in --output_dir
MAX_BASE_DIM = 32


def load_pipeline(folder: str, device: str) -> Pipeline:
    """Load a saved student with its parts; on a GPU the text encoder has the dtype of its files."""
    record = read_run(folder)
    student = WanLiteStudent.from_pretrained(folder, device=device).eval().requires_grad_(False)
    tokenizer, encoder = load_text_encoder(folder, device, torch.float32 if device == "cpu" else None)
    autoencoder = load_video_autoencoder(folder).eval().requires_grad_(False).to(device)
    defaults = sampling_defaults(record)
    stride = autoencoder.config.scale_factor_spatial
    schedule = read_schedule(folder, recorded_schedule(record, Path(folder) / RUN))
    return Pipeline(
        folder,
        student,
        UniPCMultistepScheduler(**schedule),
        defaults["num_inference_steps"],
        tokenizer,
        encoder,
        autoencoder,
        (student.config.in_channels, defaults["height"] // stride, defaults["width"] // stride),
    )


def choose_options(settings: Settings, large: Pipeline) -> PartOptions:
    """Return the options of both parts, with sizes in proportion to the large ones where they are not set."""
    config = large.autoencoder.config
    widest = config["decoder_base_dim"] or config["base_dim"]
    shape = default_shape(large.encoder.config, settings.text_width)
    shape = TextShape(
        shape.width,
        settings.text_depth or shape.depth,
        settings.text_heads or shape.heads,
        settings.text_ffn_dim or shape.ffn,
    )
    base_dim = settings.decoder_base_dim or min(MAX_BASE_DIM, widest // 2)
    is_real = large.encoder.config.d_model >= LARGE_WIDTH
    steps = {
        f"{name}_steps": getattr(settings, f"{name}_steps") or (default.real if is_real else default.tiny)
        for name, default in STEPS.items()
    }
    return PartOptions(
        decoder_base_dim=base_dim if settings.decoder == "small" else None,
        text_shape=shape if settings.text_encoder == "small" else None,
        num_images=settings.num_images,
        **steps,
        decoder_batch=settings.decoder_batch_size,
        text_batch=settings.text_batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        checkpointing_steps=settings.checkpointing_steps,
    )


def read_training_prompts(settings: Settings, record: dict) -> tuple[list[str], list[str]]:
    """Return training and held-out prompts, as the student's own run chose them."""
    recorded = record["settings"] | ({"prompts": settings.prompts} if settings.prompts else {})
    return choose_prompts(SimpleNamespace(**recorded), print)


def judge(large: Pipeline, small: Pipeline, held_out: list[str], teacher: str) -> dict:
    """Return the accuracy of held-out captions with large and with small parts; {} unless a judge can read them."""
    world = read_world(teacher)
    if world is None or not all(world.read_caption(caption) for caption in held_out):
        return {}
    return {
        name: prompt_accuracy(pipeline.images, held_out, world)["accuracy"]
        for name, pipeline in (("large", large), ("small", small))
    }


def main(settings: Settings, stop: StopSignal | None = None) -> int:
    """Make the small parts and save the folder; returns the exit code."""
    output, record = Path(settings.output_dir or ""), read_run(settings.model)
    device = choose_device(settings.device)
    disable_cudnn_attention()
    print(f"making small parts of {settings.model} on {device}; writing to {output.absolute()}", flush=True)
    large = load_pipeline(settings.model, device)
    options = choose_options(settings, large)
    training, held_out = read_training_prompts(settings, record)
    if settings.overwrite:
        shutil.rmtree(output, ignore_errors=True)
    (output / WORK).mkdir(parents=True, exist_ok=True)
    if stop is not None:
        stop.is_immediate = False
    parts = SmallParts(large, options, training, held_out, output / WORK, stop)
    small, figures = parts.make()
    figures["accuracy"] = judge(large, small, held_out, record["settings"]["teacher"])
    save_small(output, settings.model, small, record, figures, asdict(options))
    shutil.rmtree(output / WORK)
    print(describe(output, settings.model, figures))
    return 0


def describe(output: Path, source: str, figures: dict) -> str:
    """Return the sizes of both folders, the accuracy, and the next command."""
    lines = [
        f"saved to {output}: {megabytes(output):,.1f} MB for the {megabytes(Path(source)):,.1f} MB of {source}"
    ]
    if accuracy := figures["accuracy"]:
        lines.append(
            f"held-out captions drawn right: {accuracy['small']:.1%} with small parts, {accuracy['large']:.1%} with large"
        )
    lines.append(f"next: python run_inference.py --model {output}")
    return "\n".join(lines)


def megabytes(folder: Path) -> float:
    """Return the size of what inference reads in a folder."""
    files = [*folder.glob("*.safetensors"), *folder.glob("tokenizer/*")]
    files += [path for name in ("text_encoder", "vae") for path in folder.glob(f"{name}/*.safetensors")]
    return sum(path.stat().st_size for path in files) / 1e6


if __name__ == "__main__":
    try:
        sys.exit(main(SETTINGS, StopSignal()))
    except Stopped:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(STOPPED)
    except (OSError, ValueError, FloatingPointError, SafetensorError) as error:
        print(f"wanlite-small: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
