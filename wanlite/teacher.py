"""A Wan folder -> tensors, read one at a time, and guided one-frame velocities.

Official, diffusers and ComfyUI layouts, both key dialects, two experts (A14B) or one (2.1, 5B); all is said in diffusers' words.
Legend: B batch, C channels, H W latent height and width, N image tokens, D width.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from .network import TEXT_LENGTH, OneFrameBlock, TextTokens, one_frame_velocity

BOUNDARY = 0.875  # Wan2.2 A14B: noise levels from here on belong to the high-noise expert
RESIDENCIES = ("both", "one", "streamed", "disk")      # of one process; several also share it out: "sharded"
SHARDED_BESIDE = 0.1    # of an expert: what is no block, and two blocks that are whole
BYTES_A_TOKEN = 24      # of a pass in bfloat16 at its peak, for each channel of the width
TOKENS_AT_ONCE = 65536  # image tokens of a teacher's pass: 32 guided pictures of 512 x 512; 8 GB of activations at A14B's width

# Official name -> diffusers' name. The order matters: head.modulation before modulation. norm2 and norm3 are swapped.
_TO_DIFFUSERS = [(re.compile(pattern), name) for pattern, name in (
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
)]
_IS_DIFFUSERS = re.compile(
    r"^(patch_embedding|proj_out|condition_embedder\.(text|time)_embedder\.linear_[12]|condition_embedder\.time_proj"
    r"|blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|norm2|ffn\.net\.0\.proj|ffn\.net\.2))\.(weight|bias)$"
    r"|^blocks\.\d+\.attn[12]\.norm_[qk]\.weight$|^(blocks\.\d+\.)?scale_shift_table$")
_PREFIX = "model.diffusion_model."  # ComfyUI's single files
_SINGLE_FILES = ("", "diffusion_models", "unet")   # where they lie: all in one folder, or in ComfyUI's models/
_ONE_OF_TWO = re.compile(r"(?i)(?<![a-z])(high|low)(?=[-_ ]?noise|[^a-z])")      # in the name of an expert's single file
_ONE_OF_MANY = re.compile(r"^diffusion_pytorch_model|-\d{5}-of-\d{5}")          # in the name of what is no single file
HEAD_SIZE = 128                     # of every Wan that was published; no tensor's shape tells it
_OTHER_WANS = [(re.compile(pattern), name) for pattern, name in (
    (r"img_emb|[kv]_img|image_embedder|add_[kv]_proj", "an image-to-video Wan"), (r"vace", "VACE"), (r"lora|\.diff", "a LoRA"),
    (r"audio|frame_packer|trainable_cond|cond_encoder", "a speech-to-video Wan"), (r"face_|motion_|pose_patch", "Wan Animate"),
    (r"control_adapter|ref_conv", "a Fun Control Wan"))]
_UNFINISHED = (".incomplete", ".aria2", ".part", ".crdownload")  # what a download is called, or leaves beside it, until it ends
_DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_FP8_SCALES = ("scale_weight", "weight_scale")                              # ComfyUI's: value = X.weight * X.scale
_FP8_MARKS = ("scaled_fp8", "scale_input", "input_scale", "comfy_quant")    # for fp8 arithmetic: no part of a weight's value


def diffusers_name(key):
    """Return diffusers' name for a tensor of either dialect; raises ValueError for a name that no text-to-video Wan has."""
    name = key.removeprefix(_PREFIX)
    for pattern, template in _TO_DIFFUSERS:
        if pattern.match(name):
            return pattern.sub(template, name)
    if _IS_DIFFUSERS.match(name):
        return name
    other = next((other for pattern, other in _OTHER_WANS if pattern.search(name)), "nothing known")
    raise ValueError(f"tensor {key!r} is no tensor of a text-to-video Wan transformer, in the official or in diffusers' names "
                     f"(it belongs to {other}). Choose a text-to-video Wan.")


# ---- files -------------------------------------------------------------------------------------------------------------

@dataclass
class ExpertFiles:
    """One network on disk: its config in diffusers' words, and where each tensor lies."""

    name: str                                     # "high", "low", or "only"
    folder: Path                                  # or its single file
    config: dict
    places: dict = field(repr=False)              # diffusers' name -> (file, name in the file, shape)
    scales: dict = field(repr=False, default_factory=dict)    # of scaled fp8 weights: diffusers' name -> (rows, 1, ...)

    def read(self, name, dtype=torch.float32, rows=None):
        """Read one tensor by diffusers' name, or only the `rows` (a slice) of its first dimension; scales are multiplied in.

        Raises ValueError for values that are not finite.
        """
        path, stored_name, _ = self.places[name]
        with _mapped(path) as file:
            tensor = file.get_tensor(stored_name) if rows is None else file.get_slice(stored_name)[rows]
        if name in self.scales:
            tensor = tensor.float() * (self.scales[name] if rows is None else self.scales[name][rows])
        tensor = tensor.to(dtype)
        if not torch.isfinite(tensor.sum(dtype=torch.float32)):       # one pass and no memory, unlike isfinite().all()
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
    """Open a safetensors file for its tensors, for which all of it is mapped, as private memory; its header costs nothing."""
    try:
        return safe_open(path, "pt")
    except RuntimeError as error:
        raise OSError(f"{path}: {path.stat().st_size / 1e9:,.1f} GB cannot be mapped into this machine's memory ({error}). Take "
                      "the official or diffusers layout, whose shards are smaller, or add swap.") from None


