"""The folder of a run, or a name on the hub -> the components of a pipeline, checked."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from diffusers import PipelineQuantizationConfig, UniPCMultistepScheduler

from train_distillation import WanLiteStudent

from ..data.autoencoder import load_video_autoencoder
from ..data.component_files import check_manifest, loading_errors
from ..data.text_encoder import check_vocabulary, load_text_encoder, load_tokenizer
from ..files.file_names import COMPONENT_WEIGHTS, COMPONENTS, CONFIG, MODEL_INDEX, RUN, SCHEDULER_CONFIG
from ..files.inside import resolve_inside
from ..files.json_files import DOWNLOADED, read_json, shorten, shown
from ..runtime.devices import as_dtype
from ..schedule import SCHEDULER, read_schedule, recorded_schedule
from ..student.digest import check_digest, model_digest
from ..teacher.components import check_weights, count_embedded, known_settings
from ..training.run_folder import PIPELINE, check_saved_components, read_run

FILES = ("scheduler/*.json", "tokenizer/*", RUN) + tuple(  # on the hub, beside the student
    f"{component}/*.{ending}" for component in ("text_encoder", "vae") for ending in ("json", "safetensors")
)
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")  # arguments of a download
MAX_NUMBER = 10**5  # in the config of a scheduler: 1000 timesteps, shifts below 100
STOCK = ("device_map", "quantization_config", "variant")  # with these, diffusers loads the other components


def add_components(
    folder: Path, dtypes: Mapping[str, Any], sha256: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """Add the components of a folder to `options`, those of diffusers' from_pretrained(); returns run.json's content.

    Components that were passed are kept; diffusers loads text encoder and autoencoder if an option is of STOCK.
    """
    if not options.keys() & {"scheduler", *COMPONENTS}:
        check_saved_components(folder)
    record = read_run(folder)
    options.setdefault("scheduler", load_scheduler(folder, recorded_schedule(record, folder / RUN)))
    has_variants = find_variants(folder, options.get("variant"))
    if "transformer" not in options:
        options["transformer"] = load_student(folder, dtypes["transformer"], sha256, options)
    elif sha256 is not None:
        raise ValueError("sha256 is that of the folder's student, and transformer is passed. Leave one out.")
    if not has_variants:
        options.pop("variant", None)  # that of the student alone
    if _is_stock(options):
        options["dtype"] = dtypes
        if not options.keys() & {"text_encoder", "tokenizer"}:
            options["tokenizer"] = load_tokenizer(folder / "tokenizer")
            check_vocabulary(options["tokenizer"], folder, count_embedded(folder / "text_encoder"))
    else:
        load_components(folder, dtypes, options)
    return record


def _is_stock(options):
    return any(options.get(name) is not None for name in STOCK)


@contextmanager
def pipeline_folder(folder: Path, options: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a folder for diffusers' from_pretrained(), with the `options` of add_components().

    It has a model_index.json of this class. If diffusers loads text encoder and autoencoder, it has checked links to
    their weights and configs of known settings: nothing in the folder of a model chooses code, an attention kernel, a
    quantizer or a download.
    """
    with TemporaryDirectory(prefix="wanlite-", ignore_cleanup_errors=True) as name:
        place = Path(name)
        (place / MODEL_INDEX).write_text(json.dumps(PIPELINE))
        if _is_stock(options):
            for component in COMPONENT_WEIGHTS.keys() - options.keys():
                _link_component(component, folder, place, options.get("variant"))
            if options.get("transformer") is not None:  # a device map is computed from its config
                (place / "transformer").mkdir()
                (place / "transformer" / CONFIG).write_text(options["transformer"].to_json_string())
        yield place


def _link_component(component, folder, place, variant):
    source, target = folder / component, place / component
    check_manifest(source)
    check_weights(component, source, variant)
    target.mkdir()
    config = read_json(source / CONFIG, DOWNLOADED)
    names = ("dtype", "torch_dtype", "architectures")
    kept: dict[str, Any] = {name: config[name] for name in names if name in config}
    kept |= known_settings(component, config)
    kept |= {"model_type": "umt5"} if component == "text_encoder" else {"_class_name": "AutoencoderKLWan"}
    (target / CONFIG).write_text(json.dumps(kept))
    stem = COMPONENT_WEIGHTS[component].removesuffix("safetensors")
    for path in source.iterdir():
        if path.name.startswith(stem[:-1]) and path.suffix in (".safetensors", ".json"):
            (target / path.name).symlink_to(resolve_inside(folder, f"{component}/{path.name}").resolve())


def component_dtypes(dtype: Any) -> dict[str, Any]:
    """Return {component: dtype or None for the saved one} of a `dtype` argument."""
    if isinstance(dtype, Mapping):
        given = {
            name: value if isinstance(value, torch.dtype) else as_dtype(value)
            for name, value in dtype.items()
        }
        default = given.get("default", torch.float32)
        return {"transformer": default, "text_encoder": default, "vae": default} | given
    return {"transformer": dtype, "text_encoder": None, "vae": torch.float32}


def load_scheduler(folder: Path, schedule: dict[str, Any]) -> Any:
    """Return the scheduler of a student, checked against the `schedule` of its training.

    Another class of scheduler for flow matching, which a pipeline was saved with, loads unchecked.
    """
    config = read_json(folder / "scheduler" / SCHEDULER_CONFIG)
    name = str(config.get("_class_name"))
    is_flow = "FlowMatch" in name or config.get("use_flow_sigmas") is True
    if name != SCHEDULER and is_flow and hasattr(getattr(diffusers, name, None), "set_timesteps"):
        with loading_errors(folder / "scheduler"):
            _check_numbers(config)
            return getattr(diffusers, name).from_pretrained(folder / "scheduler", local_files_only=True)
    return UniPCMultistepScheduler(**read_schedule(folder, schedule))


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Refuse a scheduler that would make tables of gigabytes."""
    for name, value in config.items():
        if isinstance(value, (int, float)) and abs(value) > MAX_NUMBER:
            raise ValueError(f"{shown(name)} is {shorten(value)}, expected at most {MAX_NUMBER:,}")


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
    passed |= {"dtype": dtype, "device": None if device == "balanced" else device}
    if not isinstance(sha256, str):
        return WanLiteStudent.from_pretrained(folder, sha256=sha256, **passed)
    student, loaded = WanLiteStudent.from_pretrained(folder, output_loading_info=True, **passed)
    weights = loaded["sha256"]
    check_digest(sha256, " ".join(weights.values()), model_digest(folder, weights), folder)
    return student


def load_components(folder: Path, dtypes: Mapping[str, Any], options: dict[str, Any]) -> None:
    """Add text encoder, tokenizer and autoencoder to `options`, checked, unless they were passed."""
    if not {"text_encoder", "tokenizer"} <= options.keys():
        tokenizer, encoder = load_text_encoder(folder, "cpu", dtypes["text_encoder"])
        options.setdefault("tokenizer", tokenizer)
        options.setdefault("text_encoder", encoder)
    if "vae" not in options:
        # The method of diffusers would warn of its list of layers in float32, which is empty here.
        dtype = dtypes["vae"] or torch.float32
        options["vae"] = torch.nn.Module.to(load_video_autoencoder(folder).eval(), dtype)


def place_student(pipeline: Any) -> None:
    """Move the student to its device of a device map; diffusers places the components that it loads only."""
    places = getattr(pipeline, "hf_device_map", None)
    if isinstance(places, dict) and "transformer" in places:
        pipeline.transformer.to(places["transformer"])
