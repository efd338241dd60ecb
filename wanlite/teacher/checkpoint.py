"""A Wan folder -> its experts' tensors, checked by their headers and read one at a time.

Official, diffusers and ComfyUI layouts, both key dialects, two experts (A14B) or one (2.1, 5B); all is said
in diffusers' words.
"""

import hashlib
import json
import math
import os
import re
import warnings
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open

from ..files.atomic import (
    broken_safetensors,
    name_not_read,
    not_finite,
    open_regular,
    read_downloaded_json,
    unwrapped,
    visible,
    weights_by_depth,
)

BOUNDARY = 0.875  # Wan2.2 A14B: noise levels from here on belong to the high-noise expert

# Official name -> diffusers' name. The order matters: head.modulation before modulation. norm2 and norm3 are
# swapped.
_TO_DIFFUSERS = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^patch_embedding\.(weight|bias)$", r"patch_embedding.\1"),
        (r"^text_embedding\.0\.(weight|bias)$", r"condition_embedder.text_embedder.linear_1.\1"),
        (r"^text_embedding\.2\.(weight|bias)$", r"condition_embedder.text_embedder.linear_2.\1"),
        (r"^time_embedding\.0\.(weight|bias)$", r"condition_embedder.time_embedder.linear_1.\1"),
        (r"^time_embedding\.2\.(weight|bias)$", r"condition_embedder.time_embedder.linear_2.\1"),
        (r"^time_projection\.1\.(weight|bias)$", r"condition_embedder.time_proj.\1"),
        (r"^head\.modulation$", r"scale_shift_table"),
        (r"^head\.head\.(weight|bias)$", r"proj_out.\1"),
        (r"^blocks\.(\d+)\.modulation$", r"blocks.\1.scale_shift_table"),
        (r"^blocks\.(\d+)\.self_attn\.([qkv])\.(weight|bias)$", r"blocks.\1.attn1.to_\2.\3"),
        (r"^blocks\.(\d+)\.self_attn\.o\.(weight|bias)$", r"blocks.\1.attn1.to_out.0.\2"),
        (r"^blocks\.(\d+)\.cross_attn\.([qkv])\.(weight|bias)$", r"blocks.\1.attn2.to_\2.\3"),
        (r"^blocks\.(\d+)\.cross_attn\.o\.(weight|bias)$", r"blocks.\1.attn2.to_out.0.\2"),
        (r"^blocks\.(\d+)\.self_attn\.norm_([qk])\.weight$", r"blocks.\1.attn1.norm_\2.weight"),
        (r"^blocks\.(\d+)\.cross_attn\.norm_([qk])\.weight$", r"blocks.\1.attn2.norm_\2.weight"),
        (r"^blocks\.(\d+)\.norm3\.(weight|bias)$", r"blocks.\1.norm2.\2"),
        (r"^blocks\.(\d+)\.ffn\.0\.(weight|bias)$", r"blocks.\1.ffn.net.0.proj.\2"),
        (r"^blocks\.(\d+)\.ffn\.2\.(weight|bias)$", r"blocks.\1.ffn.net.2.\2"),
    )
]
_IS_DIFFUSERS = re.compile(
    r"^(patch_embedding|proj_out|condition_embedder\.(text|time)_embedder\.linear_[12]|condition_embedder\.time_proj"
    r"|blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|norm2|ffn\.net\.0\.proj|ffn\.net\.2))\.(weight|bias)$"
    r"|^blocks\.\d+\.attn[12]\.norm_[qk]\.weight$|^(blocks\.\d+\.)?scale_shift_table$"
)
_SINGLE_FILES = (
    "",
    "diffusion_models",
    "unet",
)  # where they lie: all in one folder, or in ComfyUI's models/, and deeper there
_ONE_OF_TWO = {
    name: re.compile(  # in the name of an expert's single file, or of its folder
        # _high_ HIGH-noise t2v_hn
        rf"(?:(?<![A-Za-z])|(?<=2[Vv]))(?i:{name}(?=[-_. ]?noise|[^a-z]|$)|{name[0]}n(?=[^a-z]|$))"
        rf"|(?<![A-Z]){word}(?![a-z])|{word}[-_. ]?(?i:noise)|(?<=[A-Z]){name}[-_. ]?(?i:noise)"
    )  # wan22High T2VHighNoise
    for name, word in (("high", "High"), ("low", "Low"))
}
_LAST = ("head.head.weight", "proj_out.weight")  # in either dialect
_ONE_OF_MANY = re.compile(
    r"^diffusion_pytorch_model|-\d{5}-of-\d{5}"
)  # in the name of what is no single file
_OFFICIAL_SIZES = (
    "dim",
    "num_heads",
    "in_dim",
    "out_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
)  # in a config.json
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
_MAX_SIZE = 2**20  # of a config: far above any Wan's, and a network without contents is still made in no time
_MOST = {"num_layers": 512, "attention_head_dim": 1024, "rope_max_seq_len": 16384}
HEAD_SIZE = 128  # of every Wan that was published; no tensor's shape tells it
_OTHER_WANS = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"img_emb|[kv]_img|image_embedder|add_[kv]_proj", "an image-to-video Wan"),
        (r"vace", "VACE"),
        (
            r"qweight|wscales|qzeros|quant_state|quant_map|\.absmax|smooth_factor|\.SCB|\._data|\.scales$",
            "a Wan in 4 or 8 bits: fp16, bf16 and scaled fp8 are read",
        ),
        (r"lora|lokr|hada_|\.diff(_b)?$", "a LoRA"),
        (r"audio|frame_packer|trainable_cond|cond_encoder", "a speech-to-video Wan"),
        (r"face_|motion_|pose_patch", "Wan Animate"),
        (r"control_adapter|ref_conv", "a Fun Control Wan"),
    )
]
_UNFINISHED = (
    ".incomplete",
    ".aria2",
    ".part",
    ".crdownload",
)  # what a download is called, or leaves beside it, until it ends
_DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_FP8_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's: value = X.weight * X.scale
_FP8_MARKS = (
    "scaled_fp8",
    "scale_input",
    "input_scale",
    "comfy_quant",
)  # for fp8 arithmetic: no part of a weight's value


