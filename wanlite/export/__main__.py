"""Export a saved student: a file for ComfyUI with a workflow beside it, or a quantised GGUF file for diffusers.

    wanlite-export --format comfyui ./outputs/wan_t2i --output ComfyUI/models/diffusion_models/student.safetensors
    wanlite-export --format gguf --dtype q8_0 ./outputs/wan_t2i --output student.gguf

Open the workflow, student.json, in ComfyUI. It names the text encoder and the autoencoder to download.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..data.tables import check_text
from ..files.atomic import check_space, flush, write_json
from ..files.dtypes import BYTES_PER_VALUE
from ..files.file_names import RUN
from ..files.json_files import shorten
from ..planning.settings import make_parser, setting
from ..runtime.terminal import EXIT_CODE, EXPLAINED, explain, keep_output_open, print_error
from ..schedule import TIMESTEPS, read_schedule, recorded_schedule
from ..student.loading import open_student
from ..student.location import student_folder
from ..training.run_folder import read_run
from ..training.sampling_defaults import check_steps, sampling_defaults
from . import comfyui, gguf
from .comfyui import AUTOENCODERS, TEXT_ENCODER, check_runnable
from .workflow import Drawing, format_level, make_workflow

SUFFIXES, WORKFLOW_SUFFIX = {"comfyui": ".safetensors", "gguf": ".gguf"}, ".json"
DTYPES = {"comfyui": comfyui.DTYPES, "gguf": gguf.DTYPES}  # the first is the default
STORED = {"float32": "F32", "bfloat16": "BF16", "float8": "F8_E4M3"}  # others take less than BF16
PROMPT = "a photograph of a lighthouse on a cliff at dawn"  # of a student without a recorded prompt


@dataclass(frozen=True)
class Settings:
    format: str = setting("comfyui", "kind of file: for ComfyUI, or GGUF for diffusers", choices=(*SUFFIXES,))
    output: str | None = setting(
        None,
        "file to write, *.safetensors or *.gguf (default: the name of the student's folder)",
        is_path=True,
    )
    dtype: str | None = setting(
        None,
        "dtype of the weights; float8 scales the matrices of the blocks, q8_0, q5_0 and q4_0 are of GGUF (default: "
        "bfloat16, or q8_0)",
        choices=(*comfyui.DTYPES, *gguf.DTYPES),
    )
    num_inference_steps: int | None = setting(
        None, "sampling steps of the workflow (default: those of the student's run)"
    )
    overwrite: bool = setting(False, "replace existing files (default: off)")


def read_settings(arguments: Sequence[str] | None = None) -> tuple[Settings, Path, dict[str, Any]]:
    """Read and check the command line without importing torch; returns the settings, the folder and its run.json."""
    parser = make_parser(Settings, __doc__)
    parser.prog = "wanlite-export"
    parser.usage = "wanlite-export [options] DIR"
    parser.add_argument("model", metavar="DIR", help="folder of a saved student, or its name on the hub")
    values = vars(parser.parse_args(arguments))
    model = values.pop("model")
    try:
        folder = student_folder(model)
        settings, run = complete(Settings(**values), folder)
    except (OSError, ValueError) as error:
        parser.error(explain(error))
    return settings, folder, run


def complete(settings: Settings, folder: Path) -> tuple[Settings, dict[str, Any]]:
    """Complete settings from the saved run; raises OSError or ValueError for a student that cannot be exported."""
    with open_student(folder) as (config, files):
        num_values = sum(math.prod(entry.shape) for file in files for entry in file.entries.values())
    dtype, run = choose_dtype(settings), read_run(folder)
    if settings.format == "comfyui":
        check_text_encoder(run, folder)
        check_runnable(config, folder)
    else:
        gguf.check_library()
    schedule = recorded_schedule(run, folder / RUN)
    read_schedule(folder, schedule)
    defaults = sampling_defaults(run)
    given = settings.num_inference_steps
    steps = defaults["num_inference_steps"] if given is None else given
    if type(steps) is not int or not 0 < steps <= TIMESTEPS:
        raise ValueError(
            f"--num_inference_steps is {shorten(steps)}, expected a whole number from 1 to {TIMESTEPS}."
        )
    check_steps(steps, schedule, folder, "--num_inference_steps")
    output = Path(settings.output or f"{folder.resolve().name}{SUFFIXES[settings.format]}")
    check_output(output, settings.overwrite, settings.format)
    check_space(output.absolute().parent, BYTES_PER_VALUE[STORED.get(dtype, "BF16")] * num_values)
    return replace(settings, output=str(output), dtype=dtype, num_inference_steps=steps), run


def choose_dtype(settings: Settings) -> str:
    """Return --dtype, by default that of the format; raises ValueError for one that the format lacks."""
    dtypes = DTYPES[settings.format]
    if settings.dtype is not None and settings.dtype not in dtypes:
        raise ValueError(
            f"--dtype {settings.dtype}: --format {settings.format} has {', '.join(dtypes)}. Choose one of these."
        )
    return settings.dtype or dtypes[0]


def small_parts_of(run: dict[str, Any]) -> list[str]:
    """Return the names of the small parts in the folder of a run.json."""
    parts = run.get("parts")
    figures = parts.get("figures") if isinstance(parts, dict) else None
    found = figures if isinstance(figures, dict) else {}
    return [name.replace("_", " ") for name in found if name in ("text_encoder", "decoder")]


def check_text_encoder(run: dict[str, Any], folder: Path) -> None:
    """Raise ValueError for a student that reads a small text encoder, which ComfyUI does not have."""
    if "text encoder" in small_parts_of(run):
        raise ValueError(
            f"{folder}: ComfyUI cannot run this student: it reads a small text encoder, and ComfyUI has UMT5-XXL. "
            "Export the student that it was made from, with the large one."
        )


def check_output(output: Path, is_replaced: bool, kind: str) -> None:
    """Raise OSError or ValueError for a path that cannot be written, or that exists."""
    if output.suffix != SUFFIXES[kind]:
        raise ValueError(f"--output {output}: expected a name that ends with {SUFFIXES[kind]}.")
    if not output.absolute().parent.is_dir():
        raise OSError(f"--output {output}: no folder {output.absolute().parent}. Create it, or name another.")
    if not os.access(output.absolute().parent, os.W_OK | os.X_OK):
        raise OSError(f"--output {output}: {output.absolute().parent} cannot be written to. Name another.")
    for path in (output, output.with_suffix(WORKFLOW_SUFFIX))[: 2 if kind == "comfyui" else 1]:
        if path.is_dir() or (path.exists() and not is_replaced):
            raise OSError(f"{path}: exists. Name another --output, or add --overwrite for a file.")


def levels_of(folder: Path, run: dict[str, Any], counts: Sequence[int]) -> dict[int, list[float]]:
    """Return {number of steps: noise levels} of a saved student's scheduler, from about 1 to 0."""
    from diffusers import UniPCMultistepScheduler

    from ..flow import check_schedule

    scheduler: Any = UniPCMultistepScheduler(**read_schedule(folder, recorded_schedule(run, folder / RUN)))
    levels = {}
    for count in counts:
        check_schedule(scheduler, count)
        levels[count] = scheduler.sigmas.tolist()
    return levels


