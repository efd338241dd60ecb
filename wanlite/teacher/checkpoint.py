"""A Wan folder -> its experts' files, checked by their headers.

Official, diffusers and ComfyUI layouts, both key dialects, two experts (A14B) or one (2.1, 5B); the result is in
diffusers' terms.
"""

import json
import os
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

from ..files.dtypes import BYTES_PER_VALUE
from ..files.file_names import CONFIG, MODEL_INDEX
from ..files.json_files import DOWNLOADED, read_json
from .expert_config import read_expert_config
from .expert_files import ExpertFiles, Place, TeacherFiles, open_mapped
from .headers import check_scale, read_header
from .keys import diffusers_name, is_scale, is_weight, scaled_weight, strip_wrappers
from .names import EXPERT_FOLDERS, EXPERT_PLACES, ONE_OF_TWO, SHARD, UNFINISHED
from .recognition import Network, recognize
from .search import describe_unsupported, list_names, visible, weights_by_depth

BOUNDARY = 0.875  # Wan2.2 A14B: noise levels from here on belong to the high-noise expert


def open_teacher_files(folder: str | Path) -> TeacherFiles:
    """Find the experts in a Wan folder and check their headers; of the tensors only fp8 scales are read.

    Raises OSError for missing and incomplete files and ValueError for files that are not a Wan of this kind.
    """
    folder = Path(os.path.expanduser(folder)).absolute()
    if not folder.is_dir():
        raise OSError(
            f"{folder}: no such folder. Expected a Wan checkpoint: transformer/ and transformer_2/ "
            "(diffusers), high_noise_model/ and low_noise_model/ (official), or diffusion_models/ (ComfyUI)."
        )
    index_path = folder / MODEL_INDEX
    index = read_json(index_path, DOWNLOADED) if index_path.exists() else {}
    for layout, (high, low) in EXPERT_FOLDERS.items():
        if (folder / high).is_dir() and (folder / low).is_dir():
            paths = {"high": folder / high, "low": folder / low}
            return _open_experts(folder, layout, paths, _read_boundary(index, index_path))
    _check_pairs(folder, index)
    (official, _), (diffusers, _) = EXPERT_FOLDERS.values()
    if (folder / diffusers / CONFIG).is_file():
        return _open_experts(folder, "diffusers", {"only": folder / diffusers})
    if single := _find_single_experts(folder):
        return _open_experts(folder, "ComfyUI", single, BOUNDARY if len(single) == 2 else None)
    if (folder / CONFIG).is_file():
        return _open_experts(folder, "official", {"only": folder})
    raise OSError(
        f"{folder}: no Wan transformer. Expected transformer/, {official}/ or diffusion_models/; "
        f"found {list_names(folder)}."
    )


def _open_experts(
    folder: Path, layout: str, paths: dict[str, Path], boundary: float | None = None
) -> TeacherFiles:
    experts = {name: _open_expert(name, path) for name, path in paths.items()}
    if len(experts) == 2:
        _check_same_size(folder, experts["high"], experts["low"])
    return TeacherFiles(folder, layout, experts, boundary)


def _read_boundary(index: dict[str, Any], path: Path) -> float:
    boundary = BOUNDARY if index.get("boundary_ratio") is None else index["boundary_ratio"]
    if isinstance(boundary, bool) or not isinstance(boundary, (int, float)) or not 0 <= boundary <= 1:
        raise ValueError(
            f"{path}: boundary_ratio is {boundary!r}, expected a noise level from 0 to 1; A14B has {BOUNDARY}."
        )
    return float(boundary)


def _check_same_size(folder: Path, high: ExpertFiles, low: ExpertFiles) -> None:
    differences = [
        f"{name} {value} and {low.config.get(name)}"
        for name, value in high.config.items()
        if value != low.config.get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder}: {high.folder.name} and {low.folder.name} differ in size ({', '.join(differences)}): they "
            "are experts of two teachers. Download the folder again."
        )


def _check_pairs(folder: Path, index: dict[str, Any]) -> None:
    """Refuse a folder with one expert of two, by its index or by the folder of the other."""
    promised = [
        name
        for name in EXPERT_FOLDERS["diffusers"]
        if index.get(name) not in (None, [], [None], [None, None])
    ]
    official = EXPERT_FOLDERS["official"]
    is_official = any((folder / name).is_dir() for name in official)
    for name in (*promised, *(official if is_official else ())):
        if not (folder / name).is_dir():
            raise OSError(
                f"{folder}: {name}/ is missing, the other expert is there. Download the folder again."
            )


# ---- ComfyUI's single files --------------------------------------------------------------------------------


