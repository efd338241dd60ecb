"""Wan's video autoencoder -> the same function of one frame, with 2-D convolutions in the channels_last format.

The causal padding before a first frame is zero, so that only the last temporal tap of each kernel contributes, and no
features are stored for later frames.

Legend: B batch, C channels, H W height and width of any layer.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanUpBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn
from torch.nn import functional as F

MIN_LENGTH = 1e-12  # that the stock norm divides by: a vector of zeros stays zero


class SingleFrameAutoencoder(nn.Module):
    """Encodes and decodes single frames as an AutoencoderKLWan, with its own copy of the weights that contribute."""

    def __init__(self, autoencoder: Any):
        super().__init__()
        self.config = autoencoder.config
        encoder, decoder = autoencoder.encoder, autoencoder.decoder
        self.encoder = _sequence(
            [encoder.conv_in, *encoder.down_blocks, encoder.mid_block],
            Head(encoder),
            fold(autoencoder.quant_conv),
        )
        self.decoder = _sequence(
            [autoencoder.post_quant_conv, decoder.conv_in, decoder.mid_block, *decoder.up_blocks],
            Head(decoder),
        )
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the mean of the raw latents (B, C, H, W) of pixels (B, 3, S*H, S*W)."""
        if self.config.patch_size is not None:
            pixels = _as_frame(partial(patchify, patch_size=self.config.patch_size), pixels)
        return self.encoder(_channels_last(pixels.to(self.dtype)))[:, : self.config.z_dim].float()

    def decode(self, raw_latents: Tensor) -> Tensor:
        """Return the pixels (B, 3, S*H, S*W) of raw latents (B, C, H, W)."""
        pixels = self.decoder(_channels_last(raw_latents.to(self.dtype)))
        if self.config.patch_size is not None:
            pixels = _as_frame(partial(unpatchify, patch_size=self.config.patch_size), pixels)
        return pixels.float().clamp_(-1, 1)


class Convolution(nn.Module):
    """A convolution of stock weights (out, in, height, width)."""

    def __init__(self, weight: Any, bias: Any, stride: Any, padding: Any):
        super().__init__()
        self.weight = nn.Parameter(_channels_last(weight.detach()))
        self.bias = nn.Parameter(bias.detach())
        self.stride, self.padding = stride, padding

    def forward(self, states: Tensor) -> Tensor:
        return F.conv2d(states, self.weight, self.bias, self.stride, self.padding)


class Norm(nn.Module):
    """WanRMS_norm over the channels, which are adjacent in memory."""

    def __init__(self, norm: Any):
        super().__init__()
        self.gamma = nn.Parameter(norm.gamma.detach().flatten())

    def forward(self, states: Tensor) -> Tensor:
        states = states.permute(0, 2, 3, 1)  # (B, H, W, C)
        if states.device.type != "cpu":
            normed = F.rms_norm(states, self.gamma.shape, weight=self.gamma, eps=MIN_LENGTH**2)
        else:  # without a fused kernel, rms_norm() takes twice the time and three times the memory
            length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
            scale = len(self.gamma) ** 0.5 / length.clamp_(min=MIN_LENGTH)
            normed = (states * scale.to(states.dtype)).mul_(self.gamma)
        return normed.permute(0, 3, 1, 2)


class Head(nn.Module):
    """The last norm, activation and convolution of an encoder or a decoder."""

    def __init__(self, coder: Any):
        super().__init__()
        self.norm, self.convolution = Norm(coder.norm_out), fold(coder.conv_out)

    def forward(self, states: Tensor) -> Tensor:
        return self.convolution(F.silu(self.norm(states), inplace=True))


class ResidualBlock(nn.Module):
    """WanResidualBlock."""

    def __init__(self, block: Any):
        super().__init__()
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        self.conv1, self.conv2 = fold(block.conv1), fold(block.conv2)
        self.shortcut = fold(block.conv_shortcut)

    def forward(self, states: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(states), inplace=True))
        inner = self.norm2(inner)
        inner = self.conv2(F.silu(inner, inplace=True))
        return inner.add_(self.shortcut(states))


class AttentionBlock(nn.Module):
    """WanAttentionBlock: self-attention of the frame's places, with one head."""

    def __init__(self, block: Any):
        super().__init__()
        self.norm, self.to_qkv, self.proj = Norm(block.norm), fold(block.to_qkv), fold(block.proj)

    def forward(self, states: Tensor) -> Tensor:
        joint = self.to_qkv(self.norm(states)).permute(0, 2, 3, 1)  # (B, H, W, 3C)
        query, key, value = joint.flatten(1, 2).unsqueeze(1).chunk(3, dim=-1)  # (B, 1, HW, C)
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = attended.reshape(*joint.shape[:3], -1).permute(0, 3, 1, 2)
        return self.proj(attended).add_(states)


