"""A student's config and tensors -> what ComfyUI reads: a check of its shape, and Wan's own names.

ComfyUI derives a Wan from the shapes of its tensors (comfy/model_detection.py) and takes everything else as in the
published ones: heads of 128 channels, prompts of UMT5-XXL. It does not check that this holds. No torch is imported
before it is needed.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files.json_files import shorten
from ..student.config import check_sizes
from ..teacher.expert_config import HEAD_SIZE
from ..teacher.keys import official_name

if TYPE_CHECKING:
    import torch

TEXT_DIM, FREQ_DIM, PATCH, EPS = 4096, 256, (1, 2, 2), 1e-6  # of every Wan; ComfyUI assumes them
DTYPES = ("bfloat16", "float32", "float8")
SCALED = (".q.weight", ".k.weight", ".v.weight", ".o.weight", ".ffn.0.weight", ".ffn.2.weight")
# Two values select full precision for products, an empty tensor would select float8 (comfy/utils.py).
FP8_MARK, FP8_MARK_SIZE = "scaled_fp8", 2
REPOSITORY = "https://huggingface.co/Comfy-Org/Wan_2.{}_ComfyUI_{}epackaged/resolve/main/split_files/"


class ModelFile(NamedTuple):
    """A file that ComfyUI needs beside the student: its folder in models/, its name, and where to download it."""

    folder: str
    name: str
    url: str


def _model_file(folder: str, name: str, version: int = 1) -> ModelFile:
    repository = REPOSITORY.format(version, "r" if version == 1 else "R")
    return ModelFile(folder, name, f"{repository}{folder}/{name}")


TEXT_ENCODER = _model_file("text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
AUTOENCODERS = {  # by latent channels
    16: _model_file("vae", "wan_2.1_vae.safetensors"),
    48: _model_file("vae", "wan2.2_vae.safetensors", version=2),
}


def check_runnable(config: Mapping[str, Any], source: object) -> None:
    """Raise ValueError, naming the flags to train with, for a student that ComfyUI would run as another network.

    `config` is that of a saved student's config.json, unchecked.
    """
    names = ("num_attention_heads", "attention_head_dim", "in_channels", "text_dim")
    check_sizes({name: config.get(name) for name in names})
    heads, size, channels, text = (config[name] for name in names)
    width = heads * size
    others = {"freq_dim": FREQ_DIM, "patch_size": list(PATCH), "eps": EPS, "cross_attn_norm": True}
    reasons = []
    if width % HEAD_SIZE:
        reasons.append(
            f"its width is {width}, and ComfyUI needs a multiple of {HEAD_SIZE}; train with --hidden_size "
            f"{max(HEAD_SIZE, round(width / HEAD_SIZE) * HEAD_SIZE)} and heads of {HEAD_SIZE}"
        )
    elif size != HEAD_SIZE:
        reasons.append(
            f"it has {heads} heads of {size} channels, and ComfyUI runs every Wan with heads of {HEAD_SIZE}; train "
            f"with --num_heads {width // HEAD_SIZE}"
        )
    if text != TEXT_DIM:
        reasons.append(
            f"its prompt embeddings have {text} channels, those of ComfyUI's UMT5-XXL {TEXT_DIM}; train with a real "
            "Wan as --teacher"
        )
    if channels not in AUTOENCODERS:
        reasons.append(f"its latents have {channels} channels, those of ComfyUI's Wan autoencoders 16 or 48")
    reasons += [
        f"its {name} is {shorten(config.get(name))}, that of every Wan {value}"
        for name, value in others.items()
        if config.get(name) != value
    ]
    if reasons:
        raise ValueError(f"{source}: ComfyUI cannot run this student: {'; '.join(reasons)}.")


def comfyui_tensors(tensors: "Mapping[str, torch.Tensor]", dtype: str) -> "dict[str, torch.Tensor]":
    """Return {Wan's own name: tensor} of a student's {diffusers' name: tensor}.

    With `dtype` "float8", the matrices of the blocks are float8 with a scale each, as in ComfyUI's scaled_fp8
    files, and all other tensors bfloat16.
    """
    import torch

    plain = torch.float32 if dtype == "float32" else torch.bfloat16
    renamed = {official_name(name): tensor for name, tensor in tensors.items()}
    if dtype != "float8":
        return {name: tensor.to(plain) for name, tensor in renamed.items()}
    exported = {FP8_MARK: torch.zeros(FP8_MARK_SIZE, dtype=torch.float8_e4m3fn)}
    for name, tensor in renamed.items():
        if name.endswith(SCALED):
            scaled, scale = _scale(tensor.float())
            exported |= {name: scaled, f"{name.removesuffix('.weight')}.scale_weight": scale}
        else:
            exported[name] = tensor.to(plain)
    return exported


def _scale(weight: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Return (float8, float32 scale) of a matrix, which is their product."""
    import torch

    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (weight.abs().max() / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale).to(torch.float8_e4m3fn), scale