@dataclass
class TeacherFiles:
    """A Wan folder, read as far as its headers."""

    folder: Path
    layout: str                                   # "official", "diffusers" or "ComfyUI"
    experts: dict                                 # "high" and "low", or "only"
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
        return sampled_digest((expert.name, path) for expert in self.experts.values()
                              for path in sorted({path for path, *_ in expert.places.values()}))


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
    """Find the experts in a Wan folder and check their headers; no tensor but the scales of fp8 weights is read.

    Raises OSError for what is missing or cut short and ValueError for what belongs to no or to another Wan.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise OSError(f"{folder}: no such folder. Expected a Wan checkpoint: transformer/ and transformer_2/ (diffusers), "
                      "high_noise_model/ and low_noise_model/ (official), or diffusion_models/ (ComfyUI).")
    index_path = folder / "model_index.json"
    index = _read_json(index_path) if index_path.exists() else {}
    pairs = {"official": ("high_noise_model", "low_noise_model"), "diffusers": ("transformer", "transformer_2")}
    for layout, (high, low) in pairs.items():
        if (folder / high).is_dir() and (folder / low).is_dir():
            experts = {"high": _open_expert("high", folder / high), "low": _open_expert("low", folder / low)}
            _check_same_size(folder, *experts.values())
            return TeacherFiles(folder, layout, experts, _boundary(index, index_path))
    promised = [name for name in ("transformer", "transformer_2") if (index.get(name) or [None])[0] is not None]
    lonely = [name for name in pairs["official"] if (folder / name).is_dir()]
    for name in (*promised, *(("high_noise_model", "low_noise_model") if lonely else ())):
        if not (folder / name).is_dir():
            raise OSError(f"{folder}: {name}/ is missing, the other expert is there. Download the folder again.")
    if (folder / "transformer" / "config.json").is_file():
        return TeacherFiles(folder, "diffusers", {"only": _open_expert("only", folder / "transformer")}, None)
    if single := _single_files(folder):
        experts = {name: _open_expert(name, path) for name, path in single.items()}
        if len(experts) == 2:
            _check_same_size(folder, *experts.values())
        return TeacherFiles(folder, "ComfyUI", experts, BOUNDARY if len(experts) == 2 else None)
    if (folder / "config.json").is_file():
        return TeacherFiles(folder, "official", {"only": _open_expert("only", folder)}, None)
    raise OSError(f"{folder}: no Wan transformer. Expected transformer/, high_noise_model/ or diffusion_models/; found "
                  f"{', '.join(sorted(entry.name for entry in folder.iterdir())[:8]) or 'nothing'}.")


def _single_files(folder):
    """Return {expert: file} of ComfyUI's single files in a folder, or nothing where there are none.

    A file is known by its tensors, and by its name which of two experts it is. Raises OSError for one without the other and
    ValueError where the files leave open which are meant, or are of other Wans.
    """
    experts, others = {}, []
    for path in sorted(path for place in _SINGLE_FILES for path in (folder / place).glob("*.safetensors")):
        if _ONE_OF_MANY.search(path.name):
            continue
        if (kind := _kind_of(path)) != "a text-to-video Wan":
            others += [f"{path.name} is {kind}"] if kind else []
            continue
        name = match[1].lower() if (match := _ONE_OF_TWO.search(path.name)) else "only"
        if name in experts or (experts and "only" in (name, *experts)):
            raise ValueError(f"{folder}: both {next(iter(experts.values())).name} and {path.name} are text-to-video Wans, expected "
                             "one, or the high_noise and the low_noise one of a pair, in one precision. Put the files of one "
                             "teacher into a folder of their own (links will do) and name that.")
        experts[name] = path
    if not experts and others:
        raise ValueError(f"{folder}: no text-to-video Wan: {', '.join(others)}. Choose a text-to-video Wan.")
    if len(experts) == 1 and "only" not in experts:
        (name, path), = experts.items()
        raise OSError(f"{folder}: {path.name} is one of two experts, and there is no {'low' if name == 'high' else 'high'}_noise "
                      f"file in {path.parent}. Download it into that folder.")
    return dict(sorted(experts.items()))


def _kind_of(path):
    """Say of a safetensors file what Wan it is, or nothing where it is none; raises OSError for half a file."""
    try:
        with safe_open(path, "np") as file:
            keys = {key.removeprefix(_PREFIX): key for key in file.keys()}
            if {"patch_embedding.weight", "head.head.weight"} <= keys.keys():
                (_, channels, *patch), (rows, _) = (file.get_slice(keys[f"{name}.weight"]).get_shape()
                                                    for name in ("patch_embedding", "head.head"))
                return ("a text-to-video Wan" if rows == channels * math.prod(patch) else "an image-to-video or control Wan "
                        f"(it takes {channels} channels and gives {rows // math.prod(patch)})")
    except SafetensorError as error:
        raise OSError(f"{path}: not a whole safetensors file ({error}). Download it again.") from None
    return next((other for pattern, other in _OTHER_WANS if any(pattern.search(key) for key in keys)), None)


def _boundary(index, path):
    boundary = BOUNDARY if index.get("boundary_ratio") is None else index["boundary_ratio"]
    if isinstance(boundary, bool) or not isinstance(boundary, (int, float)) or not 0 <= boundary <= 1:
        raise ValueError(f"{path}: boundary_ratio is {boundary!r}, expected a noise level from 0 to 1; A14B has {BOUNDARY}.")
    return float(boundary)


def _check_same_size(folder, high, low):
    differences = [f"{name} {value} and {low.config.get(name)}" for name, value in high.config.items()
                   if value != low.config.get(name)]
    if differences:
        raise ValueError(f"{folder}: {high.folder.name} and {low.folder.name} differ in size ({', '.join(differences)}); they are "
                         "experts of two teachers. Download the folder again.")


def _open_expert(name, folder):
    """Read an expert's headers; `folder` may be its single file."""
    places, scales, promised = {}, {}, _promised_by_index(folder)
    for path in _weight_files(folder, promised):
        try:
            _read_header(path, places, scales)
        except SafetensorError as error:
            raise OSError(f"{path}: not a whole safetensors file ({error}). Download it again.") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    held = {stored_name for _, stored_name, _ in places.values()}
    if broken := sorted(key for key in promised if _is_weight(key) and key not in held):
        raise ValueError(f"{folder}: the index promises {broken[0]} in {promised[broken[0]]}, no shard holds it ({len(broken)} in "
                         "all). Index and shards are of two downloads: download the expert again.")
    config = _config_in_diffusers_words(folder, places)
    if config["in_channels"] != config["out_channels"]:
        raise ValueError(f"{folder}: takes {config['in_channels']} channels and gives {config['out_channels']}: an image-to-video "
                         "or control Wan. Expected as many in as out: choose a text-to-video Wan.")
    _check_shapes(folder, config, places)
    return ExpertFiles(name, folder, config, places, _spread_scales(folder, scales, places))


