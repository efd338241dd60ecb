"""Construction of a student: a checked shape -> config, layers and random weights."""

import math
from inspect import signature

import torch
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTimeTextImageEmbedding
from torch import nn

from ..network import OneFrameBlock, PatchEmbedding


def config_defaults(student_class):
    """Return {name: default} of the arguments that form a student's config."""
    parameters = signature(student_class.__init__).parameters.values()
    ignored = ("self", *student_class.ignore_for_config)
    return {parameter.name: parameter.default for parameter in parameters if parameter.name not in ignored}


def complete_config(shape):
    """Return a student's config: `shape` under our names and, for stock diffusers, under Wan's names."""
    _, height, width = shape["patch_size"]
    return {
        **shape,
        "patch_size": (1, height, width),
        "num_attention_heads": shape["num_heads"],
        "attention_head_dim": shape["hidden_size"] // shape["num_heads"],
        "num_layers": shape["depth"],
        "in_channels": shape["num_channels"],
        "out_channels": shape["num_channels"],
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    }


def add_layers(student):
    """Add the layers of a WanTransformer3DModel, with OneFrameBlocks, to a student that has its config."""
    config = student.config
    width, patch_size = config.hidden_size, config.patch_size
    student.rope = WanRotaryPosEmbed(config.attention_head_dim, patch_size, config.rope_max_seq_len)
    student.patch_embedding = PatchEmbedding(config.num_channels, width, patch_size, patch_size)
    student.condition_embedder = WanTimeTextImageEmbedding(width, config.freq_dim, 6 * width, config.text_dim)
    student.blocks = nn.ModuleList(
        OneFrameBlock(
            width, config.ffn_dim, config.num_heads, config.qk_norm, config.cross_attn_norm, config.eps
        )
        for _ in range(config.depth)
    )
    student.norm_out = FP32LayerNorm(width, config.eps, elementwise_affine=False)
    student.proj_out = nn.Linear(width, config.num_channels * math.prod(patch_size))
    student.scale_shift_table = nn.Parameter(torch.empty(1, 2, width))
    student.gradient_checkpointing = False


@torch.no_grad()
def initialize_weights(student):
    """Set random weights, as a stock WanTransformer3DModel does; the output layer is zero."""
    for table in [student.scale_shift_table, *(block.scale_shift_table for block in student.blocks)]:
        nn.init.normal_(table, std=student.config.hidden_size**-0.5)
    nn.init.zeros_(student.proj_out.weight)
    nn.init.zeros_(student.proj_out.bias)
