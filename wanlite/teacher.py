"""A Wan folder -> tensors, read one at a time, and guided one-frame velocities.

Official and diffusers layouts, both key dialects, two experts (A14B) or one (2.1, 5B); all is said in diffusers' words.
Legend: B batch, C channels, H W latent height and width, N image tokens, D width.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from torch import nn

from .network import OneFrameBlock, TextTokens, one_frame_velocity

BOUNDARY = 0.875  # Wan2.2 A14B: noise levels from here on belong to the high-noise expert
WEIGHTS = "diffusion_pytorch_model"

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


def diffusers_name(key):
    """Return diffusers' name for a tensor of either dialect; raises ValueError for a name that no Wan has."""
    name = key.removeprefix(_PREFIX)
    for pattern, template in _TO_DIFFUSERS:
        if pattern.match(name):
            return pattern.sub(template, name)
    if _IS_DIFFUSERS.match(name):
        return name
    raise ValueError(f"tensor {key!r} is no tensor of a text-to-video Wan transformer, in the official or in diffusers' names.")


# ---- files -------------------------------------------------------------------------------------------------------------

@dataclass
class ExpertFiles:
    """One network on disk: its config in diffusers' words, and where each tensor lies."""

    name: str                                     # "high", "low", or "only"
    folder: Path
    config: dict
    places: dict = field(repr=False)              # diffusers' name -> (file, name in the file, shape)

    def read(self, name, dtype=torch.float32):
        """Read one tensor by diffusers' name."""
        path, stored_name, _ = self.places[name]
        with safe_open(path, "pt") as file:
            return file.get_tensor(stored_name).to(dtype)

    def shape(self, name):
        return self.places[name][2]

    @property
    def width(self):
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def num_parameters(self):
        return sum(torch.Size(shape).numel() for *_, shape in self.places.values())