def _is_weight(key):
    return key.rpartition(".")[2] not in _FP8_SCALES + _FP8_MARKS


def _read_header(path, places, scales):
    """Add where a file's tensors lie to `places`, and its scales, which are small, to `scales`."""
    with safe_open(path, "np") as file:
        for key in file.keys():
            layer, _, kind = key.rpartition(".")
            if kind in _FP8_SCALES:
                with _mapped(path) as tensors:
                    scales[diffusers_name(f"{layer}.weight")] = tensors.get_tensor(key)
            if not _is_weight(key):
                continue
            name, stored = diffusers_name(key), file.get_slice(key)
            if name in places:
                raise ValueError(f"{key} stands in {places[name][0].name} and in {path.name}. Keep the files of one download, in "
                                 "one precision.")
            if stored.get_dtype() not in _DTYPES:
                raise ValueError(f"{key} is stored as {stored.get_dtype()}, expected one of {', '.join(_DTYPES)}. Choose a "
                                 "download in one of these.")
            places[name] = (path, key, tuple(stored.get_shape()))


def _spread_scales(folder, scales, places):
    """Give each row of a scaled weight its scale; returns {diffusers' name: (rows, 1, ...) in float32}."""
    spread = {}
    for name, scale in scales.items():
        if name not in places:
            raise ValueError(f"{folder}: there is a scale of {name} but no such weight. Download the expert again.")
        shape = places[name][2]
        if not scale.is_floating_point() or scale.numel() not in (1, shape[0]):
            raise ValueError(f"{folder}: the scale of {name} is {scale.dtype} {tuple(scale.shape)}, expected one float or one a "
                             f"row ({shape[0]}). Choose a download in plain or scaled fp8, or in bf16.")
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise ValueError(f"{folder}: the scale of {name} holds {scale.min().item()}, expected finite numbers above 0. Download "
                             "the expert again.")
        spread[name] = scale.float().reshape(-1, *[1] * (len(shape) - 1)).expand(shape[0], *[1] * (len(shape) - 1))
    return spread


