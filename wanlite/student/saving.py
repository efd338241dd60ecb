"""A student's config and tensors -> its folder, so that a reader finds the old student or the new one, never
a mixture.

A save is staged in a hidden folder and flushed; its list of files is written last, and from then on it will
happen: the next save finishes what a killed one began. Renaming the weights is the moment at which the new
student is there, for they carry their config; config.json follows.
"""

import json
import os
import re
import shutil
from contextlib import ExitStack, contextmanager, suppress
from itertools import starmap
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from ..files.atomic import check_space, flush, write_json
from ..files.dtypes import find_non_finite
from ..files.locks import locked

STEM = "diffusion_pytorch_model"
CONFIG_NAME = "config.json"
LIST = "files.json"  # of a staged save, with what it replaces
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNED = 64  # bytes of a cache line
COMPILED = "_orig_mod."  # in the names of a module's tensors where torch.compile has wrapped it
CHANGES = {  # what was found in a layer -> what can be saved instead
    "an adapter": "Fuse it into the weights (fuse_lora, then unload_lora), or save it alone "
    "(save_lora_adapter).",
    "quantised weights": "Save the student before it is quantised, and quantise it after loading.",
    "a parametrization": "Remove the parametrization; its result stays as the layer's weights.",
    "weights sharded over devices": "Gather their tensors first.",
    "offloaded weights": "Remove the hooks that offload it first (accelerate.hooks.remove_hook_from_module "
    "with recurse=True).",
    "weights of another dtype": "Convert the student to float32, float16 or bfloat16 first.",
    "another layer than a student's": "Put the student's own layers back, or load it again.",
}
SIGNS = {  # how it shows in the names of tensors; else it shows in the tensors
    "an adapter": r"\.(base_layer|lora_\w+|lokr_\w+)\.",
    "a parametrization": r"\.(parametrizations|weight_(?:orig|mask|g|v))\b",
    "quantised weights": r"\.(weight\.\w+|weight_scale|input_scale|output_scale|SCB|qweight|_packed_params|zero_point|scale)\b",
}


def plain_names(tensors):
    """Return {name: tensor} of modules that torch.compile has wrapped under the names that they have without
    it.
    """
    return {name.replace(COMPILED, ""): tensor for name, tensor in tensors.items()}


def check_savable(tensors, shapes, place):
    """Refuse to save what from_pretrained would refuse to load: `shapes` is {name: shape} of what belongs to
    the student.
    """
    changed: dict[str, dict[str, str]] = {}  # what was found: {layer: how it shows}
    for name in sorted(tensors.keys() | shapes.keys()):
        if change := _find_change(name, tensors.get(name), shapes.get(name)):
            changed.setdefault(change[0], {}).setdefault(*change[1:])
    if len(changed) > 1:  # names that went with another change
        changed.pop("another layer than a student's", None)
    if changed:
        raise ValueError(
            f"{place}: not saved, found {'; '.join(starmap(_describe, changed.items()))}. "
            f"{' '.join(CHANGES[change] for change in changed)}"
        )
    if broken := find_non_finite(tensors):
        raise ValueError(
            f"{place}: not saved, {len(broken)} tensors hold NaN or infinity, first {broken[0]}. Go back to "
            f"an "
            "earlier checkpoint and lower the learning rate."
        )


def _describe(change, signs):
    layer, sign = next(iter(signs.items()))
    return f"{change} in {layer} ({sign})" + (
        f" and in {len(signs) - 1} more layers" if len(signs) > 1 else ""
    )


def _find_change(name, tensor, shape):
    """Return what was found in the layer of a tensor, the layer, and how it shows; None for a tensor as a
    student has it.
    """
    for change, pattern in SIGNS.items():
        if match := re.search(pattern, name):
            return change, name[: match.start()], match[1]
    layer = name.rpartition(".")[0] or name
    if tensor is None or shape is None:
        return (
            "another layer than a student's",
            layer,
            f"{name} is {'missing' if tensor is None else 'unknown'}",
        )
    if (
        type(tensor) is not torch.Tensor and type(tensor.cpu()) is not torch.Tensor
    ):  # a backend may have a type of its own
        kind = type(tensor).__name__
        return "weights sharded over devices" if kind == "DTensor" else "quantised weights", layer, kind
    if tensor.is_meta:
        return "offloaded weights", layer, "on device meta"
    if tensor.dtype not in DTYPES:
        return (
            "quantised weights" if tensor.dtype.itemsize == 1 else "weights of another dtype",
            layer,
            str(tensor.dtype),
        )
    if tuple(tensor.shape) != shape or tensor.layout is not torch.strided:
        return (
            "another layer than a student's",
            layer,
            f"{name} is {tuple(tensor.shape)} {tensor.layout}, expected {shape}",
        )
    return None


