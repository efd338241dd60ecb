"""A student's config and tensors -> its folder. Saves are atomic.

A save is staged in a hidden folder and flushed; its list of files is written last. If the process is killed
after that, the next save completes it. Renaming the weights publishes the student, because weights carry their
config; config.json is renamed afterwards.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ..files.atomic import check_space, flush, write_json
from ..files.dtypes import find_non_finite
from ..files.file_names import CONFIG
from ..files.inside import plain_name
from ..files.json_files import read_json
from ..files.locks import locked
from .checksums import make_checksum
from .layout import STAGE_PREFIX, WEIGHTS_STEM, index_name, variant_infix, weight_names
from .weights import SHARD, Shape

FILE_LIST = "files.json"  # files and variant of a staged save
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
STORED = DTYPES | {torch.float8_e4m3fn: "F8_E4M3"}  # a student itself is never in float8
ALIGNED = 64  # bytes of a cache line
COMPILED = "_orig_mod."  # prefix that torch.compile adds to the names of a module's tensors
OTHER_LAYER = "another layer than a student's"
ADVICE = {  # {change that was found in a layer: how to save the student}
    "an adapter": "Fuse it into the weights (fuse_lora, then unload_lora), or save it alone "
    "(save_lora_adapter).",
    "quantised weights": "Save the student before it is quantised, and quantise it after loading.",
    "a parametrization": "Remove the parametrization; its result stays as the layer's weights.",
    "weights sharded over devices": "Gather their tensors first.",
    "offloaded weights": "Remove the offloading hooks first (accelerate.hooks.remove_hook_from_module with "
    "recurse=True).",
    "weights of another dtype": "Convert the student to float32, float16 or bfloat16 first.",
    OTHER_LAYER: "Put the student's own layers back, or load it again.",
}
PATTERNS = {  # {change: pattern of tensor names}; other changes are found in the tensors
    "an adapter": r"\.(base_layer|lora_\w+|lokr_\w+)\.",
    "a parametrization": r"\.(parametrizations|weight_(?:orig|mask|g|v))\b",
    "quantised weights": r"\.(weight\.\w+|weight_scale|input_scale|output_scale|SCB|qweight|_packed_params|zero_point|scale)\b",
}


# ---- checks ------------------------------------------------------------------------------------------------


def strip_compiled_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return {name: tensor} without the prefixes of torch.compile."""
    return {name.replace(COMPILED, ""): tensor for name, tensor in tensors.items()}


def check_savable(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], place: str | os.PathLike
) -> None:
    """Raise ValueError for tensors that from_pretrained would refuse; `shapes` is {name: shape} of the student."""
    changed: dict[str, dict[str, str]] = {}  # {change: {layer: evidence}}
    for name in sorted(tensors.keys() | shapes.keys()):
        if change := _find_change(name, tensors.get(name), shapes.get(name)):
            changed.setdefault(change[0], {}).setdefault(*change[1:])
    if len(changed) > 1:  # other changes rename layers
        changed.pop(OTHER_LAYER, None)
    if changed:
        raise ValueError(
            f"{place}: not saved, found {'; '.join(starmap(_describe, changed.items()))}. "
            f"{' '.join(ADVICE[change] for change in changed)}"
        )
    if non_finite := find_non_finite(tensors):
        raise ValueError(
            f"{place}: not saved, {len(non_finite)} tensors hold NaN or infinity, first {non_finite[0]}. "
            "Return to an earlier checkpoint and lower the learning rate."
        )


def _describe(change, layers):
    layer, evidence = next(iter(layers.items()))
    more = f" and in {len(layers) - 1} more layers" if len(layers) > 1 else ""
    return f"{change} in {layer} ({evidence}){more}"


def _find_change(name, tensor, shape) -> tuple[str, str, str] | None:
    """Return (change, layer, evidence) of a tensor, None for a student's own tensor."""
    for change, pattern in PATTERNS.items():
        if match := re.search(pattern, name):
            return change, name[: match.start()], match[1]
    layer = name.rpartition(".")[0] or name
    if tensor is None or shape is None:
        return OTHER_LAYER, layer, f"{name} is {'missing' if tensor is None else 'unknown'}"
    # Some devices have their own tensor types.
    if type(tensor) is not torch.Tensor and type(tensor.cpu()) is not torch.Tensor:
        kind = type(tensor).__name__
        return "weights sharded over devices" if kind == "DTensor" else "quantised weights", layer, kind
    if tensor.is_meta:
        return "offloaded weights", layer, "on device meta"
    if tensor.dtype not in DTYPES:
        is_quantised = tensor.dtype.itemsize == 1
        change = "quantised weights" if is_quantised else "weights of another dtype"
        return change, layer, str(tensor.dtype)
    if tuple(tensor.shape) != shape or tensor.layout is not torch.strided:
        return OTHER_LAYER, layer, f"{name} is {tuple(tensor.shape)} {tensor.layout}, expected {shape}"
    return None


