"""Weights files of a saved student: their names, expected tensors and digests, without importing torch.

Legend: D width, F width inside the feed-forward, T text width.
"""

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..files.file_names import CONFIG, WEIGHTS
from ..files.json_files import read_json, shorten
from ..files.weights import WeightsFile
from ..teacher.keys import names_inside_wrapper
from .layout import (
    MAX_LISTED,
    STAGE_PREFIX,
    WEIGHTS_STEM,
    check_variant,
    find_file,
    index_name,
    join_names,
    list_names,
    variant_infix,
    weight_names,
)

MAX_SHARDS = 1000  # open at the same time
MAX_MISSING = 7  # missing tensors that are collected for a message
SHARD = r"-\d{5}-of-\d{5}"
Shape = tuple[int, ...]


# ---- files -------------------------------------------------------------------------------------------------


def find_weights(folder: Path, variant: str | None = None) -> dict[Path, set[str] | None]:
    """Return {path: None} of a single weights file, or {path: names of its tensors} of all shards in the index."""
    check_variant(variant)
    infix = variant_infix(variant)
    names = weight_names(infix)
    index_file = index_name(infix)
    found = next((path for name in names if (path := find_file(folder, name))), None)
    index = find_file(folder, index_file)
    if found and not (index and _is_stock_newer(folder, index, found)):
        return {found: None}
    if index:
        return {_shard(folder, name, index): tensors for name, tensors in _read_index(index)}
    raise OSError(
        f"Error no file named {WEIGHTS_STEM}.bin found in directory {folder}, nor any of {', '.join(names)} and "
        f"{index_file}, which are expected; found {list_names(folder)}. Pickles are never opened.{_variants(folder)}"
    )


def _is_stock_newer(folder, index, weights):
    """Whether stock diffusers saved shards beside an older single file, which it keeps but no longer reads.

    Shards of stock have no mark in their names, and a save of ours removes them.
    """
    try:
        shards = [name for name, _ in _read_index(index)]
    except OSError:  # a broken index names no shards
        return False
    is_stock = all(
        re.fullmatch(rf"{WEIGHTS_STEM}(\.[\w-]+)?{SHARD}\.safetensors", name) and (folder / name).exists()
        for name in shards
    )
    if is_newer := is_stock and not any(folder.glob(f"{STAGE_PREFIX}*")):
        warnings.warn(
            f"{folder}: holds {weights.name} beside {len(shards)} shards; the shards are read, as in stock "
            f"diffusers. Remove {weights.name} if it is older.",
            stacklevel=3,
        )
    return is_newer


def _variants(folder):
    """Return a hint if weights of variants exist, else an empty text."""
    pattern = re.compile(rf"{WEIGHTS_STEM}\.([\w-]+?)({SHARD})?\.safetensors")
    matches = (pattern.fullmatch(path.name) for path in islice(folder.iterdir(), MAX_LISTED))
    if not (found := sorted({match[1] for match in matches if match})):
        return ""
    return f" Variants exist: name one of {join_names(found)}, or rename it to {WEIGHTS}."


