"""Generate images with a saved student: load it, without a teacher, sample, and write PNG files.

    python run_inference.py                                              # ./outputs/wan_t2i, the run's own validation prompts
    python run_inference.py --prompt "a small red circle at the left on a white background" --num_images_per_prompt 4
    python run_inference.py --model DIR --prompts_file prompts.txt --device cuda --dtype bfloat16
    python run_inference.py --model DIR --web      # a page to draw with, in a browser; --serve is an HTTP server

The text chunks of each PNG file store the settings of the image: prompt, seed, steps, guidance, size, dtype, and the
model's sha256.
"""

import gc
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from wanlite.files.file_names import RUN
from wanlite.generation.checks import complete, read_editing
from wanlite.generation.settings import Settings
from wanlite.planning.settings import make_parser
from wanlite.runtime.terminal import EXIT_CODE, EXPLAINED, explain, keep_output_open, one_line, print_error
from wanlite.schedule import first_step
from wanlite.serving.address import check_serving
from wanlite.training.run_folder import read_run
from wanlite.training.sampling_defaults import size_warning, trained_sizes

MAX_PROMPT = 80  # characters of a prompt in the list of files


def read_settings(arguments: list[str] | None = None) -> tuple[Settings, list[str]]:
    """Read and check the command line without importing torch; returns the completed settings and the prompts."""
    parser = make_parser(Settings, __doc__, repeatable=("prompt",))
    settings = Settings(**vars(parser.parse_args(arguments)))
    try:
        check_serving(settings)
        settings, prompts = complete(settings)
    except (OSError, ValueError) as error:
        parser.refuse(explain(error))
    return settings, prompts


if __name__ == "__main__":  # arguments and paths are checked before torch is imported, which takes seconds
    keep_output_open()
    gc.disable()  # imports create a million objects that are never freed
    # Ctrl-C ends the program at once, without a traceback; images on disk are complete.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # See train_distillation.py.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    SETTINGS, PROMPTS = read_settings()

import torch
from safetensors import SafetensorError

from wanlite.data.kept_embeddings import encode_or_read
from wanlite.flow import set_steps
from wanlite.generation.images import (
    Generated,
    digests_of,
    flat_warning,
    generate_all,
    refuse_not_finite,
    save_grid,
)
from wanlite.generation.student import StudentPipeline, encode_once
from wanlite.runtime.devices import choose_device


def main(settings: Settings, prompts: list[str]) -> None:
    """Generate and write all images."""
    device = choose_device(settings.device)
    run = read_run(settings.model)
    jobs = [prompt for prompt in prompts for _ in range(settings.num_images_per_prompt)]
    announce(settings, device, len(jobs), is_recorded=bool(run))
    output = Path(settings.output_dir).absolute()
    output.mkdir(parents=True, exist_ok=True)
    # Before the student is loaded, so that the device has room for the text encoder.
    embeddings = embed(settings, prompts, device)
    pipeline = StudentPipeline(settings.model, device, settings.dtype, settings.sha256, embeddings)
    if settings.image is not None:
        pipeline.editing = read_editing(settings)
        announce_editing(settings, pipeline)
    sizes = trained_sizes(run, pipeline.pixels_per_token, RUN)
    size = size_warning((settings.width or 0, settings.height or 0), sizes)
    warn(size)
    settings = replace(settings, dtype=str(pipeline.dtype).removeprefix("torch."))
    generated, cells = generate_all(pipeline, settings, jobs)
    written = [each for each in generated if each.path]
    grid = save_grid(settings, written, cells, digests_of(pipeline)) if len(cells) > 1 else None
    report(written, grid, output)
    warn(size, flat_warning(written))
    refuse_not_finite(generated, str(settings.dtype))


def announce(settings: Settings, device: str, count: int, is_recorded: bool) -> None:
    """Print the number of images, their settings and the output folder."""
    reason = "" if settings.device or device != "cpu" else " (no CUDA device was found)"
    print(
        f"generating {num_images(count)} of {settings.width}x{settings.height} in {settings.num_inference_steps} steps "
        f"with {settings.model} on {device}{reason}; writing to {Path(settings.output_dir).absolute()}",
        flush=True,
    )
    if not is_recorded:
        print(
            f"no {RUN} found: size and steps come from the flags, or from defaults that may not fit",
            flush=True,
        )


def announce_editing(settings: Settings, pipeline: StudentPipeline) -> None:
    """Print which steps change the image of --image."""
    num_steps = settings.num_inference_steps or 0
    begin = first_step(num_steps, settings.strength)
    _, noise_level = set_steps(pipeline.scheduler, num_steps, "cpu")[begin]
    print(
        f"changing {settings.image} in the last {num_steps - begin} of {num_steps} steps, from a noise level of "
        f"{noise_level:.2f}",
        flush=True,
    )


def embed(settings: Settings, prompts: list[str], device: str) -> dict[str, torch.Tensor]:
    """Return {prompt: embedding (L, T)} of all prompts, and of the negative prompt if guidance uses it."""
    texts = [*prompts, *([settings.negative_prompt] if settings.guidance_scale > 1 else [])]
    encode = partial(encode_once, settings.model, device)
    return (
        encode_or_read(settings.model, device, texts, encode) if settings.keep_embeddings else encode(texts)
    )


def report(written: Sequence[Generated], grid: Path | None, output: Path) -> None:
    """Print the files and their prompts."""
    for each in written:
        print(f"{Path(each.path or '').name}  {one_line(each.prompt, MAX_PROMPT)}")
    also = f" and {grid.name}" if grid else ""
    print(f"wrote {num_images(len(written))}{also} to {output}", flush=True)


def num_images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def warn(*warnings: str | None) -> None:
    """Print the warnings that are not None."""
    for warning in filter(None, warnings):
        print(f"WARNING: {warning}", file=sys.stderr, flush=True)


def serve(settings: Settings, prompts: list[str]) -> None:
    """Draw for a page or for requests until the process is stopped."""
    from wanlite.serving.serve import serve  # its libraries are an extra

    serve(settings, prompts)


if __name__ == "__main__":
    gc.freeze()  # the garbage collector skips the objects of imports
    gc.enable()
    try:
        (serve if SETTINGS.web or SETTINGS.serve else main)(SETTINGS, PROMPTS)
    except (*EXPLAINED, SafetensorError) as error:
        print_error("run_inference.py", error)
        sys.exit(EXIT_CODE)
    except torch.OutOfMemoryError as error:
        print(
            f"run_inference.py: {str(error).splitlines()[0]} Lower --batch_size, --height or --width, add "
            f"--dtype bfloat16, or --device cpu.",
            file=sys.stderr,
        )
        sys.exit(2)