def _find_single_experts(folder: Path) -> dict[str, Path]:
    """Return {expert: file} of ComfyUI's single files in a folder, or {} if there are none.

    A file is recognized by its tensors, and as one of two experts by its name; deeper files come last. Raises
    OSError for one expert without the other and ValueError for an ambiguous choice and for other Wans.
    """
    others = []
    for paths in weights_by_depth(folder, EXPERT_PLACES):
        experts: dict[str, Path] = {}
        for path in (path for path in paths if not SHARD.search(path.name)):
            network = recognize(path)
            if isinstance(network, Network) and network.kind == "expert":
                _add_expert(experts, path, folder)
            elif isinstance(network, str):
                others.append(f"{path.name} is {network}")
        if experts:
            return _complete_pair(experts, folder)
    if others:
        raise ValueError(
            f"{folder}: no text-to-video Wan: {', '.join(others[:4])}. Choose a text-to-video Wan."
        )
    return {}


def _add_expert(experts: dict[str, Path], path: Path, folder: Path) -> None:
    names = (
        name
        for part in reversed(path.relative_to(folder).parts)
        for name, pattern in ONE_OF_TWO.items()
        if pattern.search(part)
    )
    name = next(names, "only")
    if name in experts or (experts and "only" in (name, *experts)):
        raise ValueError(
            f"{folder}: both {next(iter(experts.values())).name} and {path.name} are text-to-video Wans, "
            "expected one, or the high_noise and the low_noise one of a pair, in one precision. Put the files of "
            "one teacher into a folder of their own (links will do) and name that. Two experts are distinguished "
            "by high and low, high_noise and low_noise, or hn and ln in their names."
        )
    experts[name] = path


def _complete_pair(experts: dict[str, Path], folder: Path) -> dict[str, Path]:
    if len(experts) == 1 and "only" not in experts:
        ((name, path),) = experts.items()
        other = "low" if name == "high" else "high"
        found = describe_unsupported(
            path for path in path.parent.iterdir() if ONE_OF_TWO[other].search(path.name)
        )
        raise OSError(
            f"{folder}: {path.name} is one of two experts, and there is no {other}_noise file in "
            f"{path.parent}{f'; {found}' if found else '. Download it into that folder.'}"
        )
    return dict(sorted(experts.items()))


# ---- one expert --------------------------------------------------------------------------------------------