def _read_index(path) -> list[tuple[str, set[str]]]:
    """Return [(shard, names of its tensors)] of an index, sorted."""
    weight_map = read_json(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise OSError(f"{path}: has no weight_map of tensor names to file names. Save the student again.")
    if (count := len(set(weight_map.values()))) > MAX_SHARDS:
        raise OSError(
            f"{path}: names {count:,} shards, expected at most {MAX_SHARDS:,}. Save the student again."
        )
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    return sorted(shards.items())


def _shard(folder, name, index):
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors", name):
        raise OSError(
            f"{index}: names a shard {shorten(name)}, expected safetensors files beside it. Pickles are never "
            f"opened."
        )
    path = find_file(folder, name)
    if path is None:
        raise OSError(
            f"{index}: names a shard {name} that is missing. Copy the folder again; found {list_names(folder)}."
        )
    return path


# ---- tensors -----------------------------------------------------------------------------------------------


def check_weights(files: Sequence[WeightsFile], arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if headers differ from the student's arguments, OSError if the weights exceed the memory."""
    source = files[0].path if len(files) == 1 else f"{files[0].path.parent}, {len(files)} shards"
    found = {name: entry.shape for file in files for name, entry in file.entries.items()}
    shapes, depth = tensor_shapes(arguments), arguments["depth"]
    _check_names(found, shapes, depth, source)
    for name, shape in found.items():
        if shape != (expected := _expected_shape(name, shapes, depth)):
            raise ValueError(
                f"{source}: {name} is {shape}, but {CONFIG} implies {expected}. Config and weights belong "
                f"to two students: copy both from one save."
            )
    size = sum(file.num_bytes for file in files)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise OSError(
            f"{source}: holds {size / 1e9:,.0f} GB, this machine has {memory / 1e9:,.0f} GB. Load it on a larger "
            f"one."
        )


def _check_names(found, shapes, depth, source):
    outside, inside = shapes
    unknown = sorted(name for name in found if _expected_shape(name, shapes, depth) is None)
    # A config may have any depth; a block with a missing tensor is among the first len(found) + 1.
    blocks = range(min(depth, len(found) + 1))
    names = (*outside, *(f"blocks.{block}.{name}" for block in blocks for name in inside))
    missing = list(islice((name for name in names if name not in found), MAX_MISSING))
    if not missing and not unknown:
        return
    unwrapped = names_inside_wrapper(found) or {""}
    is_wrapped = len(unwrapped) == len(outside) + depth * len(inside) and all(
        _expected_shape(name, shapes, depth) for name in unwrapped
    )
    if is_wrapped:
        raise ValueError(
            f"{source}: the keys are those of this student inside a wrapper, such as {shorten(unknown[0])}. Only the "
            "prefixes of a wrapper differ: save the model inside the wrapper."
        )
    raise ValueError(
        f"{source}: keys differ from those that {CONFIG} implies. Missing: {join_names(missing)}; unknown: "
        f"{join_names(unknown)}. The weights belong to another model or were renamed."
    )


def _expected_shape(name, shapes, depth) -> Shape | None:
    """Return the shape of a student's tensor, None for an unknown name."""
    outside, inside = shapes
    if match := re.fullmatch(r"blocks\.(0|[1-9]\d{0,5})\.(.+)", name):
        return inside.get(match[2]) if int(match[1]) < depth else None
    return outside.get(name)


def tensor_shapes(arguments: Mapping[str, Any]) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return ({name: shape} outside the blocks, {name in a block: shape}) of a student with these arguments."""
    width, ffn_dim = arguments["hidden_size"], arguments["ffn_dim"]
    channels, patch = arguments["num_channels"], tuple(arguments["patch_size"])
    attentions, layers = ("attn1", "attn2"), ("to_q", "to_k", "to_v", "to_out.0")
    inside = _linears(
        {f"{name}.{layer}": (width, width) for name in attentions for layer in layers}
        | {"ffn.net.0.proj": (ffn_dim, width), "ffn.net.2": (width, ffn_dim)}
    )
    inside |= {f"{name}.norm_{kind}.weight": (width,) for name in attentions for kind in "qk"}
    inside |= {"scale_shift_table": (1, 6, width)}
    if arguments["cross_attn_norm"]:
        inside |= {f"norm2.{kind}": (width,) for kind in ("weight", "bias")}
    outside = _linears(
        {
            "patch_embedding": (width, channels, *patch),
            "proj_out": (channels * math.prod(patch), width),
            "condition_embedder.time_embedder.linear_1": (width, arguments["freq_dim"]),
            "condition_embedder.time_embedder.linear_2": (width, width),
            "condition_embedder.time_proj": (6 * width, width),
            "condition_embedder.text_embedder.linear_1": (width, arguments["text_dim"]),
            "condition_embedder.text_embedder.linear_2": (width, width),
        }
    )
    return outside | {"scale_shift_table": (1, 2, width)}, inside


def all_tensor_shapes(arguments: Mapping[str, Any]) -> dict[str, Shape]:
    """Return {name: shape} of all tensors of a student with these arguments."""
    outside, inside = tensor_shapes(arguments)
    return outside | {
        f"blocks.{block}.{name}": shape
        for block in range(arguments["depth"])
        for name, shape in inside.items()
    }


def _linears(weights):
    return {
        f"{name}.{kind}": shape if kind == "weight" else shape[:1]
        for name, shape in weights.items()
        for kind in ("weight", "bias")
    }


# ---- digests -----------------------------------------------------------------------------------------------


def pinned_hashes(
    files: Sequence[WeightsFile], sha256: str | Mapping[str, str] | None
) -> Mapping[str, str] | None:
    """Return {file name: expected digest}, or None if `sha256` is None."""
    if sha256 is None:
        return None
    pinned = {files[0].path.name: sha256} if isinstance(sha256, str) and len(files) == 1 else sha256
    names = [file.path.name for file in files]
    if not isinstance(pinned, dict) or pinned.keys() != set(names):
        raise ValueError(
            f"sha256 is {shorten(sha256)}, expected a digest for each of {join_names(names)}: {{name: digest}}."
        )
    return pinned


def check_hashes(files: Sequence[WeightsFile], pinned: Mapping[str, str] | None) -> None:
    """Raise ValueError if the weights that were read differ from their pinned digests."""
    if pinned is None:
        return
    for file in files:
        if file.sha256 != str(pinned[file.path.name]).lower():
            raise ValueError(
                f"{file.path}: sha256 is {file.sha256}, expected {shorten(pinned[file.path.name])}. These are not "
                f"the pinned weights."
            )