def diffusers_name(name):
    """Return diffusers' name for a tensor of either dialect; raises ValueError for a name that no
    text-to-video Wan has.
    """
    for pattern, template in _TO_DIFFUSERS:
        if pattern.match(name):
            return pattern.sub(template, name)
    if _IS_DIFFUSERS.match(name):
        return name
    other = next((other for pattern, other in _OTHER_WANS if pattern.search(name)), "nothing known")
    raise ValueError(
        f"tensor {name!r} is no tensor of a text-to-video Wan transformer, in the official or in diffusers' "
        f"names "
        f"(it belongs to {other}). Choose a text-to-video Wan."
    )


@dataclass
class ExpertFiles:
    """One network on disk: its config in diffusers' words, and where each tensor lies."""

    name: str  # "high", "low", or "only"
    folder: Path  # or its single file
    config: dict
    places: dict = field(repr=False)  # diffusers' name -> (file, name in the file, shape)
    scales: dict = field(
        repr=False, default_factory=dict
    )  # of scaled fp8 weights: diffusers' name -> (rows, 1, ...)

    def read(self, name, dtype=torch.float32, rows=None):
        """Read one tensor by diffusers' name, or only the `rows` (a slice) of its first dimension; scales are
        multiplied in.

        Raises ValueError for values that are not finite.
        """
        path, stored_name, _ = self.places[name]
        with _mapped(path) as file:
            tensor = file.get_tensor(stored_name) if rows is None else file.get_slice(stored_name)[rows]
        if name in self.scales:
            tensor = tensor.float() * (self.scales[name] if rows is None else self.scales[name][rows])
        tensor = tensor.to(dtype)
        if not_finite({name: tensor}):
            raise ValueError(f"{self.folder}: {name} holds NaN or infinity. Download the expert again.")
        return tensor

    def shape(self, name):
        return self.places[name][2]

    @property
    def width(self):
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def num_parameters(self):
        return sum(torch.Size(shape).numel() for *_, shape in self.places.values())

    @property
    def num_bytes(self):
        return sum(path.stat().st_size for path in {path for path, *_ in self.places.values()})


def _mapped(path):
    """Open a safetensors file for its tensors, for which all of it is mapped, as private memory; its header
    costs nothing.
    """
    try:
        return safe_open(path, "pt")
    except RuntimeError as error:
        raise OSError(
            f"{path}: {path.stat().st_size / 1e9:,.1f} GB cannot be mapped into this machine's memory "
            f"({error}). Take "
            "the official or diffusers layout, whose shards are smaller, or add swap."
        ) from None


