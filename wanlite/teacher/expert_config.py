"""An expert's config.json, of either dialect, or its shapes -> its config in diffusers' terms, checked."""

import math
from pathlib import Path
from typing import Any

from ..files.file_names import CONFIG
from ..files.json_files import DOWNLOADED, read_json
from .expert_files import Place
from .names import FIRST

HEAD_SIZE = 128  # of every published Wan; it does not follow from the shapes
_OFFICIAL_SIZES = ("dim", "num_heads", "in_dim", "out_dim", "freq_dim", "ffn_dim", "num_layers")
_DIFFUSERS_SIZES = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
    "rope_max_seq_len",
)
_SAME_IN_ALL = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
_MAX_SIZE = 2**20  # far above any Wan's; a network of this size on meta is created quickly
_MAX_SIZES = {"num_layers": 512, "attention_head_dim": 1024, "rope_max_seq_len": 16384}


def read_expert_config(folder: Path, places: dict[str, Place]) -> dict[str, Any]:
    """Return an expert's config in diffusers' terms; `folder` may be its single file, which has no config.json.

    Raises OSError for a missing file and ValueError for sizes that no Wan has.
    """
    shapes = {name: shape for name, (_, _, shape) in places.items()}
    path = folder / CONFIG if folder.is_dir() else folder
    if path != folder and not path.exists():
        raise OSError(f"{path}: missing. Download the folder again.")
    config: dict[str, Any] = _SAME_IN_ALL | (
        _sizes_of(folder, shapes) if path == folder else read_json(path, DOWNLOADED)
    )
    if not {"num_attention_heads", "attention_head_dim"} & config.keys():
        config |= _translate(path, config, shapes)
    _check_sizes(path, config, _DIFFUSERS_SIZES)
    _check_others(path, config)
    return {
        name: tuple(config[name]) if name == "patch_size" else config[name]
        for name in ("patch_size", *_DIFFUSERS_SIZES, *_SAME_IN_ALL)
    }


def _translate(path: Path, config: dict[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
    """Return an official config's sizes in diffusers' terms; two of them follow from the shapes alone."""
    _check_sizes(path, config, _OFFICIAL_SIZES)
    width, heads = config["dim"], config["num_heads"]
    if width % heads:
        raise ValueError(
            f"{path}: dim is {width}, expected a multiple of num_heads ({heads}). Download it again."
        )
    return {
        "patch_size": shapes.get(FIRST, (0, 0, 1, 2, 2))[2:],
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": config["in_dim"],
        "out_channels": config["out_dim"],
        "text_dim": shapes.get("condition_embedder.text_embedder.linear_1.weight", (0, 4096))[-1],
    }


def _check_sizes(path: Path, config: dict[str, Any], names: tuple[str, ...]) -> None:
    """Refuse impossible sizes before anything is computed with them."""
    if missing := [name for name in names if name not in config]:
        raise ValueError(
            f"{path}: lacks {', '.join(missing)}, expected the config of a Wan transformer. Download it again."
        )
    for name in names:
        size, most = config[name], _MAX_SIZES.get(name, _MAX_SIZE)
        if type(size) is not int or not 1 <= size <= most:
            raise ValueError(
                f"{path}: {name} is {size!r:.60}, expected a whole number from 1 to {most:,}. Download it again."
            )


def _check_others(path: Path, config: dict[str, Any]) -> None:
    """Refuse settings besides the sizes that no Wan has."""
    patch, eps, head = config.get("patch_size"), config["eps"], config["attention_head_dim"]
    is_patch = (
        isinstance(patch, (list, tuple))
        and len(patch) == 3
        and all(type(side) is int and 1 <= side <= 16 for side in patch)
    )
    same = [name for name in ("cross_attn_norm", "qk_norm") if config[name] != _SAME_IN_ALL[name]]
    for is_wrong, name, expected in (
        (not is_patch, "patch_size", "frames, height and width of a token, as [1, 2, 2]"),
        (type(eps) not in (int, float) or not 0 < eps < 1, "eps", "a number above 0 and below 1, as 1e-06"),
        (head % 2, "attention_head_dim", "an even number, because positions rotate channels in pairs"),
        *((True, name, f"{_SAME_IN_ALL[name]!r}, as in every Wan") for name in same),
    ):
        if is_wrong:
            raise ValueError(
                f"{path}: {name} is {config.get(name)!r:.60}, expected {expected}. Download it again."
            )


def _sizes_of(path: Path, shapes: dict[str, Any]) -> dict[str, int]:
    """Return a single file's sizes in the official terms: all but those of the heads follow from its shapes."""
    try:
        width, channels, *patch = shapes[FIRST]
        sizes = {
            "dim": width,
            "num_heads": width // HEAD_SIZE,
            "in_dim": channels,
            "out_dim": shapes["proj_out.weight"][0] // math.prod(patch),
            "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
            "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
            "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        }
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path}: lacks a tensor of every Wan, or its sizes ({error}). Download it again."
        ) from None
    if width % HEAD_SIZE:
        raise ValueError(
            f"{path}: has a width of {width}, expected a multiple of {HEAD_SIZE}, the head size of every "
            "Wan. Choose another layout of this teacher, which has a config.json."
        )
    return sizes