def _open_expert(name: str, folder: Path) -> ExpertFiles:
    """Read an expert's headers; `folder` may be its single file."""
    promised = _read_index(folder)
    paths = _find_weight_files(folder, promised)
    names = strip_wrappers([key for path in paths for key in read_header(path)], folder)
    places: dict[str, Place] = {}
    scales: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            _add_places(path, names, places)
            scales |= _read_scales(path, names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    _check_index(folder, promised, places)
    config = read_expert_config(folder, places)
    if config["in_channels"] != config["out_channels"]:
        raise ValueError(
            f"{folder}: has {config['in_channels']} channels in and {config['out_channels']} out, as an "
            "image-to-video or control Wan. Expected equal numbers: choose a text-to-video Wan."
        )
    _check_shapes(folder, config, places)
    return ExpertFiles(name, folder, config, places, _expand_scales(folder, scales, places))


def _add_places(path: Path, names: dict[str, str], places: dict[str, Place]) -> None:
    """Add the place of each weight in a file to `places`."""
    for key, stored in read_header(path).items():
        if not is_weight(names[key]):
            continue
        name = diffusers_name(names[key])
        if name in places:
            raise ValueError(
                f"{key} occurs in {places[name][0].name} and in {path.name}. Keep the files of one download, in "
                "one precision."
            )
        if stored.dtype not in BYTES_PER_VALUE:
            raise ValueError(
                f"{key} is stored as {stored.dtype}, expected one of {', '.join(BYTES_PER_VALUE)}. Choose a "
                "download in one of these."
            )
        places[name] = (path, key, stored.shape)


def _read_scales(path: Path, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return a file's fp8 scales, which are small, by diffusers' name of their weight."""
    keys = [key for key in read_header(path) if is_scale(names[key])]
    if not keys:
        return {}
    with open_mapped(path) as file:
        return {diffusers_name(scaled_weight(names[key])): file.get_tensor(key) for key in keys}


def _expand_scales(
    folder: Path, scales: dict[str, torch.Tensor], places: dict[str, Place]
) -> dict[str, torch.Tensor]:
    """Give each row of a scaled weight its scale; returns {diffusers' name: (rows, 1, ...) in float32}."""
    expanded = {}
    for name, scale in scales.items():
        if name not in places:
            raise ValueError(
                f"{folder}: there is a scale of {name} but no such weight. Download the expert again."
            )
        rows, *others = places[name][2]
        check_scale(scale, name, rows, folder)
        ones = [1] * len(others)
        expanded[name] = scale.float().reshape(-1, *ones).expand(rows, *ones)
    return expanded


def _check_index(folder: Path, promised: dict[str, str], places: dict[str, Place]) -> None:
    held = {stored_name for _, stored_name, _ in places.values()}
    if missing := sorted(key for key in promised if is_weight(key) and key not in held):
        raise ValueError(
            f"{folder}: the index promises {missing[0]} in {promised[missing[0]]}, no shard holds it "
            f"({len(missing)} in all). Index and shards are of two downloads: download the expert again."
        )


def _check_shapes(folder: Path, config: dict[str, Any], places: dict[str, Place]) -> None:
    source = f"its {CONFIG}" if folder.is_dir() else "its first block"
    depth = len({name.split(".")[1] for name in places if name.startswith("blocks.")})
    if config["num_layers"] > depth:  # checked before the network is built
        raise ValueError(
            f"{folder}: {source} has {config['num_layers']} blocks, the files {depth}. A shard is absent or of another Wan: "
            "download the expert again."
        )
    expected = _implied_shapes(json.dumps(config))
    missing, unknown = sorted(expected.keys() - places.keys()), sorted(places.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{folder}: tensors differ from those that {source} implies; missing {missing[:3]} ({len(missing)}), "
            f"unknown {unknown[:3]} ({len(unknown)}). A shard is absent or of another Wan: download the expert "
            "again."
        )
    for key, (path, _, shape) in places.items():
        if shape != expected[key]:
            raise ValueError(
                f"{path}: {key} is {shape}, {source} implies {expected[key]}. The shard is of another Wan."
            )


@cache
def _implied_shapes(config: str) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the Wan that a config, as JSON, describes."""
    with init_empty_weights():
        network: Any = WanTransformer3DModel(**json.loads(config))
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


# ---- the files of one expert -------------------------------------------------------------------------------


def _read_index(folder: Path) -> dict[str, str]:
    """Return an index's {tensor: shard}, or {} if there is no index."""
    indexes = visible(folder.glob("*.safetensors.index.json"))
    if not indexes:
        return {}
    weight_map = read_json(indexes[0], DOWNLOADED).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{indexes[0]}: has no weight_map, expected tensor names and their shards. Download it again."
        )
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{indexes[0]}: names the shard {name!r}, expected a file beside it.")
    return weight_map


def _find_weight_files(folder: Path, promised: dict[str, str]) -> list[Path]:
    """Return an expert's safetensors files: those that the index or their own numbers promise, or the only one."""
    _check_finished(folder)
    if folder.is_file():
        return [folder]
    names = {path.name for path in visible(folder.glob("*.safetensors"))}
    if not names and not promised:
        found = describe_unsupported(folder.iterdir())
        raise OSError(
            f"{folder}: holds no .safetensors file; "
            f"{found or 'expected an expert in it. Download the expert again.'}"
        )
    wanted = set(promised.values()) or {
        sibling for name in _without_variants(folder, names) for sibling in (name, *_siblings(name))
    }
    if missing := sorted(wanted - names):
        raise OSError(
            f"{folder}: shard {missing[0]} is missing, its index or its siblings promise it ({len(missing)} of "
            f"{len(wanted)} are missing). Download it again."
        )
    return [folder / name for name in sorted(wanted)]


def _check_finished(folder: Path) -> None:
    """Refuse an expert whose download is in progress, or was cut short."""
    if folder.is_file():
        if found := [suffix for suffix in UNFINISHED if Path(f"{folder}{suffix}").exists()]:
            raise OSError(
                f"{folder}{found[0]}: an unfinished download. Let it finish, or delete this file if the other is "
                "complete."
            )
    elif names := [path.name for path in visible(folder.glob("*")) if path.suffix in UNFINISHED]:
        raise OSError(
            f"{folder}: {names[0]} is an unfinished download. Download the expert again, or delete this file if "
            "all others are complete."
        )


def _without_variants(folder: Path, names: set[str]) -> set[str]:
    """Return the files that diffusers reads by default, as x.safetensors beside x.fp16.safetensors."""
    plain = {name for name in names if "." not in name.removesuffix(".safetensors")}
    if plain and plain != names:
        warnings.warn(
            f"{folder}: {', '.join(sorted(plain))} is read; left out: {', '.join(sorted(names - plain))}.",
            stacklevel=2,
        )
    return plain or names


def _siblings(name: str) -> list[str]:
    """Return the names of all shards that a shard's own name (-00002-of-00006) promises."""
    match = re.search(r"-(\d{5})-of-(\d{5})", name)
    if match is None:
        return []
    return [name.replace(match[0], f"-{number + 1:05d}-of-{match[2]}") for number in range(int(match[2]))]
