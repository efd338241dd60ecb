"""A saved student's config.json, under our names, Wan's or both -> the student's checked arguments. No torch."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.json_files import SAVED, read_json
from .layout import CONFIG_NAME, find_file, listing, short, some

CLASS_NAMES = ("WanLiteStudent", "WanTransformer3DModel")  # of older saves; of ours and of stock diffusers'
CONFIG_LIMITS = SAVED._replace(max_bytes=65536)  # a student's has 700
MAX_SIZE = 65536
MAX_POSITIONS = 16384  # rotary tables are built from the config alone: no weights limit their size
OUR_NAMES = ("hidden_size", "depth", "num_heads", "num_channels")  # for settings that have a name in Wan too
STOCK_SETTINGS = {  # of a stock Wan: under our names, or unused in one frame
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
    path = find_file(folder, CONFIG_NAME)
    if path is None:
        raise OSError(f"{folder}: no {CONFIG_NAME}. Expected a saved student; found {listing(folder)}.")
    config = read_json(path, CONFIG_LIMITS)
    found = config.get("_class_name", CLASS_NAMES[0])
    if found not in CLASS_NAMES:
        raise ValueError(f"{path}: is the config of a {short(found)}, expected {' or '.join(CLASS_NAMES)}.")
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
                f"{name} is {short(config[name])}, but under its Wan names {short(value)}. Keep one of them."
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
            "config.json has a teacher_checkpoint_path; it is ignored: loading never projects.", stacklevel=4
        )
    if ignored := sorted(config.keys() - defaults.keys() - STOCK_SETTINGS):
        warnings.warn(
            f"config.json has settings that a student does not have; they are ignored: {some(ignored)}.",
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
    """Refuse a shape that a student cannot have, naming the setting."""
    check_sizes(sizes)
    if not isinstance(patch_size, (tuple, list)) or len(patch_size) != 3 or patch_size[0] != 1:
        raise ValueError(
            f"patch_size is {short(patch_size)}, expected (1, height, width): a student has single frames."
        )
    check_sizes({f"patch_size[{axis}]": size for axis, size in enumerate(patch_size)})
    if type(eps) is not float or not 0 < eps < 1:
        raise ValueError(f"eps is {short(eps)}, expected a small positive number such as 1e-6.")
    if type(cross_attn_norm) is not bool or qk_norm != "rms_norm_across_heads":
        raise ValueError(
            f"cross_attn_norm is {short(cross_attn_norm)} and qk_norm {short(qk_norm)}, expected true or false "
            f"and rms_norm_across_heads, as in every Wan."
        )
    if sizes.get("rope_max_seq_len", 0) > MAX_POSITIONS:
        raise ValueError(
            f"rope_max_seq_len is {sizes['rope_max_seq_len']}, expected at most {MAX_POSITIONS}."
        )
    hidden_size, num_heads = sizes["hidden_size"], sizes["num_heads"]
    if hidden_size % num_heads or hidden_size // num_heads % 2:
        raise ValueError(
            f"hidden_size {hidden_size} over {num_heads} heads is {hidden_size / num_heads:g} channels a head, "
            f"expected an even whole number, as rotary pairs need: choose another --num_heads."
        )
    if sizes.get("freq_dim", 0) % 2:
        raise ValueError(f"freq_dim is {sizes['freq_dim']}, expected an even number: sines and cosines.")


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Refuse values, {name: size}, that cannot be the size of a layer."""
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size <= MAX_SIZE:
            raise ValueError(f"{name} is {short(size)}, expected a whole number from 1 to {MAX_SIZE}.")