@dataclass
class TeacherFiles:
    """A Wan folder, read as far as its headers."""

    folder: Path
    layout: str  # "official", "diffusers" or "ComfyUI"
    experts: dict  # "high" and "low", or "only"
    boundary: float | None

    @property
    def config(self):
        return next(iter(self.experts.values())).config

    @property
    def width(self):
        return next(iter(self.experts.values())).width

    @property
    def num_parameters(self):
        return sum(expert.num_parameters for expert in self.experts.values())

    @cached_property
    def fingerprint(self):
        """A sha256 over every expert's files: the whole of a small one, 64 samples of a large one."""
        return sampled_digest(
            (expert.name, path)
            for expert in self.experts.values()
            for path in sorted({path for path, *_ in expert.places.values()})
        )


def sampled_digest(files):
    """Return a sha256 over (name, path) pairs: the whole of a small file, 64 samples of a large one."""
    digest = hashlib.sha256()
    for name, path in files:
        size = path.stat().st_size
        digest.update(f"{name} {path.name} {size}".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(1 << 20, size // 64)):
                file.seek(start)
                digest.update(file.read(1 << 20))
    return digest.hexdigest()


def open_teacher_files(folder):
    """Find the experts in a Wan folder and check their headers; no tensor but the scales of fp8 weights is
    read.

    Raises OSError for what is missing or cut short and ValueError for what belongs to no or to another Wan.
    """
    folder = Path(os.path.expanduser(folder)).absolute()
    if not folder.is_dir():
        raise OSError(
            f"{folder}: no such folder. Expected a Wan checkpoint: transformer/ and transformer_2/ "
            f"(diffusers), "
            "high_noise_model/ and low_noise_model/ (official), or diffusion_models/ (ComfyUI)."
        )
    index_path = folder / "model_index.json"
    index = _read_json(index_path) if index_path.exists() else {}
    pairs = {
        "official": ("high_noise_model", "low_noise_model"),
        "diffusers": ("transformer", "transformer_2"),
    }
    for layout, (high, low) in pairs.items():
        if (folder / high).is_dir() and (folder / low).is_dir():
            experts = {"high": _open_expert("high", folder / high), "low": _open_expert("low", folder / low)}
            _check_same_size(folder, *experts.values())
            return TeacherFiles(folder, layout, experts, _boundary(index, index_path))
    promised = [
        name
        for name in ("transformer", "transformer_2")
        if index.get(name) not in (None, [], [None], [None, None])
    ]
    lonely = [name for name in pairs["official"] if (folder / name).is_dir()]
    for name in (*promised, *(("high_noise_model", "low_noise_model") if lonely else ())):
        if not (folder / name).is_dir():
            raise OSError(
                f"{folder}: {name}/ is missing, the other expert is there. Download the folder again."
            )
    if (folder / "transformer" / "config.json").is_file():
        return TeacherFiles(folder, "diffusers", {"only": _open_expert("only", folder / "transformer")}, None)
    if single := _single_files(folder):
        experts = {name: _open_expert(name, path) for name, path in single.items()}
        if len(experts) == 2:
            _check_same_size(folder, *experts.values())
        return TeacherFiles(folder, "ComfyUI", experts, BOUNDARY if len(experts) == 2 else None)
    if (folder / "config.json").is_file():
        return TeacherFiles(folder, "official", {"only": _open_expert("only", folder)}, None)
    raise OSError(
        f"{folder}: no Wan transformer. Expected transformer/, high_noise_model/ or diffusion_models/; found "
        f"{', '.join(path.name for path in visible(folder.iterdir())[:8]) or 'nothing'}."
    )


def _single_files(folder):
    """Return {expert: file} of ComfyUI's single files in a folder, or nothing where there are none.

    A file is known by its tensors, and by its name which of two experts it is; those that lie deepest are
    looked at last. Raises OSError for one without the other and ValueError where the files leave open which
    are meant, or are of other Wans.
    """
    others = []
    for paths in weights_by_depth(folder, _SINGLE_FILES):
        experts = {}
        for path in (path for path in paths if not _ONE_OF_MANY.search(path.name)):
            if (kind := _kind_of(path)) == "a text-to-video Wan":
                _add_expert(experts, path, folder)
            elif kind:
                others.append(f"{path.name} is {kind}")
        if experts:
            return _pair_of(experts, folder)
    if others:
        raise ValueError(
            f"{folder}: no text-to-video Wan: {', '.join(others[:4])}. Choose a text-to-video Wan."
        )
    return {}


def _add_expert(experts, path, folder):
    names = (
        name
        for part in reversed(path.relative_to(folder).parts)
        for name, pattern in _ONE_OF_TWO.items()
        if pattern.search(part)
    )
    name = next(names, "only")
    if name in experts or (experts and "only" in (name, *experts)):
        raise ValueError(
            f"{folder}: both {next(iter(experts.values())).name} and {path.name} are text-to-video Wans, "
            f"expected "
            "one, or the high_noise and the low_noise one of a pair, in one precision. Put the files of one "
            "teacher "
            "into a folder of their own (links will do) and name that. Two experts are told apart by high "
            "and low, "
            "high_noise and low_noise, or hn and ln in their names."
        )
    experts[name] = path


def _pair_of(experts, folder):
    if len(experts) == 1 and "only" not in experts:
        ((name, path),) = experts.items()
        other = "low" if name == "high" else "high"
        found = name_not_read(path for path in path.parent.iterdir() if _ONE_OF_TWO[other].search(path.name))
        raise OSError(
            f"{folder}: {path.name} is one of two experts, and there is no {other}_noise file in "
            f"{path.parent}"
            f"{f'; {found}' if found else '. Download it into that folder.'}"
        )
    return dict(sorted(experts.items()))


def _kind_of(path):
    """Return in words which Wan a safetensors file holds, None where it holds none; raises OSError for half a
    file.
    """
    open_regular(path).close()
    try:
        with safe_open(path, "np") as file:
            keys = {name: key for key, name in unwrapped(file.keys(), path).items()}
            first, last = "patch_embedding.weight", next((name for name in _LAST if name in keys), None)
            if last and first in keys:
                (_, channels, *patch), (rows, _) = (
                    file.get_slice(keys[name]).get_shape() for name in (first, last)
                )
                return (
                    "a text-to-video Wan"
                    if rows == channels * math.prod(patch)
                    else "an image-to-video or control Wan "
                    f"(it takes {channels} channels and gives {rows // math.prod(patch)})"
                )
    except SafetensorError as error:
        raise broken_safetensors(path, error) from None
    return next((other for pattern, other in _OTHER_WANS if any(pattern.search(key) for key in keys)), None)


def _boundary(index, path):
    boundary = BOUNDARY if index.get("boundary_ratio") is None else index["boundary_ratio"]
    if isinstance(boundary, bool) or not isinstance(boundary, (int, float)) or not 0 <= boundary <= 1:
        raise ValueError(
            f"{path}: boundary_ratio is {boundary!r}, expected a noise level from 0 to 1; A14B has "
            f"{BOUNDARY}."
        )
    return float(boundary)


def _check_same_size(folder, high, low):
    differences = [
        f"{name} {value} and {low.config.get(name)}"
        for name, value in high.config.items()
        if value != low.config.get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder}: {high.folder.name} and {low.folder.name} differ in size ({', '.join(differences)}); "
            f"they are "
            "experts of two teachers. Download the folder again."
        )


def _open_expert(name, folder):
    """Read an expert's headers; `folder` may be its single file."""
    places, scales, promised = {}, {}, _promised_by_index(folder)
    paths = _weight_files(folder, promised)
    names = _bare_names(folder, paths)
    for path in paths:
        try:
            _read_header(path, names, places, scales)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    held = {stored_name for _, stored_name, _ in places.values()}
    if broken := sorted(key for key in promised if _is_weight(key) and key not in held):
        raise ValueError(
            f"{folder}: the index promises {broken[0]} in {promised[broken[0]]}, no shard holds it "
            f"({len(broken)} in "
            "all). Index and shards are of two downloads: download the expert again."
        )
    config = _config_in_diffusers_words(folder, places)
    if config["in_channels"] != config["out_channels"]:
        raise ValueError(
            f"{folder}: takes {config['in_channels']} channels and gives {config['out_channels']}: an "
            f"image-to-video "
            "or control Wan. Expected as many in as out: choose a text-to-video Wan."
        )
    _check_shapes(folder, config, places)
    return ExpertFiles(name, folder, config, places, _spread_scales(folder, scales, places))


def _is_weight(key):
    return key.rpartition(".")[2] not in _FP8_SCALES + _FP8_MARKS


def _bare_names(folder, paths):
    """Return {stored name: name without a wrapper's words} of an expert's files."""
    stored = []
    for path in paths:
        open_regular(path).close()  # safetensors waits for a pipe, and calls what it may not read missing
        try:
            with safe_open(path, "np") as file:
                stored += file.keys()
        except SafetensorError as error:
            raise broken_safetensors(path, error) from None
    return unwrapped(stored, folder)


def _read_header(path, names, places, scales):
    """Add where a file's tensors lie to `places`, and its scales, which are small, to `scales`."""
    with safe_open(path, "np") as file:
        for key in file.keys():
            layer, _, kind = names[key].rpartition(".")
            if kind in _FP8_SCALES:
                with _mapped(path) as tensors:
                    scales[diffusers_name(f"{layer}.weight")] = tensors.get_tensor(key)
            if not _is_weight(key):
                continue
            name, stored = diffusers_name(names[key]), file.get_slice(key)
            if name in places:
                raise ValueError(
                    f"{key} stands in {places[name][0].name} and in {path.name}. Keep the files of one "
                    f"download, in "
                    "one precision."
                )
            if stored.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{key} is stored as {stored.get_dtype()}, expected one of {', '.join(_DTYPES)}. Choose "
                    f"a "
                    "download in one of these."
                )
            places[name] = (path, key, tuple(stored.get_shape()))