def _check_shapes(folder, config, places):
    source = "its config.json" if folder.is_dir() else "its first block"
    expected = _implied_shapes(json.dumps(config))
    missing, unknown = sorted(expected.keys() - places.keys()), sorted(places.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"{folder}: tensors differ from what {source} implies; missing {missing[:3]} ({len(missing)}), unknown "
                         f"{unknown[:3]} ({len(unknown)}). A shard is absent or of another Wan: download the expert again.")
    for key, (path, _, shape) in places.items():
        if shape != expected[key]:
            raise ValueError(f"{path}: {key} is {shape}, {source} implies {expected[key]}. The shard is of another Wan.")


@cache
def _implied_shapes(config):
    """Return {name: shape} of the Wan that a config, as JSON, describes."""
    with init_empty_weights():
        return {key: tuple(tensor.shape) for key, tensor in WanTransformer3DModel(**json.loads(config)).state_dict().items()}


def _promised_by_index(folder):
    """Return an index's {tensor: shard}, or nothing where there is no index."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        return {}
    weight_map = _read_json(indexes[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{indexes[0]}: has no weight_map, expected tensor names and their shards. Download it again.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{indexes[0]}: names the shard {name!r}, expected a file beside it.")
    return weight_map


def _weight_files(folder, promised):
    """Return the safetensors files of one expert: those that the index or their own numbers promise, or the only one."""
    if folder.is_file():
        if unfinished := [suffix for suffix in _UNFINISHED if Path(f"{folder}{suffix}").exists()]:
            raise OSError(f"{folder}{unfinished[0]}: a download that did not finish. Let it end, or delete this file if the other "
                          "is whole.")
        return [folder]
    if unfinished := sorted(path.name for path in folder.glob("*") if path.suffix in _UNFINISHED):
        raise OSError(f"{folder}: {unfinished[0]} is a download that did not finish. Download the expert again, or delete this "
                      "file if every other is whole.")
    names = {path.name for path in folder.glob("*.safetensors")}
    if not names:
        raise OSError(f"{folder}: holds no .safetensors file. Download the expert again.")
    wanted = set(promised.values()) or names | {sibling for name in names for sibling in _siblings(name)}
    if missing := sorted(wanted - names):
        raise OSError(f"{folder}: shard {missing[0]} is missing, its index or its siblings promise it ({len(missing)} of "
                      f"{len(wanted)} are missing). Download it again.")
    return [folder / name for name in sorted(wanted)]


def _siblings(name):
    """Return the names of all shards that a shard's own name (-00002-of-00006) promises."""
    match = re.search(r"-(\d{5})-of-(\d{5})", name)
    return [name.replace(match[0], f"-{number + 1:05d}-of-{match[2]}") for number in range(int(match[2]))] if match else []


