"""Give a saved student a small text encoder and a small decoder, made of its large ones, in a folder of its own.

    python -m wanlite.small --model outputs/wan_t2i        # writes outputs/wan_t2i/small

Both parts start from the large ones' weights, and learn from prompts and the student's own images alone. The folder
loads like any other saved student, in stock diffusers as well; the large parts stay in theirs. After an interruption,
the same command resumes.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from wanlite.data.prompts import read_prompts
from wanlite.files.file_names import RUN
from wanlite.files.locks import alone
from wanlite.parts.defaults import PARTS, STUDENT_IMAGES
from wanlite.planning.part_settings import part_setting
from wanlite.planning.settings import check_bounds, check_device, make_parser, setting
from wanlite.runtime.signals import Stopped, StopSignal
from wanlite.runtime.terminal import EXIT_CODE, EXPLAINED, explain, keep_output_open, print_error
from wanlite.schedule import recorded_schedule
from wanlite.student.loading import open_student
from wanlite.student.location import student_folder
from wanlite.training.run_folder import (
    PROMPT_SETTINGS,
    SMALL,
    check_saved_components,
    prompt_settings,
    read_run,
)

STOPPED = 3  # exit code after a signal


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
    vocabulary: str | None = part_setting("vocabulary")
    student_images: int = setting(
        STUDENT_IMAGES, "images of the student to learn from", was="num_images", least=1
    )
    text_width: int | None = part_setting("text_width", group="sizes")
    text_depth: int | None = part_setting("text_depth")
    text_heads: int | None = part_setting("text_heads")
    text_ffn_dim: int | None = part_setting("text_ffn_dim")
    decoder_base_dim: int | None = part_setting("decoder_base_dim")
    decoder_steps: int | None = part_setting("decoder_steps", group="steps")
    reading_steps: int | None = part_setting("reading_steps")
    text_velocity_steps: int | None = part_setting("text_velocity_steps", was="velocity_steps")
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
        parser.error(explain(error))
    return settings


def complete(settings: Settings) -> Settings:
    """Complete settings from the saved student; raises OSError or ValueError if no parts can be made."""
    check_bounds(settings)
    check_device(settings.device)
    if settings.text_encoder == settings.decoder == "large":
        raise ValueError("--text_encoder large and --decoder large leave nothing to make; name one small.")
    if settings.vocabulary is not None and settings.text_encoder == "large":
        raise ValueError("--vocabulary needs --text_encoder small. Leave one of them out.")
    if settings.vocabulary is not None:
        read_prompts(settings.vocabulary, count=1)  # raises
    folder = student_folder(settings.model)
    with open_student(folder):
        record = read_run(folder)
    if PROMPT_SETTINGS.keys() - prompt_settings(record, folder / RUN).keys():
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

from safetensors import SafetensorError

from train_distillation import WanLiteStudent
from wanlite.parts.folder import Student, describe, make_folder
from wanlite.parts.vocabulary import read_vocabulary
from wanlite.planning.defaults import choose_prompts
from wanlite.runtime.devices import choose_device, disable_cudnn_attention


def read_training_prompts(settings: Settings, record: dict) -> tuple[list[str], list[str]]:
    """Return training and held-out prompts, as the student's own run chose them."""
    recorded = record["settings"] | ({"prompts": settings.prompts} if settings.prompts else {})
    return choose_prompts(SimpleNamespace(**recorded), print)


def main(settings: Settings, stop: StopSignal | None = None) -> int:
    """Make the small parts and save the folder; returns the exit code."""
    output, record = Path(settings.output_dir or ""), read_run(settings.model)
    device = choose_device(settings.device)
    disable_cudnn_attention()
    print(f"making small parts of {settings.model} on {device}; writing to {output.absolute()}", flush=True)
    source = Path(settings.model)
    vocabulary = read_vocabulary(settings.vocabulary, print)
    prompts = read_training_prompts(settings, record)
    student = Student(source, WanLiteStudent, device, *prompts, vocabulary)
    own = {"decoder_batch": settings.decoder_batch_size, "text_batch": settings.text_batch_size}
    with alone(output):
        if settings.overwrite:
            shutil.rmtree(output, ignore_errors=True)
        made = make_folder(output, student, settings, stop, learning_rate=settings.learning_rate, **own)
    print(describe(output, source, made["parts"]["figures"]))
    print(f"next: python run_inference.py --model {output}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(SETTINGS, StopSignal()))
    except Stopped:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(STOPPED)
    except (*EXPLAINED, SafetensorError) as error:
        print_error("wanlite-small", error)
        sys.exit(EXIT_CODE)