class Upsample(nn.Module):
    """Repeats each place in both directions, then a convolution 3 x 3, as one transposed convolution.

    It needs 16 products a place for the 36 of the two, and no repeated places in memory.
    """

    def __init__(self, convolution: Any):
        super().__init__()
        weight = convolution.weight.detach().transpose(0, 1).flip(2, 3)  # (in, out, 3, 3)
        # A repeated place meets the sums of 2 x 2 neighbouring taps.
        kernel = F.avg_pool2d(F.pad(weight, (1, 1, 1, 1)), 2, stride=1, divisor_override=1)
        self.weight = nn.Parameter(_channels_last(kernel))  # (in, out, 4, 4)
        self.bias = nn.Parameter(convolution.bias.detach())

    def forward(self, states: Tensor) -> Tensor:
        return F.conv_transpose2d(states, self.weight, self.bias, stride=2, padding=1)


class Downsample(nn.Module):
    """A convolution of stride 2, padded at the right and the bottom."""

    def __init__(self, convolution: Any):
        super().__init__()
        self.convolution = fold(convolution)

    def forward(self, states: Tensor) -> Tensor:
        return self.convolution(F.pad(states, (0, 1, 0, 1)))


class WithShortcut(nn.Module):
    """Adds the averaged or repeated input to the output of `layers`, as Wan2.2's autoencoder does."""

    def __init__(self, layers: nn.Module, shortcut: Callable):
        super().__init__()
        self.layers, self.shortcut = layers, shortcut

    def forward(self, states: Tensor) -> Tensor:
        return self.layers(states).add_(_as_frame(self.shortcut, states))


def fold(module: nn.Module) -> nn.Module:
    """Return the module for one frame in place of a module of diffusers' AutoencoderKLWan."""
    return _FOLD[type(module)](module)


def _sequence(stock: Iterable[nn.Module], *own: nn.Module) -> nn.Sequential:
    """Return the folded `stock` modules, followed by modules of this file."""
    folded = [*map(fold, stock), *own]
    # Flat, because a nested sequence would keep its input until its end.
    parts = (each if isinstance(each, nn.Sequential) else [each] for each in folded)
    return nn.Sequential(*chain.from_iterable(parts))


def _fold_causal(convolution: Any) -> Convolution:
    left, _, top, *_ = convolution._padding
    return Convolution(convolution.weight[:, :, -1], convolution.bias, convolution.stride[1:], (top, left))


def _fold_resample(resample: Any) -> nn.Module:
    kind = Upsample if resample.mode.startswith("upsample") else Downsample
    return kind(resample.resample[1])


def _fold_middle(block: Any) -> nn.Module:
    first, *others = block.resnets
    pairs = zip(block.attentions, others, strict=True)
    return _sequence([first, *(module for pair in pairs for module in pair)])


def _fold_residual_down(block: Any) -> nn.Module:
    return WithShortcut(_sequence(filter(None, [*block.resnets, block.downsampler])), block.avg_shortcut)


def _fold_residual_up(block: Any) -> nn.Module:
    layers = _sequence(filter(None, [*block.resnets, block.upsampler]))
    if block.avg_shortcut is None:
        return layers
    return WithShortcut(layers, partial(block.avg_shortcut, first_chunk=True))


_FOLD: dict[type, Callable[[Any], nn.Module]] = {
    WanCausalConv3d: _fold_causal,
    nn.Conv2d: lambda stock: Convolution(stock.weight, stock.bias, stock.stride, stock.padding),
    nn.Identity: lambda stock: stock,
    WanResidualBlock: ResidualBlock,
    WanAttentionBlock: AttentionBlock,
    WanResample: _fold_resample,
    WanMidBlock: _fold_middle,
    WanUpBlock: lambda stock: _sequence([*stock.resnets, *(stock.upsamplers or [])]),
    WanResidualDownBlock: _fold_residual_down,
    WanResidualUpBlock: _fold_residual_up,
}


def _as_frame(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply a function of videos (B, C, 1, H, W) to images (B, C, H, W)."""
    return function(images.unsqueeze(2)).squeeze(2)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)