def _config_in_diffusers_words(folder, places):
    config = _read_json(folder / "config.json") if folder.is_dir() else _sizes_of(folder, places)
    if "num_attention_heads" in config:
        names = ("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim",
                 "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "qk_norm", "eps", "rope_max_seq_len")
        return {name: tuple(config[name]) if name == "patch_size" else config[name] for name in names if name in config}
    wanted = ("dim", "num_heads", "in_dim", "out_dim", "freq_dim", "ffn_dim", "num_layers")
    if missing := [name for name in wanted if name not in config]:
        raise ValueError(f"{folder / 'config.json'}: lacks {', '.join(missing)}; it is no Wan transformer's config.")
    shapes = {name: place[2] for name, place in places.items()}
    text = shapes.get("condition_embedder.text_embedder.linear_1.weight", (0, 4096))
    return {"patch_size": tuple(shapes.get("patch_embedding.weight", (0, 0, 1, 2, 2))[2:]),
            "num_attention_heads": config["num_heads"], "attention_head_dim": config["dim"] // config["num_heads"],
            "in_channels": config["in_dim"], "out_channels": config["out_dim"], "text_dim": text[1],
            "freq_dim": config["freq_dim"], "ffn_dim": config["ffn_dim"], "num_layers": config["num_layers"],
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": config.get("eps", 1e-6),
            "rope_max_seq_len": 1024}


def _sizes_of(path, places):
    """Return the sizes of a single file, which has no config.json, in the official words: all but the heads' from its shapes."""
    shapes = {name: place[2] for name, place in places.items()}
    try:
        width, channels, *patch = shapes["patch_embedding.weight"]
        sizes = {"dim": width, "num_heads": width // HEAD_SIZE, "in_dim": channels,
                 "out_dim": shapes["proj_out.weight"][0] // math.prod(patch),
                 "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
                 "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
                 "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))}
    except LookupError as error:
        raise ValueError(f"{path}: lacks the tensor {error}, which every Wan has. Download it again.") from None
    if width % HEAD_SIZE:
        raise ValueError(f"{path}: has a width of {width}, expected a multiple of {HEAD_SIZE}, the head size of every Wan. Choose "
                         "another layout of this teacher, which has a config.json.")
    return sizes


def _read_json(path):
    if not path.is_file():
        raise OSError(f"{path}: missing. Download the folder again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path}: not JSON ({error}). Download it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected an object.")
    return content


# ---- velocities --------------------------------------------------------------------------------------------------------

class Teacher:
    """The frozen teacher: the guided velocity at this noise level for these text tokens.

    Experts are read when they are first asked, and kept as `residency` says: "both" on the device, "one" there and the other in
    the CPU's memory, "streamed" from the CPU's memory block by block while the block before computes, read from "disk" block by
    block at each pass, or "sharded", each rank of a machine with its share of every block: then all of them have to ask the same
    expert at the same time. `is_fp8` keeps their matrices in float8, half of bfloat16, and computes in `dtype`. `tokens_at_once`
    image tokens go through an expert together, those of the negative prompt counted in.
    """

    def __init__(self, files, device="cpu", dtype=torch.float32, residency="both", is_fp8=False, tokens_at_once=TOKENS_AT_ONCE):
        self.files, self.config, self.boundary = files, files.config, files.boundary
        self.device, self.dtype, self.residency, self.is_fp8 = torch.device(device), dtype, residency, is_fp8
        self.tokens_at_once, self._read = tokens_at_once, {}
        self.mesh = machine_mesh(self.device) if residency == "sharded" else None

    def expert(self, name):
        """Return one expert, "high", "low" or "only", where it can be asked."""
        if name not in self._read:
            if self.residency == "one" and self.device.type == "cpu":
                self.rest()                                  # the CPU's memory is the device's
            self._read[name] = self._load(self.files.experts[name])
        if self.residency == "one":
            for _, network in sorted(self._read.items(), key=lambda item: item[0] == name):      # out first, then in
                network.to(self.device if network is self._read[name] else "cpu")
        return self._read[name]

    def rest(self):
        """Let go of every expert's memory; they are read again when they are next asked."""
        self._read.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()                      # what was pinned; it has a public name from torch 2.13 on

    def _load(self, files):
        if self.residency == "disk":
            return stream_expert(files, self.device, self.dtype)
        if self.residency == "sharded":
            return shard_expert(files, self.device, self.dtype, self.mesh)
        place = self.device if self.residency == "both" else torch.device("cpu")
        expert = load_expert(files, "cpu" if self.is_fp8 else place, self.dtype)
        if self.is_fp8:                                      # before it is on a device that has no room for what it was
            expert.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=self.dtype)
            expert.to(place)
        if self.residency == "streamed":
            if self.device.type == "cuda":                   # one by one: the hooks would have all of them twice
                for weight in expert.parameters():
                    weight.data = weight.data.pin_memory()
            expert.enable_group_offload(onload_device=self.device, offload_type="block_level", num_blocks_per_group=1,
                                        use_stream=self.device.type == "cuda")
        return expert

    @torch.no_grad()
    def velocity(self, latents, timestep, text, negative=None, guidance_high=1.0, guidance_low=1.0, feature_blocks=()):
        """Return the guided velocity (B, C, H, W), and token states (B, N, D) of the prompt's own pass after `feature_blocks`.

        Each row is routed by its own timestep. Guidance runs where it is above 1, as in WanPipeline, and needs `negative`,
        TextTokens of the same rows; a teacher with one expert uses `guidance_high`. Velocities come back in float32.
        """
        is_high = timestep >= 1000 * (self.boundary or 0.0)
        if not (is_high.all() or not is_high.any()):
            return self._velocity_of_both(is_high, latents, timestep, text, negative, guidance_high, guidance_low,
                                          feature_blocks)
        high = bool(is_high[0])
        expert = self.expert("only" if self.boundary is None else "high" if high else "low")
        guidance = guidance_high if high else guidance_low
        rows = self._rows_at_once(latents, guidance > 1.0)
        parts = [slice(start, start + rows) for start in range(0, len(latents), rows)]
        if (passes := self._most_passes(len(parts), high)) > 1:
            parts = [self.velocity(latents[part], timestep[part], text.rows(part), negative and negative.rows(part), guidance_high,
                                   guidance_low, feature_blocks)
                     for part in parts + parts[-1:] * (passes - len(parts))][:len(parts)]
            return torch.cat([velocity for velocity, _ in parts]), [torch.cat(states) for states in zip(*(s for _, s in parts))]
        if guidance <= 1.0:
            return ask(expert, latents, timestep, text, feature_blocks)
        if negative is None:
            raise TypeError("guidance needs the negative prompt's tokens: negative is None.")
        velocity, features = ask(expert, latents.repeat(2, 1, 1, 1), timestep.repeat(2), _stack_text(text, negative),
                                  feature_blocks)
        wanted, unwanted = velocity.chunk(2)
        return unwanted + guidance * (wanted - unwanted), [states.chunk(2)[0] for states in features]

    def _rows_at_once(self, latents, is_guided):
        tokens = latents.shape[-2] * latents.shape[-1] // math.prod(self.config["patch_size"]) * (2 if is_guided else 1)
        return max(1, self.tokens_at_once // tokens)

    def _most_passes(self, passes, is_high):
        """Return how many passes an answer takes: of a sharded teacher as many as any rank needs, for all go together."""
        if self.mesh is None:
            return passes
        told = torch.tensor([passes, is_high, -is_high], device=self.device)
        distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self.mesh.get_group())
        passes, any_high, none_low = told.tolist()
        if any_high != -none_low:
            raise RuntimeError("ranks asked different experts of a sharded teacher at the same time.")
        return passes

    def _velocity_of_both(self, is_high, latents, timestep, text, negative, guidance_high, guidance_low, feature_blocks):
        velocity, features = torch.empty_like(latents, dtype=torch.float32), [None] * len(feature_blocks)
        for rows in (is_high, ~is_high):
            part, states = self.velocity(latents[rows], timestep[rows], text.rows(rows),
                                         None if negative is None else negative.rows(rows), guidance_high, guidance_low,
                                         feature_blocks)
            velocity[rows] = part
            for place, state in enumerate(states):
                if features[place] is None:
                    features[place] = state.new_empty(len(latents), *state.shape[1:])
                features[place][rows] = state
        return velocity, features


def choose_residency(files, dtype, is_fp8, free_device, free_host, is_cpu=False, shares=1):
    """Return the residency that keeps most of the teacher near: of "both", "one", "sharded", "streamed", "disk" what fits first.

    Among so many `shares` on one machine its GPUs share the blocks out: they reach each other faster than the CPU's memory.
    `free_device` and `free_host` are bytes; what a pass computes with is left free. On the CPU the two are one memory, and
    nothing is streamed from it.
    """
    size = max(expert.num_parameters for expert in files.experts.values()) * (1 if is_fp8 else dtype.itemsize)
    whole, passing = size * len(files.experts), TOKENS_AT_ONCE * next(iter(files.experts.values())).width * BYTES_A_TOKEN
    if whole + passing <= free_device:
        return "both"
    if size + passing <= free_device and len(files.experts) > 1 and (is_cpu or whole <= free_host):
        return "one"
    if shares > 1 and not is_cpu and not is_fp8 and whole / shares + SHARDED_BESIDE * size + passing <= free_device:
        return "sharded"
    pinned = sum(pinned_bytes(expert, dtype, is_fp8) for expert in files.experts.values())
    return "streamed" if pinned <= free_host and not is_cpu else "disk"


def pinned_bytes(files, dtype, is_fp8):
    """Return what an expert takes of the CPU's memory where blocks are streamed from: torch pins powers of two."""
    return sum(2 ** (torch.Size(shape).numel() * (1 if is_fp8 else dtype.itemsize) - 1).bit_length()
               for *_, shape in files.places.values())


class Expert(WanTransformer3DModel):
    """diffusers' network on single frames; it is asked by its forward, which diffusers' hooks for offloading and casting wrap."""

    def forward(self, latents, timestep, text, logit_bias=None, feature_blocks=()):
        """See network.one_frame_velocity()."""
        return one_frame_velocity(self, latents, timestep, text, logit_bias, feature_blocks)


def ask(expert, latents, timestep, text, feature_blocks=()):
    """Run one expert in its own dtype; timesteps and the velocity are float32."""
    dtype = expert.patch_embedding.weight.dtype
    velocity, features = expert(latents.to(dtype), timestep.float(), text.tokens.to(dtype), text.logit_bias, feature_blocks)
    return velocity.float(), features


def load_expert(files, device="cpu", dtype=torch.float32):
    """Load one expert, frozen: a stock WanTransformer3DModel whose blocks take the text's logit bias."""
    with init_empty_weights():                            # parameters without memory; the rotary tables are real
        network = make_expert(files, files.config["num_layers"])
    network.load_state_dict(_read_all(files, files.places, device, dtype), strict=True, assign=True)
    return network.to(device).eval().requires_grad_(False)


def stream_expert(files, device="cpu", dtype=torch.float32):
    """Load one expert without its blocks; each pass reads them from disk, one in memory at a time."""
    with init_empty_weights():
        network = make_expert(files, 0)
    others = [name for name in files.places if not name.startswith("blocks.")]
    network.load_state_dict(_read_all(files, others, device, dtype), strict=True, assign=True)
    network.blocks = _StreamedBlocks(files, device, dtype)
    return network.to(device).eval().requires_grad_(False)


def _read_all(files, names, device, dtype):
    """Read tensors by name; those of modules that Wan keeps in float32 stay there."""
    stays = set(WanTransformer3DModel._keep_in_fp32_modules)
    return {name: files.read(name, torch.float32 if set(name.split(".")) & stays else dtype).to(device) for name in names}


def shard_expert(files, device, dtype, mesh):
    """Load one expert of whose blocks each device of `mesh` keeps an equal share; a block is whole only while it computes.

    All ranks of the mesh have to ask it together. Every rank reads each block, one in memory at a time.
    """
    network = stream_expert(files, device, dtype)
    streamed = network.blocks
    network.blocks = nn.ModuleList(fully_shard(streamed.read(index), mesh=mesh) for index in range(len(streamed)))
    others = {weight for name, weight in network.named_parameters() if not name.startswith("blocks.")}
    return fully_shard(network, mesh=mesh, ignored_params=others)      # the root, so that blocks are gathered ahead


def machine_mesh(device):
    """Return the mesh of this machine's ranks."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    shape = (distributed.get_world_size() // local, local)
    return init_device_mesh(device.type, shape, mesh_dim_names=("machines", "ranks"))["ranks"]


class _StreamedBlocks(nn.Module):
    def __init__(self, files, device, dtype):
        super().__init__()
        self.files, self.device, self.dtype = files, device, dtype

    def __len__(self):
        return self.files.config["num_layers"]

    def __iter__(self):
        for index in range(len(self)):
            block = self.read(index)
            yield block
            block.to("meta")                                 # gone before the next is read, whoever still holds it

    def read(self, index):
        """Return one block, which is the caller's to keep."""
        with init_empty_weights():
            block = _empty_block(self.files)
        prefix = f"blocks.{index}."
        names = [name for name in self.files.places if name.startswith(prefix)]
        tensors = _read_all(self.files, names, self.device, self.dtype)
        block.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, strict=True, assign=True)
        return block.eval().requires_grad_(False)


