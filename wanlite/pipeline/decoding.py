"""Latents <-> pixels, through the layers of the autoencoder for a single frame.

Legend: B images, C channels, H W latent height and width.
"""

from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils.modeling import get_state_dict_offloaded_model
from diffusers import AutoencoderKLWan
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from ..data.autoencoder import decode_latents, encode_images
from ..data.single_frame import SingleFrameAutoencoder
from ..runtime.devices import is_fast_in_bfloat16


def decode_pixels(vae: Any, latents: Tensor, student_dtype: torch.dtype) -> Tensor:
    """Decode latents (B, C, H, W) to pixels (B, 3, height, width) in -1..1.

    The layers are those of a single frame, unless the autoencoder is tiled or of another class.
    """
    if _needs_stock_layers(vae):
        return _decode_in_stock(vae, latents)
    return _decode_single_frames(vae, latents.float(), student_dtype)


def encode_pixels(vae: Any, pixels: Tensor, student_dtype: torch.dtype) -> Tensor:
    """Encode pixels (B, 3, height, width) in -1..1 to latents (B, C, H, W); see decode_pixels()."""
    if _needs_stock_layers(vae):
        return _encode_in_stock(vae, pixels)
    return _encode_single_frames(vae, pixels, student_dtype)


def _needs_stock_layers(vae: Any) -> bool:
    is_stock = type(vae) is AutoencoderKLWan
    return not is_stock or vae.use_tiling


def _decode_in_stock(vae, latents):
    mean, std = _statistics(vae, latents)
    raw_latents = (latents * std + mean).unsqueeze(2).to(vae.dtype)
    return vae.decode(raw_latents, return_dict=False)[0].squeeze(2).float().clamp(-1, 1)


def _encode_in_stock(vae, pixels):
    encoded = vae.encode(pixels.unsqueeze(2).to(vae.dtype), return_dict=False)[0]
    raw_latents = encoded.mode().squeeze(2).float()
    mean, std = _statistics(vae, raw_latents)
    return (raw_latents - mean) / std


def _statistics(vae, latents):
    """Return the mean and std of each channel (1, C, 1, 1), from the autoencoder's config."""
    return (
        latents.new_tensor(values).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )


@apply_forward_hook  # of an offloaded autoencoder
def _decode_single_frames(vae, latents, student_dtype):
    return decode_latents(fold_autoencoder(vae, latents.device, student_dtype), latents)


@apply_forward_hook
def _encode_single_frames(vae, pixels, student_dtype):
    return encode_images(fold_autoencoder(vae, pixels.device, student_dtype), pixels)


def fold_autoencoder(
    vae: Any, device: torch.device | str, student_dtype: torch.dtype
) -> SingleFrameAutoencoder:
    """Return the single-frame form of an autoencoder, with its own copy of the weights.

    After a student in bfloat16, an autoencoder in float32 computes in bfloat16 where that is fast.
    """
    is_half = student_dtype == torch.bfloat16 and is_fast_in_bfloat16(device)
    dtype = torch.bfloat16 if is_half and vae.dtype == torch.float32 else vae.dtype
    return SingleFrameAutoencoder(_with_weights(vae)).to(device, dtype)


def _with_weights(vae):
    """Return the autoencoder itself, or a copy of one whose weights are offloaded layer by layer."""
    if not any(tensor.is_meta for tensor in vae.parameters()):
        return vae
    with init_empty_weights():
        copy = AutoencoderKLWan.from_config(vae.config)
    copy.load_state_dict(get_state_dict_offloaded_model(vae), assign=True)
    return copy


def are_finite(latents: Tensor, pixels: Tensor) -> list[bool]:
    """Return for each image whether its latents and pixels are finite."""
    return [
        bool(torch.isfinite(each).all() and torch.isfinite(image).all())
        for each, image in zip(latents, pixels)
    ]


def refuse_not_finite(latents: Tensor, pixels: Tensor, student_dtype: torch.dtype) -> None:
    """Raise FloatingPointError if an image is not finite."""
    if numbers := [number for number, is_valid in enumerate(are_finite(latents, pixels)) if not is_valid]:
        raise FloatingPointError(
            f"images are not finite in {student_dtype}: {len(numbers)} of {len(pixels)}, first number "
            f"{numbers[0]}. Load the pipeline with dtype=torch.float32."
        )