@dataclass
class TeacherFiles:
    """A Wan folder, read as far as its headers."""

    folder: Path
    layout: str                                   # "official" or "diffusers"
    experts: dict                                 # "high" and "low", or "only"
    boundary: float | None

    @property
    def config(self):
        return next(iter(self.experts.values())).config

    @property
    def num_parameters(self):
        return sum(expert.num_parameters for expert in self.experts.values())

    @property
    def fingerprint(self):
        """A sha256 over every expert's files: the whole of a small one, 64 samples of a large one."""
        digest = hashlib.sha256()
        for expert in self.experts.values():
            for path in sorted({path for path, *_ in expert.places.values()}):
                digest.update(f"{expert.name} {path.name} {path.stat().st_size}".encode())
                with open(path, "rb") as file:
                    for start in range(0, path.stat().st_size, max(1 << 20, path.stat().st_size // 64)):
                        file.seek(start)
                        digest.update(file.read(1 << 20))
        return digest.hexdigest()


def open_teacher_files(folder):
    """Find the experts in a Wan folder and check their headers; no tensor is read.

    Raises OSError for what is missing or cut short and ValueError for what belongs to no or to another Wan.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise OSError(f"{folder}: no such folder. Expected a Wan checkpoint: transformer/ and transformer_2/ (diffusers) or "
                      "high_noise_model/ and low_noise_model/ (official).")
    index_path = folder / "model_index.json"
    index = _read_json(index_path) if index_path.exists() else {}
    pairs = {"official": ("high_noise_model", "low_noise_model"), "diffusers": ("transformer", "transformer_2")}
    for layout, (high, low) in pairs.items():
        if (folder / high).is_dir() and (folder / low).is_dir():
            experts = {"high": _open_expert("high", folder / high), "low": _open_expert("low", folder / low)}
            if experts["high"].config != experts["low"].config:
                raise ValueError(f"{folder}: {high} and {low} differ in size; they are experts of two teachers.")
            return TeacherFiles(folder, layout, experts, _boundary(index, index_path))
    promised = [name for name in ("transformer", "transformer_2") if (index.get(name) or [None])[0] is not None]
    lonely = [name for name in pairs["official"] if (folder / name).is_dir()]
    for name in (*promised, *(("high_noise_model", "low_noise_model") if lonely else ())):
        if not (folder / name).is_dir():
            raise OSError(f"{folder}: {name}/ is missing, the other expert is there. Download the folder again.")
    for layout, only in (("diffusers", folder / "transformer"), ("official", folder)):
        if (only / "config.json").is_file():
            expert = _open_expert("only", only)
            return TeacherFiles(folder, layout, {"only": expert}, None)
    raise OSError(f"{folder}: no Wan transformer. Expected transformer/ or high_noise_model/; found "
                  f"{', '.join(sorted(entry.name for entry in folder.iterdir())[:8]) or 'nothing'}.")


def _boundary(index, path):
    boundary = BOUNDARY if index.get("boundary_ratio") is None else index["boundary_ratio"]
    if isinstance(boundary, bool) or not isinstance(boundary, (int, float)) or not 0 <= boundary <= 1:
        raise ValueError(f"{path}: boundary_ratio is {boundary!r}, expected a noise level from 0 to 1; A14B has {BOUNDARY}.")
    return float(boundary)


def _open_expert(name, folder):
    places = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    standard = diffusers_name(key)
                    if standard in places:
                        raise ValueError(f"{folder}: {key} stands in {places[standard][0].name} and in {path.name}. Keep the "
                                         "files of one download, in one precision.")
                    places[standard] = (path, key, tuple(file.get_slice(key).get_shape()))
        except SafetensorError as error:
            raise OSError(f"{path}: not a whole safetensors file ({error}). Download it again.") from None
    config = _config_in_diffusers_words(folder, places)
    with init_empty_weights():
        expected = {key: tuple(tensor.shape) for key, tensor in WanTransformer3DModel(**config).state_dict().items()}
    missing, unknown = sorted(expected.keys() - places.keys()), sorted(places.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"{folder}: tensors differ from what its config.json implies; missing {missing[:3]} "
                         f"({len(missing)}), unknown {unknown[:3]} ({len(unknown)}). A shard is absent or of another Wan.")
    for key, (path, _, shape) in places.items():
        if shape != expected[key]:
            raise ValueError(f"{path}: {key} is {shape}, config.json implies {expected[key]}. The shard is of another Wan.")
    return ExpertFiles(name, folder, config, places)


def _weight_files(folder):
    """Return the safetensors files of one expert: those that an index promises, or the only one."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise OSError(f"{folder}: holds no .safetensors file. Download the expert again.")
        return files
    weight_map = _read_json(indexes[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{indexes[0]}: has no weight_map, expected tensor names and their shards. Download it again.")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{indexes[0]}: names the shard {name!r}, expected a file beside it.")
        if not (folder / name).is_file():
            raise OSError(f"{folder}: shard {name} is missing, {indexes[0].name} promises it. Download it again.")
    return [folder / name for name in names]


def _config_in_diffusers_words(folder, places):
    config = _read_json(folder / "config.json")
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

class Teacher(nn.Module):
    """The frozen teacher: the guided velocity at this noise level for these text tokens."""

    def __init__(self, files, device="cpu", dtype=torch.float32):
        super().__init__()
        self.files, self.config, self.boundary = files, files.config, files.boundary
        self.experts = nn.ModuleDict({name: load_expert(expert, device, dtype) for name, expert in files.experts.items()})

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
        expert = self.experts["only" if self.boundary is None else "high" if high else "low"]
        guidance = guidance_high if high else guidance_low
        if guidance <= 1.0:
            return ask(expert, latents, timestep, text, feature_blocks)
        assert negative is not None, "guidance needs the negative prompt's tokens"
        velocity, features = ask(expert, latents.repeat(2, 1, 1, 1), timestep.repeat(2), _stack_text(text, negative),
                                  feature_blocks)
        wanted, unwanted = velocity.chunk(2)
        return unwanted + guidance * (wanted - unwanted), [states.chunk(2)[0] for states in features]

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


def ask(expert, latents, timestep, text, feature_blocks=()):
    """Run one expert in its own dtype; timesteps and the velocity are float32."""
    dtype = expert.patch_embedding.weight.dtype
    velocity, features = one_frame_velocity(expert, latents.to(dtype), timestep.float(), text.tokens.to(dtype),
                                            text.logit_bias, feature_blocks)
    return velocity.float(), features


def load_expert(files, device="cpu", dtype=torch.float32):
    """Load one expert, frozen: a stock WanTransformer3DModel whose blocks take the text's logit bias."""
    config = files.config
    with init_empty_weights():                            # parameters without memory; the rotary tables are real
        network = WanTransformer3DModel(**config)
        network.blocks = nn.ModuleList(_empty_block(files) for _ in range(config["num_layers"]))
    stays = WanTransformer3DModel._keep_in_fp32_modules
    tensors = {name: files.read(name, torch.float32 if set(name.split(".")) & set(stays) else dtype).to(device)
               for name in files.places}
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.to(device).eval().requires_grad_(False)


def stream_expert(files):
    """Load one expert without its blocks, in float32 on the CPU; each pass reads them from disk, one in memory at a time."""
    with init_empty_weights():
        network = WanTransformer3DModel(**files.config | {"num_layers": 0})
    network.load_state_dict({name: files.read(name) for name in files.places if not name.startswith("blocks.")},
                            strict=True, assign=True)
    network.blocks = _StreamedBlocks(files)
    return network.eval().requires_grad_(False)


class _StreamedBlocks(nn.Module):
    def __init__(self, files):
        super().__init__()
        self.files = files

    def __iter__(self):
        for index in range(self.files.config["num_layers"]):
            with init_empty_weights():
                block = _empty_block(self.files)
            prefix = f"blocks.{index}."
            block.load_state_dict({name.removeprefix(prefix): self.files.read(name) for name in self.files.places
                                   if name.startswith(prefix)}, strict=True, assign=True)
            yield block.eval().requires_grad_(False)


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