def make_expert(files, depth):
    """Return an expert of `files`' sizes and of `depth` blocks, in the default dtype, with no weights read."""
    network = Expert(**files.config | {"num_layers": 0})
    network.blocks = nn.ModuleList(_empty_block(files) for _ in range(depth))
    return network


def _empty_block(files):
    config = files.config
    return OneFrameBlock(files.width, config["ffn_dim"], config["num_attention_heads"], config["qk_norm"],
                         config["cross_attn_norm"], config["eps"])


def _stack_text(first, second):
    """Put two sets of prompts into one batch, squaring their lengths."""
    length = max(first.tokens.shape[1], second.tokens.shape[1])
    padded = [TextTokens(nn.functional.pad(text.tokens, (0, 0, 0, length - text.tokens.shape[1])),
                         nn.functional.pad(text.logit_bias, (0, length - text.logit_bias.shape[1]), value=-torch.inf))
              for text in (first, second)]
    return TextTokens(*(torch.cat(parts) for parts in zip(*padded)))


# ---- two experts ---------------------------------------------------------------------------------------------------------

PROBE_LEVELS = (0.3, 0.99)      # noise levels of the low and of the high expert, far from the boundary
PROBE_MARGINS = (2.0, 1.2)      # how many times more noise than the other the wrong expert must leave, at each level
PROBE_LIMIT = 0.1               # the share of the noise that a trained expert leaves at most, at its own level
PROBE_FRAMES, PROBE_SIZE = 4, (24, 24)
PROBE_ROWS = 2 * PROBE_FRAMES   # of an expert's pass: the frames at each level


