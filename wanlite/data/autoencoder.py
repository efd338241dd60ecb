"""Pixels <-> latents for single images, with Wan's own video autoencoder.

Legend: B batch, C latent channels, H W latent height and width, S spatial stride (8 for A14B). Pixels are
-1..1.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor
from torch.nn import functional as F

from .component_files import load_component
from .single_frame import SingleFrameAutoencoder

DECODED_AT_ONCE = 2**20  # pixels: four images of 512 x 512, which take 1.3 GB in Wan2.1's autoencoder


def load_autoencoder(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> SingleFrameAutoencoder:
    """Load the single-frame form of the AutoencoderKLWan in a folder's vae/, frozen."""
    return SingleFrameAutoencoder(load_video_autoencoder(folder)).to(device, dtype)


def load_video_autoencoder(folder: str | Path) -> Any:
    """Load the AutoencoderKLWan in a folder's vae/ on the CPU in float32, checked."""
    return load_component("vae", folder, dtype=torch.float32)


def make_autoencoder(config: dict) -> SingleFrameAutoencoder:
    """Return a single-frame autoencoder with new weights."""
    return SingleFrameAutoencoder(AutoencoderKLWan.from_config(config))


def use_single_frame_path(autoencoder: Any) -> Any:
    """Compute causal 3-D convolutions of a single frame as 2-D ones, to train the weights of an AutoencoderKLWan."""
    for module in autoencoder.modules():
        if isinstance(module, WanCausalConv3d):
            module.forward = partial(_one_frame_convolution, module)  # type: ignore[method-assign]
    return autoencoder


def _one_frame_convolution(convolution, frames, cache=None):
    if frames.shape[2] != 1 or cache is not None:
        return WanCausalConv3d.forward(convolution, frames, cache)
    left, _, top, *_ = convolution._padding
    return F.conv2d(
        frames[:, :, 0], convolution.weight[:, :, -1], convolution.bias, convolution.stride[1:], (top, left)
    ).unsqueeze(2)


def encode_images(
    autoencoder: SingleFrameAutoencoder, pixels: Tensor, max_pixels: int = DECODED_AT_ONCE
) -> Tensor:
    """Encode pixels (B, 3, S*H, S*W) to latents (B, C, H, W), at most `max_pixels` at a time.

    Latents are the posterior's mean, normalised per channel.
    """
    chunks = pixels.split(max(1, max_pixels // (pixels.shape[-2] * pixels.shape[-1])))
    raw = torch.cat([autoencoder.encode(chunk) for chunk in chunks])
    mean, std = _statistics(autoencoder, raw)
    return (raw - mean) / std


def decode_latents(autoencoder: SingleFrameAutoencoder, latents: Tensor) -> Tensor:
    """Decode latents (B, C, H, W) to pixels (B, 3, S*H, S*W)."""
    pixels = latents.shape[-2] * latents.shape[-1] * autoencoder.config.scale_factor_spatial**2
    chunks = raw_latents(autoencoder, latents).split(max(1, DECODED_AT_ONCE // pixels))
    return torch.cat([autoencoder.decode(chunk) for chunk in chunks])


def raw_latents(autoencoder: Any, latents: Tensor) -> Tensor:
    """Return latents (B, C, H, W) as the autoencoder decodes them, not normalised."""
    mean, std = _statistics(autoencoder, latents)
    return latents * std + mean


def _statistics(autoencoder, latents):
    """Return the mean and std of each channel (1, C, 1, 1), from the autoencoder's config."""
    return (
        latents.new_tensor(values).view(1, -1, 1, 1)
        for values in (autoencoder.config.latents_mean, autoencoder.config.latents_std)
    )


def to_pixels(images: np.ndarray) -> Tensor:
    """Convert images (B, height, width, 3) uint8 to pixels (B, 3, height, width)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """Convert pixels (B, 3, height, width) to images (B, height, width, 3) uint8."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
