"""The folder of a run, or a name on the hub -> the components of a pipeline, checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import PipelineQuantizationConfig, UniPCMultistepScheduler

from train_distillation import WanLiteStudent

from ..data.autoencoder import load_video_autoencoder
from ..data.text_encoder import load_text_encoder
from ..files.file_names import COMPONENTS, RUN, SCHEDULER_CONFIG
from ..files.json_files import read_json
from ..schedule import SCHEDULER, read_schedule, recorded_schedule
from ..training.run_folder import check_saved_components, read_run

FILES = ("scheduler/*.json", "tokenizer/*", RUN) + tuple(  # on the hub, beside the student
    f"{component}/*.{ending}" for component in ("text_encoder", "vae") for ending in ("json", "safetensors")
)
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")  # arguments of a download
STOCK = ("device_map", "quantization_config", "variant")  # with these, diffusers loads the other components


def add_components(
    folder: Path, dtypes: Mapping[str, Any], sha256: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """Add the components of a folder to `options`, those of diffusers' from_pretrained(); returns run.json's content.

    Components that were passed are kept; diffusers loads those beside the student if an option is of that.
    """
    if not options.keys() & {"scheduler", *COMPONENTS}:
        check_saved_components(folder)
    record = read_run(folder)
    options.setdefault("scheduler", load_scheduler(folder, recorded_schedule(record, folder / RUN)))
    has_variants = find_variants(folder, options.get("variant"))
    if "transformer" not in options:
        options["transformer"] = load_student(folder, dtypes["transformer"], sha256, options)
    if not has_variants:
        options.pop("variant", None)  # that of the student alone
    if any(options.get(name) is not None for name in STOCK):
        options["torch_dtype"] = dtypes
    else:
        load_components(folder, dtypes, options)
    return record


def component_dtypes(dtype: Any) -> dict[str, Any]:
    """Return {component: dtype or None for the saved one} of a `dtype` argument."""
    if isinstance(dtype, Mapping):
        default = dtype.get("default", torch.float32)
        return {"transformer": default, "text_encoder": default, "vae": default} | dict(dtype)
    return {"transformer": dtype, "text_encoder": None, "vae": torch.float32}


def load_scheduler(folder: Path, schedule: dict[str, Any]) -> Any:
    """Return the scheduler of a student, checked against the `schedule` of its training.

    Another class of scheduler for flow matching, which a pipeline was saved with, loads unchecked.
    """
    config = read_json(folder / "scheduler" / SCHEDULER_CONFIG)
    name = str(config.get("_class_name"))
    is_flow = "FlowMatch" in name or config.get("use_flow_sigmas") is True
    if name != SCHEDULER and is_flow and hasattr(getattr(diffusers, name, None), "set_timesteps"):
        return getattr(diffusers, name).from_pretrained(folder / "scheduler", local_files_only=True)
    return UniPCMultistepScheduler(**read_schedule(folder, schedule))


def find_variants(folder: Path, variant: str | None) -> bool:
    """Whether components beside the student have weights of a variant; raises ValueError if no weights are of it."""
    if variant is None:
        return False
    files = [path for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}.safetensors")]
    names = [path.parent.name for path in files if f".{variant}" in path.name]
    if not names:
        raise ValueError(
            f"You are trying to load the model files of the `variant={variant}`, but no such modeling files are "
            f"available in {folder}."
        )
    return bool({*names} & {*COMPONENTS})


def load_student(folder: Path, dtype: Any, sha256: Any, options: Mapping[str, Any]) -> WanLiteStudent:
    """Load the student of a folder; `options` are those of the pipeline that apply to it."""
    device = options.get("device_map")
    passed = {
        name: options[name] for name in ("variant", "use_safetensors", "disable_mmap") if name in options
    }
    config = options.get("quantization_config")
    if isinstance(config, PipelineQuantizationConfig):  # diffusers refuses others
        passed["quantization_config"] = config._resolve_quant_config(True, "transformer")
    return WanLiteStudent.from_pretrained(
        folder, dtype=dtype, device=None if device == "balanced" else device, sha256=sha256, **passed
    )


def load_components(folder: Path, dtypes: Mapping[str, Any], options: dict[str, Any]) -> None:
    """Add text encoder, tokenizer and autoencoder to `options`, checked, unless they were passed."""
    if not options.keys() & {"text_encoder", "tokenizer"}:
        options["tokenizer"], options["text_encoder"] = load_text_encoder(
            folder, "cpu", dtypes["text_encoder"]
        )
    if "vae" not in options:
        # The method of diffusers would warn of its list of layers in float32, which is empty here.
        options["vae"] = torch.nn.Module.to(load_video_autoencoder(folder).eval(), dtypes["vae"])


def place_student(pipeline: Any) -> None:
    """Move the student to its device of a device map; diffusers places the components that it loads only."""
    places = getattr(pipeline, "hf_device_map", None)
    if isinstance(places, dict) and "transformer" in places:
        pipeline.transformer.to(places["transformer"])