@torch.no_grad()
def check_experts(files, device="cpu"):
    """Refuse two experts that are one, or that stand in each other's folder; returns their weights' cosine per group.

    An expert's guess of the clean picture must not depend on which noise was added. So a flat frame meets several noises at a
    level of each expert, and the variance of the guesses is the noise that an expert leaves. The experts have changed places
    only if each clearly leaves more at the level of its own folder: one that is merely the worse everywhere is let through, and
    so are two that know no noise at all. Reads each expert once, in step, one block of each in memory, in float32.
    Returns {} for a teacher with one expert. Raises ValueError.
    """
    if len(files.experts) < 2:
        return {}
    high, low = files.experts["high"], files.experts["low"]
    if _are_identical(high, low):
        raise ValueError(f"{files.folder}: {high.folder.name} and {low.folder.name} hold the same weights, expected two experts. "
                         "Download the one that is a copy again.")
    pair = _PairedExperts(high, low, device)
    left = noise_left(pair)
    if have_changed_places(left):
        shares = "; ".join(f"at noise level {level} they leave {ours:.2g} and {theirs:.2g} of the noise"
                           for level, ours, theirs in zip(PROBE_LEVELS, *left))
        raise ValueError(f"{files.folder}: {high.folder.name} and {low.folder.name} hold each other's weights: {shares}. Exchange "
                         "their names.")
    return pair.cosines()