def describe(levels: dict[int, list[float]], num_channels: int) -> str:
    """Return the text of the workflow's note: the files to download, and the levels of each number of steps."""
    files = (TEXT_ENCODER, AUTOENCODERS[num_channels])
    lines = ["Download into ComfyUI's models folder:"]
    lines += [f"  {file.folder}/{file.name}\n  {file.url}" for file in files]
    lines += ["", "Noise levels for ManualSigmas, by the number of steps:"]
    return "\n".join(
        [*lines, *(f"  {count}: {', '.join(map(format_level, levels[count]))}" for count in levels)]
    )


def export_gguf(settings: Settings, folder: Path) -> Path:
    """Write the weights as a GGUF file; returns its path."""
    from train_distillation import WanLiteStudent

    student, output = WanLiteStudent.from_pretrained(folder), Path(str(settings.output))
    with replacing(output) as partial:
        gguf.write_gguf(partial, student.state_dict(), str(settings.dtype), output.stem)
    return output


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which takes the name `output` if it is complete."""
    partial = output.with_name(f".{output.name}.{uuid4().hex}.partial")
    try:
        yield partial
        flush(partial)
        os.replace(partial, output)
    except OSError as error:  # of a full disk; it names no file
        raise OSError(f"{output}: cannot be written ({error.strerror or error}). Free some space.") from None
    finally:
        partial.unlink(missing_ok=True)


def export(settings: Settings, folder: Path, run: dict[str, Any]) -> tuple[Path, Path]:
    """Write the weights and the workflow; returns their paths."""
    from train_distillation import WanLiteStudent

    from ..student.saving import write_weights
    from .comfyui import comfyui_tensors

    student, loaded = WanLiteStudent.from_pretrained(folder, sha256=None, output_loading_info=True)
    output, defaults = Path(str(settings.output)), sampling_defaults(run)
    steps, few_steps = (
        settings.num_inference_steps or 0,
        recorded_schedule(run, folder / RUN).get("few_steps"),
    )
    levels = levels_of(folder, run, sorted({steps, *(few_steps or ())}, reverse=True))
    prompt = first_prompt(run)
    check_text(prompt, f"{folder / RUN}: a validation prompt")
    drawing = Drawing(defaults["width"], defaults["height"], levels[steps], prompt, bool(few_steps))
    workflow = make_workflow(
        output.name, student.config.num_channels, drawing, describe(levels, student.config.num_channels)
    )
    with replacing(output) as partial:
        write_weights(
            partial,
            comfyui_tensors(student.state_dict(), str(settings.dtype)),
            metadata_of(output.stem, drawing, levels),
        )
    write_json(output.with_suffix(WORKFLOW_SUFFIX), workflow)
    return output, output.with_suffix(WORKFLOW_SUFFIX)


def first_prompt(run: dict[str, Any]) -> str:
    """Return the first validation prompt of a run, or else PROMPT."""
    found = run.get("validation_prompts")
    prompt = found[0] if isinstance(found, list) and found else None
    return prompt if isinstance(prompt, str) and prompt.strip() else PROMPT


def metadata_of(title: str, drawing: Drawing, levels: dict[int, list[float]]) -> dict[str, str]:
    """Return the metadata of the file, whose first names are those of the modelspec standard."""
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "wan2.1",
        "modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI",
        "modelspec.title": title,
        "modelspec.resolution": f"{drawing.width}x{drawing.height}",
        "modelspec.prediction_type": "flow",
        **{f"wanlite.sigmas.{count}": ", ".join(map(format_level, each)) for count, each in levels.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a refusal is one line with exit code 2."""
    settings, folder, run = read_settings(arguments)
    workflow = None
    try:
        if settings.format == "gguf":
            output = export_gguf(settings, folder)
        else:
            output, workflow = export(settings, folder, run)
    except EXPLAINED as error:
        print_error("wanlite-export", error)
        sys.exit(EXIT_CODE)
    place = "models/diffusion_models" if workflow else "diffusers' from_single_file"
    print(f"wrote {output} ({output.stat().st_size / 1e6:,.1f} MB, {settings.dtype}), for {place}")
    if small := small_parts_of(run):
        print(f"the file holds the student alone; its small {' and '.join(small)} stay in {folder}")
    if workflow:
        print(f"wrote {workflow}: open it in ComfyUI 0.8 or newer; its note lists the files to download")


if __name__ == "__main__":
    keep_output_open()
    main()
