"""A LoRA in a folder, a file or a dict -> its matrices under diffusers' names, checked and scaled.

A file on this machine is read once, as safetensors; its settings decide a scale and nothing else.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, safe_open
from torch import Tensor

from ..files.dtypes import find_non_finite
from ..files.inside import plain_name
from ..files.json_files import DOWNLOADED, parse_json, shorten, shown
from ..runtime.terminal import one_line
from ..teacher.headers import read_header

FILE = "pytorch_lora_weights.safetensors"
SETTINGS = "lora_adapter_metadata"  # key of a header; peft's settings as JSON
COMPONENT = "transformer."  # first letters of the names of the student's matrices, and of its settings
FIRST, SECOND = ".lora_A.weight", ".lora_B.weight"
PLACE = ("weight_name", "subfolder")  # options for a folder
HUB = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "use_safetensors")
MAX_REASON = 300  # characters of a library's message


def read_lora(pipeline: Any, source: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """Return {diffusers' name: tensor} of a LoRA; removes the options that choose a file from `options`.

    Raises OSError for a file that cannot be read, and ValueError for one that is not a LoRA.
    """
    chosen = {name: options.pop(name) for name in (*PLACE, *HUB) if name in options}
    name = "the LoRA" if isinstance(source, Mapping) else source
    found, settings = dict(source) if isinstance(source, Mapping) else source, None
    if not isinstance(source, Mapping) and Path(source).exists():
        found, settings = _read_file(
            _find_file(Path(source), **{key: chosen.pop(key, None) for key in PLACE})
        )
    with lora_errors(name):
        chosen |= {"use_safetensors": True, "return_lora_metadata": True}  # pickles are never opened
        tensors, downloaded = pipeline.lora_state_dict(found, **chosen)
    _check_tensors(tensors, name)
    scaled = _scale(tensors, settings or downloaded or {}, name)
    if wrong := find_non_finite({key: tensor.float() for key, tensor in scaled.items()}):
        raise ValueError(f"{name}: {shown(wrong[0])} holds NaN or infinity. Download it again.")
    return scaled


@contextmanager
def lora_errors(name: object) -> Iterator[None]:
    """Turn an error of a library about a LoRA into one line that names it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = one_line(" ".join(str(error).split()), MAX_REASON)
        raise ValueError(
            f"{name}: cannot be used as a LoRA ({reason or type(error).__name__}). Choose another."
        ) from None


def _find_file(source: Path, weight_name: str | None, subfolder: str | None) -> Path:
    """Return the file of a LoRA in a folder: the named one, that of diffusers, or its only one."""
    if source.is_file() or not source.is_dir():
        return source
    folder = source / (subfolder or "")
    if weight_name:
        return folder / plain_name(weight_name, "weight_name")
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if FILE in names or len(names) == 1:
        return folder / (FILE if FILE in names else names[0])
    raise OSError(
        f"{folder}: has {len(names)} safetensors files, expected {FILE} or a single one. Pass its weight_name; pickles "
        "are never opened."
    )


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the settings of a file, in memory: a loaded LoRA does not change with it."""
    read_header(path)  # bounds the header, and refuses other files by their first bytes
    with lora_errors(path):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(SETTINGS, "{}")
    return tensors, parse_json(text.encode(errors="surrogatepass"), f"{path}, {SETTINGS}", DOWNLOADED)


# ---- checks ------------------------------------------------------------------------------------------------


def _check_tensors(tensors: Mapping[str, Tensor], name: object) -> None:
    """Raise ValueError for tensors that are not pairs of matrices; diffusers would ignore some, and fail at others."""
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(COMPONENT)}
    if not any(key.endswith(FIRST) for key in own):
        raise ValueError(f"{name}: holds no matrices of a LoRA for a Wan transformer. Choose another.")
    for key, tensor in own.items():
        if "lora_magnitude_vector" in key or "lora" not in key:
            raise ValueError(f"{name}: holds {shown(key)}, which is not a plain LoRA. Choose another.")
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name}: {shown(key)} is of {tensor.dtype}, expected floating point. Choose another."
            )
    for key in (
        each.removesuffix(FIRST).removesuffix(SECOND) for each in own if each.endswith((FIRST, SECOND))
    ):
        shapes = [tuple(own[key + side].shape) if key + side in own else None for side in (FIRST, SECOND)]
        if not (shapes[0] and shapes[1] and len(shapes[1]) > 1 and 0 < shapes[0][0] == shapes[1][1]):
            raise ValueError(
                f"{name}: the matrices of {shown(key)} are {shapes[0]} and {shapes[1]}, expected two of the same rank. "
                "Download it again."
            )


def _scale(tensors: Mapping[str, Tensor], settings: Any, name: object) -> dict[str, Tensor]:
    """Return tensors whose product is the change of a weight, by the alpha and rank of peft's settings."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"{name}: {SETTINGS} is {shorten(settings)}, expected an object. Download it again.")
    own = {key.removeprefix(COMPONENT): value for key, value in settings.items() if key.startswith(COMPONENT)}
    ranks = {matrix.shape[1] for key, matrix in tensors.items() if key.endswith(SECOND)}
    if own.get("use_dora"):
        raise ValueError(f"{name}: use_dora is set, and DoRA is not a plain LoRA. Choose another.")
    if (rank := own.get("r")) is not None and rank not in ranks:
        raise ValueError(
            f"{name}: r is {shorten(rank)}, and its matrices have other ranks. Download it again."
        )
    if "lora_alpha" not in own:
        return dict(tensors)
    alphas = {"": own["lora_alpha"]} | _pattern(own, "alpha_pattern", name)
    if not all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas.values()):
        raise ValueError(
            f"{name}: lora_alpha is {shorten([*alphas.values()])}, expected numbers. Download it again."
        )
    scaled = dict(tensors)
    for key, matrix in tensors.items():
        if key.startswith(COMPONENT) and key.endswith(SECOND):
            layer = key.removeprefix(COMPONENT).removesuffix(SECOND)
            alpha = next(
                (alphas[end] for end in alphas if end and f".{layer}".endswith(f".{end}")), alphas[""]
            )
            rank = matrix.shape[1]
            factor = alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)
            scaled[key] = (matrix.float() * factor).to(matrix.dtype)
    return scaled


def _pattern(settings, key, name):
    """Return {end of a layer's name: value} of peft's settings, which peft reads as regular expressions."""
    found = settings.get(key) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}: {key} is {shorten(found)}, expected an object. Download it again.")
    return {end.removeprefix("^"): value for end, value in found.items()}