def _are_identical(high, low):
    """Compare one row of every tensor, then whole tensors; stops at the first difference."""
    return all(torch.equal(high.read(name, rows=rows), low.read(name, rows=rows))
               for rows in (slice(0, 1), None) for name in high.places)


@torch.no_grad()
def noise_left(pair, seed=0):
    """Return the share of the noise's variance in the guesses of (high, low) at PROBE_LEVELS: ((float, float), (float, float))."""
    channels, generator = pair.config.in_channels, torch.Generator().manual_seed(seed)
    noise = torch.randn(PROBE_FRAMES, channels, *PROBE_SIZE, generator=generator)
    level = torch.tensor(PROBE_LEVELS).repeat_interleave(PROBE_FRAMES).repeat(2)[:, None, None, None]   # (expert level frame)
    noisy = (level * noise.repeat(4, 1, 1, 1)).to(pair.device)                                      # clean is 0: a flat frame
    tokens = noisy.new_zeros(len(noisy), 1, pair.config.text_dim)                                   # the empty prompt's padding
    text = TextTokens(tokens, torch.full_like(tokens[..., 0], math.log(TEXT_LENGTH)))
    velocity, _ = one_frame_velocity(pair, noisy, 1000 * level.flatten().to(pair.device), *text)
    guess = noisy / level.to(pair.device) - velocity                                                # in units of the noise
    variance = guess.unflatten(0, (2, 2, -1)).var(2).mean((2, 3, 4))                                # (expert, level)
    return tuple(map(tuple, variance.tolist()))


def have_changed_places(left):
    """Say whether `left`, what noise_left returns, is clear at both levels."""
    (high_at_low, high_at_high), (low_at_low, low_at_high) = left
    are_trained = max(min(high_at_low, low_at_low), min(high_at_high, low_at_high)) < PROBE_LIMIT
    return are_trained and low_at_low > PROBE_MARGINS[0] * high_at_low and high_at_high > PROBE_MARGINS[1] * low_at_high


class _PairedExperts(nn.Module):
    """Two streamed experts as one network: the first half of a batch is the high expert's, the second half the low one's."""

    def __init__(self, high, low, device):
        super().__init__()
        experts = stream_expert(high, device), stream_expert(low, device)
        self.config, self.device, self.products = experts[0].config, torch.device(device), {}
        self.rope, self.norm_out = experts[0].rope, experts[0].norm_out                             # neither has weights
        for name in ("patch_embedding", "condition_embedder", "proj_out"):
            setattr(self, name, _Pair(*(getattr(expert, name) for expert in experts)))
        self.scale_shift_table = torch.cat([expert.scale_shift_table.expand(2 * PROBE_FRAMES, -1, -1) for expert in experts])
        self._streams = [expert.blocks for expert in experts]
        self._multiply(*experts)

    @property
    def blocks(self):
        """Yield each block of both experts as a pair, which is empty once the next is asked for."""
        streams = [iter(stream) for stream in self._streams]
        for _ in tqdm(range(len(self._streams[0])), desc="comparing experts", unit="block", disable=None):
            pair = _Pair(*map(next, streams))
            self._multiply(*pair.parts)
            yield pair
            pair.parts = None

    def _multiply(self, *parts):
        """Add the inner products of two modules' weights, (ours theirs, ours ours, theirs theirs), to those of their groups."""
        for (name, ours), theirs in zip(parts[0].named_parameters(), parts[1].parameters()):
            group = name.split(".")[0] if name.split(".")[0] in ("attn1", "attn2", "ffn") else "rest"
            ours, theirs = ours.flatten(), theirs.flatten()
            found = torch.stack([ours @ theirs, ours @ ours, theirs @ theirs]).cpu().double()
            self.products[group] = self.products.get(group, 0) + found

    def cosines(self):
        """Return the cosine per group of the weights that were met so far."""
        return {group: float(both / (ours * theirs).sqrt()) for group, (both, ours, theirs) in sorted(self.products.items())}


class _Pair(nn.Module):
    """Two modules as one, each for half of the batch; what is no tensor goes to both."""

    def __init__(self, first, second):
        super().__init__()
        self.parts = nn.ModuleList([first, second])

    def forward(self, *arguments):
        halves = [argument.chunk(2) if isinstance(argument, torch.Tensor) else (argument, argument) for argument in arguments]
        first, second = (part(*half) for part, half in zip(self.parts, zip(*halves)))
        if isinstance(first, torch.Tensor):
            return torch.cat([first, second])
        return [None if ours is None else torch.cat([ours, theirs]) for ours, theirs in zip(first, second)]