def _spread_scales(folder, scales, places):
    """Give each row of a scaled weight its scale; returns {diffusers' name: (rows, 1, ...) in float32}."""
    spread = {}
    for name, scale in scales.items():
        if name not in places:
            raise ValueError(
                f"{folder}: there is a scale of {name} but no such weight. Download the expert again."
            )
        shape = places[name][2]
        if not scale.is_floating_point() or scale.numel() not in (1, shape[0]):
            raise ValueError(
                f"{folder}: the scale of {name} is {scale.dtype} {tuple(scale.shape)}, expected one float or "
                f"one a "
                f"row ({shape[0]}). Choose a download in plain or scaled fp8, or in bf16."
            )
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise ValueError(
                f"{folder}: the scale of {name} holds {scale.min().item()}, expected finite numbers above 0. "
                f"Download "
                "the expert again."
            )
        spread[name] = (
            scale.float().reshape(-1, *[1] * (len(shape) - 1)).expand(shape[0], *[1] * (len(shape) - 1))
        )
    return spread


def _check_shapes(folder, config, places):
    source = "its config.json" if folder.is_dir() else "its first block"
    expected = _implied_shapes(json.dumps(config))
    missing, unknown = sorted(expected.keys() - places.keys()), sorted(places.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{folder}: tensors differ from what {source} implies; missing {missing[:3]} ({len(missing)}), "
            f"unknown "
            f"{unknown[:3]} ({len(unknown)}). A shard is absent or of another Wan: download the expert again."
        )
    for key, (path, _, shape) in places.items():
        if shape != expected[key]:
            raise ValueError(
                f"{path}: {key} is {shape}, {source} implies {expected[key]}. The shard is of another Wan."
            )


