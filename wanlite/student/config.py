"""A saved student's config.json, under our names, Wan's or both -> the student's checked arguments.

This module does not import torch, so that a wrong config is refused at once.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.file_names import CONFIG
from ..files.json_files import SAVED, read_json, shorten
from .layout import find_file, join_names, list_names

CLASS_NAMES = (
    "WanLiteStudent",
    "WanTransformer3DModel",
)  # in configs of earlier versions; of this one and of stock diffusers
CONFIG_LIMITS = SAVED._replace(max_bytes=65536, accepts_large=True)  # a student's config has 700 bytes
MAX_SIZE = 65536
MAX_POSITIONS = 16384  # of the rotary tables, whose size follows from the config alone
OUR_NAMES = ("hidden_size", "depth", "num_heads", "num_channels")  # of settings that Wan names differently
STOCK_SETTINGS = {  # of a stock Wan: known under our names, or unused by a single frame
    "out_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "image_dim",
    "added_kv_proj_dim",
    "pos_embed_seq_len",
}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config of a saved student."""
    path = find_file(folder, CONFIG)
    if path is None:
        raise OSError(f"{folder}: no {CONFIG}. Expected a saved student; found {list_names(folder)}.")
    config = read_json(path, CONFIG_LIMITS)
    found = config.get("_class_name", CLASS_NAMES[0])
    if found not in CLASS_NAMES:
        raise ValueError(f"{path}: is the config of a {shorten(found)}, expected {' or '.join(CLASS_NAMES)}.")
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{path}: has a quantization_config, expected weights in float32, float16 or bfloat16. Quantise "
            f"the student after loading it."
        )
    return config


def student_arguments(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the student's arguments from a config under our names, the Wan names, or both.

    `defaults` is {name: default} of every argument. Raises ValueError for contradictions.
    """
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    _warn_of_ignored(config, defaults)
    for name, value in _implied_sizes(config):
        if value is not None and config.setdefault(name, value) != value:
            raise ValueError(
                f"{name} is {shorten(config[name])}, but under its Wan names {shorten(value)}. Keep one of them."
            )
    arguments = {name: config.get(name, default) for name, default in defaults.items()}
    check_sizes({"hidden_size": arguments["hidden_size"]})
    if arguments["ffn_dim"] is None:
        arguments["ffn_dim"] = 4 * arguments["hidden_size"]
    check_shape(**arguments)
    return arguments


def _warn_of_ignored(config, defaults):
    if config.pop("teacher_checkpoint_path", None) is not None:
        warnings.warn(
            f"{CONFIG} has a teacher_checkpoint_path; it is ignored, because loading never projects.",
            stacklevel=4,
        )
    if ignored := sorted(config.keys() - defaults.keys() - STOCK_SETTINGS):
        warnings.warn(
            f"{CONFIG} has settings that a student does not have; they are ignored: {join_names(ignored)}.",
            stacklevel=4,
        )


def _implied_sizes(config):
    """Return [(our name, value)] of the settings under Wan's names."""
    implied = [
        ("depth", config.get("num_layers")),
        ("num_heads", config.get("num_attention_heads")),
        ("num_channels", config.get("in_channels")),
        ("num_channels", config.get("out_channels")),
    ]
    if "num_attention_heads" in config and "attention_head_dim" in config:
        heads = {name: config[name] for name in ("num_attention_heads", "attention_head_dim")}
        check_sizes(heads)
        implied.append(("hidden_size", math.prod(heads.values())))
    return implied


def check_shape(
    patch_size: Any,
    eps: Any,
    cross_attn_norm: Any = True,
    qk_norm: Any = "rms_norm_across_heads",
    **sizes: Any,
) -> None:
    """Raise ValueError for a shape that a student cannot have; the message names the setting."""
    check_sizes(sizes)
    if not isinstance(patch_size, (tuple, list)) or len(patch_size) != 3 or patch_size[0] != 1:
        raise ValueError(
            f"patch_size is {shorten(patch_size)}, expected (1, height, width) for single frames."
        )
    check_sizes({f"patch_size[{axis}]": size for axis, size in enumerate(patch_size)})
    if type(eps) is not float or not 0 < eps < 1:
        raise ValueError(f"eps is {shorten(eps)}, expected a small positive number such as 1e-6.")
    if type(cross_attn_norm) is not bool or qk_norm != "rms_norm_across_heads":
        raise ValueError(
            f"cross_attn_norm is {shorten(cross_attn_norm)} and qk_norm {shorten(qk_norm)}, expected true or false "
            f"and rms_norm_across_heads, as in every Wan."
        )
    if sizes.get("rope_max_seq_len", 0) > MAX_POSITIONS:
        raise ValueError(
            f"rope_max_seq_len is {sizes['rope_max_seq_len']}, expected at most {MAX_POSITIONS}."
        )
    hidden_size, num_heads = sizes["hidden_size"], sizes["num_heads"]
    if hidden_size % num_heads or hidden_size // num_heads % 2:
        raise ValueError(
            f"hidden_size {hidden_size} over {num_heads} heads is {hidden_size / num_heads:g} channels per "
            f"head, expected an even whole number for rotary pairs: choose another --num_heads."
        )
    if sizes.get("freq_dim", 0) % 2:
        raise ValueError(
            f"freq_dim is {sizes['freq_dim']}, expected an even number, for pairs of sine and cosine."
        )


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Raise ValueError for values, {name: size}, that cannot be the size of a layer."""
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size <= MAX_SIZE:
            raise ValueError(f"{name} is {shorten(size)}, expected a whole number from 1 to {MAX_SIZE}.")