def save_student(folder, config, tensors, variant=None, max_shard_size="10GB"):
    """Write a student into `folder`, in shards where it is larger than `max_shard_size`; earlier weights of
    this variant go.

    `config` is JSON text. Raises OSError where it does not fit on the disk; the student that was there stays.
    """
    folder, infix = Path(folder), "" if variant is None else f".{variant}"
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(
        tensors, max_shard_size=max_shard_size, filename_pattern=f"{STEM}{infix}{{suffix}}.safetensors"
    )
    mark = f"-{os.urandom(4).hex()}" if split.is_sharded else ""  # new shards never overwrite old ones
    settings = json.dumps(
        {name: value for name, value in json.loads(config).items() if name[0] != "_"}, sort_keys=True
    )
    files = {_marked(name, mark): names for name, names in split.filename_to_tensors.items()}
    index = [f"{STEM}.safetensors.index{infix}.json"] if split.is_sharded else []
    with _staged(folder) as stage:
        check_space(folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        (stage / CONFIG_NAME).write_text(config, encoding="utf-8")
        for file, names in files.items():
            write_weights(
                stage / file, {name: tensors[name] for name in names}, {"config": settings, "format": "pt"}
            )
        for name in index:
            weight_map = {name: _marked(file, mark) for name, file in split.tensor_to_filename.items()}
            (stage / name).write_text(
                json.dumps({"metadata": split.metadata, "weight_map": weight_map}, indent=2) + "\n"
            )
        for path in stage.iterdir():
            flush(path)
        write_json(stage / LIST, {"files": [*files, *index], "infix": infix})
        with locked(folder):
            _publish(stage, folder)


def write_weights(path, tensors, metadata):
    """Write {name: tensor} as safetensors: the same tensors are the same bytes, and they lie in memory as
    torch would lay them.

    The library's own writer orders metadata at random and aligns to 8 bytes; mapped from there, weights are
    the same numbers and what is computed with them differs in the last bit.
    """
    names = sorted(
        tensors, key=lambda name: (tensors[name].nbytes % ALIGNED != 0, name)
    )  # no odd one moves those after it
    header, end = {"__metadata__": metadata}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // ALIGNED) * ALIGNED - 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].detach().cpu().flatten().view(torch.uint8).numpy())


@contextmanager
def _staged(folder):
    """Yield a hidden folder to write a save into, gone afterwards; what killed savers left is finished or
    removed first.

    A living saver holds the lock of its folder.
    """
    with ExitStack() as held:
        with locked(folder):
            for left in sorted(folder.glob(".saving-*")):
                with (
                    suppress(FileNotFoundError),
                    locked(left, wait=False) as is_left,
                ):  # its saver ends just now
                    if is_left and (left / LIST).is_file():
                        _publish(left, folder)
                    if is_left:
                        shutil.rmtree(left, ignore_errors=True)
            stage = folder / f".saving-{os.getpid()}-{os.urandom(4).hex()}"
            stage.mkdir()
            held.enter_context(locked(stage))
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _publish(stage, folder):
    """Move staged files into place in the order in which a reader may meet them, then remove what the older
    save left.
    """
    listed = json.loads((stage / LIST).read_text(encoding="utf-8"))
    names, infix = listed["files"], listed["infix"]
    for name in names:  # shards before the index that names them
        _move(stage / name, folder / name)
    for name in (f"{STEM}{infix}.safetensors", f"diffusion_model{infix}.safetensors"):
        if name not in names:
            (folder / name).unlink(
                missing_ok=True
            )  # it is read before an index: with it gone, the index counts
    _move(stage / CONFIG_NAME, folder / CONFIG_NAME)
    older = re.compile(rf"{STEM}{re.escape(infix)}(-[0-9a-f]{{8}})?-\d{{5}}-of-\d{{5}}\.safetensors")
    for path in list(folder.iterdir()):
        if path.name not in names and (
            older.fullmatch(path.name) or path.name == f"{STEM}.safetensors.index{infix}.json"
        ):
            path.unlink()
    flush(folder)


def _move(source, target):
    if source.exists():  # else a save that is finished for a killed one had moved it
        os.replace(source, target)


def _marked(name, mark):
    return re.sub(r"(-\d{5}-of-\d{5}\.safetensors)$", rf"{mark}\1", name)