@cache
def _implied_shapes(config):
    """Return {name: shape} of the Wan that a config, as JSON, describes."""
    with init_empty_weights():
        return {
            key: tuple(tensor.shape)
            for key, tensor in WanTransformer3DModel(**json.loads(config)).state_dict().items()
        }


def _promised_by_index(folder):
    """Return an index's {tensor: shard}, or nothing where there is no index."""
    indexes = visible(folder.glob("*.safetensors.index.json"))
    if not indexes:
        return {}
    weight_map = _read_json(indexes[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{indexes[0]}: has no weight_map, expected tensor names and their shards. Download it again."
        )
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{indexes[0]}: names the shard {name!r}, expected a file beside it.")
    return weight_map


def _weight_files(folder, promised):
    """Return the safetensors files of one expert: those that the index or their own numbers promise, or the
    only one.
    """
    if folder.is_file():
        if unfinished := [suffix for suffix in _UNFINISHED if Path(f"{folder}{suffix}").exists()]:
            raise OSError(
                f"{folder}{unfinished[0]}: a download that did not finish. Let it end, or delete this file "
                f"if the other "
                "is whole."
            )
        return [folder]
    if unfinished := [path.name for path in visible(folder.glob("*")) if path.suffix in _UNFINISHED]:
        raise OSError(
            f"{folder}: {unfinished[0]} is a download that did not finish. Download the expert again, or "
            f"delete this "
            "file if every other is whole."
        )
    names = {path.name for path in visible(folder.glob("*.safetensors"))}
    if not names and not promised:
        found = name_not_read(folder.iterdir())
        raise OSError(
            f"{folder}: holds no .safetensors file; "
            f"{found or 'expected an expert in it. Download the expert again.'}"
        )
    wanted = set(promised.values()) or {
        sibling for name in _plain(folder, names) for sibling in (name, *_siblings(name))
    }
    if missing := sorted(wanted - names):
        raise OSError(
            f"{folder}: shard {missing[0]} is missing, its index or its siblings promise it ({len(missing)} "
            f"of "
            f"{len(wanted)} are missing). Download it again."
        )
    return [folder / name for name in sorted(wanted)]


def _plain(folder, names):
    """Return the files that diffusers reads where it is asked for no variant, as x.safetensors beside
    x.fp16.safetensors.
    """
    plain = {name for name in names if "." not in name.removesuffix(".safetensors")}
    if plain and plain != names:
        warnings.warn(
            f"{folder}: {', '.join(sorted(plain))} is read; left out: {', '.join(sorted(names - plain))}.",
            stacklevel=2,
        )
    return plain or names


def _siblings(name):
    """Return the names of all shards that a shard's own name (-00002-of-00006) promises."""
    match = re.search(r"-(\d{5})-of-(\d{5})", name)
    return (
        [name.replace(match[0], f"-{number + 1:05d}-of-{match[2]}") for number in range(int(match[2]))]
        if match
        else []
    )


def _config_in_diffusers_words(folder, places):
    path = folder / "config.json" if folder.is_dir() else folder
    config = _SAME_IN_ALL | (_read_json(path) if folder.is_dir() else _sizes_of(folder, places))
    if not {"num_attention_heads", "attention_head_dim"} & config.keys():
        config |= _translate(path, config, {name: place[2] for name, place in places.items()})
    _check_sizes(path, config, _DIFFUSERS_SIZES)
    _check_others(path, config)
    return {
        name: tuple(config[name]) if name == "patch_size" else config[name]
        for name in ("patch_size", *_DIFFUSERS_SIZES, *_SAME_IN_ALL)
    }


def _translate(path, config, shapes):
    """Return the sizes of an official config in diffusers' words; two of them only its tensors tell."""
    _check_sizes(path, config, _OFFICIAL_SIZES)
    width, heads = config["dim"], config["num_heads"]
    if width % heads:
        raise ValueError(
            f"{path}: dim is {width}, expected a multiple of num_heads, which is {heads}. Download it again."
        )
    return {
        "patch_size": shapes.get("patch_embedding.weight", (0, 0, 1, 2, 2))[2:],
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": config["in_dim"],
        "out_channels": config["out_dim"],
        "text_dim": shapes.get("condition_embedder.text_embedder.linear_1.weight", (0, 4096))[-1],
    }


def _check_sizes(path, config, names):
    """Refuse what can be no size of a Wan before anything is computed with it."""
    if missing := [name for name in names if name not in config]:
        raise ValueError(
            f"{path}: lacks {', '.join(missing)}; it is no Wan transformer's config. Download it again."
        )
    for name in names:
        size, most = config[name], _MOST.get(name, _MAX_SIZE)
        if type(size) is not int or not 1 <= size <= most:
            raise ValueError(
                f"{path}: {name} is {size!r:.60}, expected a whole number from 1 to {most:,}. Download it "
                f"again."
            )


def _check_others(path, config):
    """Refuse what fits no Wan among settings that are not sizes alone."""
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
        (head % 2, "attention_head_dim", "an even number, for positions turn channels in pairs"),
        *((True, name, f"{_SAME_IN_ALL[name]!r}, as every Wan has") for name in same),
    ):
        if is_wrong:
            raise ValueError(
                f"{path}: {name} is {config.get(name)!r:.60}, expected {expected}. Download it again."
            )


def _sizes_of(path, places):
    """Return the sizes of a single file, which has no config.json, in the official words: all but the heads'
    from its shapes.
    """
    shapes = {name: place[2] for name, place in places.items()}
    try:
        width, channels, *patch = shapes["patch_embedding.weight"]
        sizes = {
            "dim": width,
            "num_heads": width // HEAD_SIZE,
            "in_dim": channels,
            "out_dim": shapes["proj_out.weight"][0] // math.prod(patch),
            "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
            "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
            "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        }
    except LookupError as error:
        raise ValueError(
            f"{path}: lacks the tensor {error}, which every Wan has. Download it again."
        ) from None
    if width % HEAD_SIZE:
        raise ValueError(
            f"{path}: has a width of {width}, expected a multiple of {HEAD_SIZE}, the head size of every "
            f"Wan. Choose "
            "another layout of this teacher, which has a config.json."
        )
    return sizes


def _read_json(path):
    if not path.exists():
        raise OSError(f"{path}: missing. Download the folder again.")
    return read_downloaded_json(path)