# ---- writing -----------------------------------------------------------------------------------------------


def save_student(
    folder: str | os.PathLike,
    config: str,
    tensors: Mapping[str, Tensor],
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Write a student into `folder`, in shards of at most `max_shard_size`.

    `config` is JSON text. Earlier weights of this variant are removed. Raises OSError if the disk is too small;
    the earlier student is then kept.
    """
    folder = Path(folder)
    infix = variant_infix(variant)
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(
        dict(tensors),
        max_shard_size=max_shard_size,
        filename_pattern=f"{WEIGHTS_STEM}{infix}{{suffix}}.safetensors",
    )
    mark = (
        f"-{os.urandom(4).hex()}" if split.is_sharded else ""
    )  # so that new shards never overwrite old ones
    files = {_marked(name, mark): shard for name, shard in split.filename_to_tensors.items()}
    settings = {name: value for name, value in json.loads(config).items() if name[0] != "_"}
    metadata = {"config": json.dumps(settings, sort_keys=True), "format": "pt"}
    with _staged(folder) as stage:
        check_space(folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        (stage / CONFIG).write_text(config, encoding="utf-8")
        for file, shard in files.items():
            part = {name: tensors[name] for name in shard}
            write_weights(stage / file, part, metadata | make_checksum(part))
        index = [index_name(infix)] if split.is_sharded else []
        for name in index:
            _write_index(stage / name, split, mark)
        for path in stage.iterdir():
            flush(path)
        write_json(stage / FILE_LIST, {"files": [*files, *index], "infix": infix})
        with locked(folder):
            _publish(stage, folder)


def _write_index(path, split, mark):
    """Write the index of a student in shards, whose names contain `mark`."""
    weight_map = {name: _marked(file, mark) for name, file in split.tensor_to_filename.items()}
    content = json.dumps({"metadata": split.metadata, "weight_map": weight_map}, indent=2)
    path.write_text(content + "\n")


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write {name: tensor} as safetensors; the same tensors give the same bytes, aligned as in torch's memory.

    The library's writer orders metadata at random and aligns tensors to 8 bytes only; results that stock loaders
    compute with weights mapped from such a file differ in the last bit.
    """
    # Tensors of an odd size come last, so that the others stay aligned.
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNED != 0, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": STORED[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // ALIGNED) * ALIGNED - 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].detach().cpu().flatten().view(torch.uint8).numpy().data)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder for the files of a save, which is removed afterwards.

    Saves of killed processes are completed or removed first; a running save holds the lock of its folder.
    """
    with ExitStack() as locks:
        with locked(folder):
            for leftover in sorted(folder.glob(f"{STAGE_PREFIX}*")):
                _finish(leftover, folder)
            stage = folder / f"{STAGE_PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
            stage.mkdir()
            locks.enter_context(locked(stage))
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _finish(stage, folder):
    """Complete or remove a save, unless its process is running."""
    with suppress(FileNotFoundError), locked(stage, wait=False) as is_leftover:  # it may end at this moment
        if is_leftover and (stage / FILE_LIST).is_file():
            _publish(stage, folder)
        if is_leftover:
            shutil.rmtree(stage, ignore_errors=True)


def _publish(stage, folder):
    """Move staged files into place in an order that is valid for readers, and remove those of the older save."""
    listed = read_json(stage / FILE_LIST)
    names, infix = [plain_name(name, stage / FILE_LIST) for name in listed["files"]], str(listed["infix"])
    for name in names:  # shards before the index that names them
        _move(stage / name, folder / name)
    for name in weight_names(infix):
        if name not in names:  # readers prefer a single file to an index
            (folder / name).unlink(missing_ok=True)
    _move(stage / CONFIG, folder / CONFIG)
    older = re.compile(rf"{WEIGHTS_STEM}{re.escape(infix)}(-[0-9a-f]{{8}})?{SHARD}\.safetensors")
    for path in list(folder.iterdir()):
        is_older = older.fullmatch(path.name) or path.name == index_name(infix)
        if is_older and path.name not in names:
            path.unlink()
    flush(folder)


def _move(source, target):
    if source.exists():  # otherwise, a killed save moved it
        os.replace(source, target)


def _marked(name, mark):
    """Return the name of a shard with `mark` before its number."""
    return re.sub(rf"({SHARD}\.safetensors)$", rf"{mark}\1", name)
