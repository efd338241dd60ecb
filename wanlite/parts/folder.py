"""The folder of a trained student -> a folder of the same student with small parts, resumable."""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler

from ..data.autoencoder import load_video_autoencoder
from ..data.text_encoder import load_text_encoder
from ..files.cache import fingerprint
from ..files.file_names import RUN
from ..schedule import read_schedule, recorded_schedule
from ..training.metrics import prompt_accuracy
from ..training.run_folder import read_run
from ..training.sampling_defaults import sampling_defaults
from ..world.record import read_world
from .making import Pipeline, SmallParts, count_parameters
from .options import PartOptions, choose_options
from .saving import SAVED, count_bytes, save_small
from .vocabulary import choose_vocabulary

WORK = "work"  # checkpoints and drawn latents of an unfinished training, in the folder of the small student


@dataclass(frozen=True)
class Student:
    """The folder of a trained student, its class, its device, and the prompts of its run.

    `vocabulary` has prompts whose pieces alone stay in the tokenizer of a small text encoder; without any, all stay.
    """

    folder: Path
    kind: type
    device: torch.device | str
    training: list[str]
    held_out: list[str]
    vocabulary: list[str] = field(default_factory=list)

    def load(self) -> Pipeline:
        """Load the student with its parts; on a GPU the text encoder has the dtype of its files."""
        return load_pipeline(self.folder, self.kind, self.device)


def load_pipeline(folder: str | Path, kind: Any, device: torch.device | str) -> Pipeline:
    """Load a saved student of class `kind` with its parts."""
    record, is_cpu = read_run(folder), torch.device(device).type == "cpu"
    student = kind.from_pretrained(folder, device=device).eval().requires_grad_(False)
    tokenizer, encoder = load_text_encoder(folder, device, torch.float32 if is_cpu else None)
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


def make_folder(
    output: Path, student: Student, settings: Any, stop: Any = None, num_before: int = 0, **others: Any
) -> dict[str, Any]:
    """Save the student with small parts in `output`; returns its run.json, of which `parts` has the figures.

    `settings` and `others` are those of choose_options(); `num_before` is the number of phases before these. A
    training that was stopped continues. Raises Stopped after a checkpoint, and OSError for one of other settings.
    """
    record, large = read_run(student.folder), student.load()
    if student.vocabulary:
        others["vocabulary"] = fingerprint(student.vocabulary)
    options = choose_options(settings, large.encoder.config, large.autoencoder.config, **others)
    if is_made(output, record, options):
        return read_run(output)
    (output / WORK).mkdir(parents=True, exist_ok=True)
    vocabulary = None
    if student.vocabulary:  # chosen first, because a refusal must not follow a training
        own = [*student.training, *student.held_out]
        vocabulary = choose_vocabulary(large.tokenizer, student.vocabulary, own)
        print(f"vocabulary  {vocabulary.describe()}", flush=True)
    parts = SmallParts(large, options, student.training, student.held_out, output / WORK, stop, num_before)
    small, figures = parts.make()
    if vocabulary is not None:
        small = replace(small, encoder=vocabulary.cut(small.encoder), tokenizer=vocabulary.tokenizer)
        figures["vocabulary"] = {"pieces": len(vocabulary.kept), "scripts": vocabulary.describe()}
        figures["text_encoder"]["parameters"] = count_parameters(small.encoder)
    figures["accuracy"] = judge(large, small, student.held_out, record["settings"]["teacher"])
    save_small(output, student.folder, small, record, figures, options.facts())
    shutil.rmtree(output / WORK)
    return read_run(output)


def is_made(output: Path, record: dict[str, Any], options: PartOptions) -> bool:
    """Whether a folder is complete; raises ValueError for small parts of other options or of another student."""
    parts = read_run(output).get("parts") if output.is_dir() else None
    if parts is None:
        return False
    if (parts.get("options"), parts.get("student_sha256")) != (options.facts(), record.get("model_sha256")):
        raise ValueError(
            f"{output}: holds small parts of other settings or of another student. Move the folder away."
        )
    return True


def judge(large: Pipeline, small: Pipeline, held_out: list[str], teacher: str) -> dict[str, Any]:
    """Return the accuracy of held-out captions with large and with small parts; {} unless a judge can read them."""
    world = read_world(teacher)
    if world is None or not all(world.read_caption(caption) for caption in held_out):
        return {}
    return {
        name: prompt_accuracy(pipeline.images, held_out, world)["accuracy"]
        for name, pipeline in (("large", large), ("small", small))
    }


def describe(output: Path, source: Path, figures: dict[str, Any]) -> str:
    """Return the sizes of both folders, and the accuracy."""
    sizes = [sum(count_bytes(folder, name) for name in SAVED) / 1e6 for folder in (output, source)]
    lines = [f"saved to {output}: {sizes[0]:,.1f} MB for the {sizes[1]:,.1f} MB of {source}"]
    if accuracy := figures["accuracy"]:
        lines.append(
            f"held-out captions drawn right: {accuracy['small']:.1%} with small parts, {accuracy['large']:.1%} with large"
        )
    return "\n".join(lines)
