"""An image to change, and the mask of the places to repaint -> the start of a solve, and the latents that it keeps.

An image enters the solve at the noise level of an inner step, mixed with the noise of its seed. With a mask, the
latents of all other places are replaced after each step by the image at the new noise level, as in diffusers'
pipelines for inpainting of flow models (RePaint, Lugmayr et al. 2022, without resampling).

Legend: B images, N given images, C channels, H W latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..flow import add_noise

WHITE = 0.5  # from this value on, a pixel of a mask is repainted


class Source(NamedTuple):
    """The given images as pixels (N, 3, height, width) in -1..1, and masks (N, 1, height, width) of 0 and 1."""

    pixels: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Edit:
    """A solve that begins at step `begin` from the latents `clean` (B, C, H, W), mixed with `noise` of this shape.

    Places where `mask` (B, 1, H, W) is 0 keep their latents.
    """

    clean: Tensor
    noise: Tensor
    mask: Tensor | None
    begin: int

    def start(self, noise_level: Tensor) -> Tensor:
        """Return the latents (B, C, H, W) before the first step; those of step 0 are the noise alone."""
        return self.noise if self.begin == 0 else self._at(noise_level)

    def keep(self, latents: Tensor, noise_level: Tensor) -> Tensor:
        """Return latents (B, C, H, W) with the image at a noise level in all places that are not repainted."""
        return latents if self.mask is None else torch.where(self.mask > 0, latents, self._at(noise_level))

    def _at(self, noise_level: Tensor) -> Tensor:
        return add_noise(self.clean, self.noise, noise_level.to(self.clean).expand(len(self.clean)))


def read_source(image: Any, mask_image: Any, size: tuple[int, int]) -> Source | None:
    """Return the given image and mask of a size (width, height) in pixels, None without an image.

    Each is a PIL image, an array or a tensor, with the channels last or first, of uint8 or of 0..1; a batch of
    these, or a list. Masks have one channel or none. Raises ValueError for others.
    """
    if image is None:
        if mask_image is not None:
            raise ValueError("mask_image is given without an image. Pass image, or leave mask_image out.")
        return None
    pixels = _read_images(image, "image", 3, size)
    if mask_image is None:
        return Source(2 * pixels - 1, None)
    mask = (_read_images(mask_image, "mask_image", 1, size) >= WHITE).float()
    if len(mask) not in (1, len(pixels)):
        raise ValueError(f"there are {len(mask)} masks for {len(pixels)} images, expected one or as many.")
    return Source(2 * pixels - 1, mask)


def encode_source(
    source: Source, encode: Callable[[Tensor], Tensor], noise: Tensor, num_images: int, begin: int
) -> Edit:
    """Return the edit of images by the noise (B, C, H, W), `num_images` of each prompt; `encode` returns latents."""
    num_prompts = len(noise) // num_images
    if len(source.pixels) not in (1, num_prompts):
        raise ValueError(
            f"there are {len(source.pixels)} images for {num_prompts} prompts, expected one or as many."
        )
    clean = _repeat(encode(source.pixels).to(noise), noise)
    mask = None if source.mask is None else shrink_mask(source.mask, noise.shape[-2:]).to(noise)
    return Edit(clean, noise, None if mask is None else _repeat(mask, noise), begin)


def shrink_mask(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a mask (N, 1, height, width) at latent places (N, 1, H, W): 1 where any of the pixels is."""
    return F.adaptive_max_pool2d(mask, size)


def _repeat(tensor, noise):
    """Return the rows (N, ...) of a tensor for B images, those of a prompt in succession."""
    return tensor.repeat_interleave(len(noise) // len(tensor), 0)


def _read_images(images, name, channels, size):
    """Return given images or masks as (N, channels, height, width) in 0..1; `name` is the argument in errors."""
    items = images if isinstance(images, (list, tuple)) else [images]
    if not items:
        raise ValueError(f"{name} is an empty list, expected at least one.")
    width, height = size
    found = []
    for item in items:
        pixels = _read_image(item, name, channels)
        if pixels.shape[-2:] != (height, width):
            raise ValueError(
                f"{name} is {pixels.shape[-1]} x {pixels.shape[-2]}, expected {width} x {height}. Resize it, or "
                "pass its width and height."
            )
        found.append(pixels)
    return torch.cat(found)


def _read_image(item, name, channels):
    if isinstance(item, Image.Image):
        item = np.asarray(item.convert("RGB" if channels == 3 else "L"))
    if (
        not isinstance(item, (np.ndarray, Tensor))
        or isinstance(item, np.ndarray)
        and item.dtype.kind not in "buf"
    ):
        kind = f"an array of {item.dtype}" if isinstance(item, np.ndarray) else type(item).__name__
        raise ValueError(
            f"{name} is {kind}, expected a PIL image, an array or a tensor of uint8 or of 0 to 1."
        )
    copied = torch.from_numpy(item.copy()) if isinstance(item, np.ndarray) else item  # Pillow's are read-only
    pixels = _as_batch(copied, channels)
    if pixels is None:
        layouts = f"(height, width, {channels}) or ({channels}, height, width)"
        raise ValueError(
            f"{name} has the shape {tuple(item.shape)}, expected {layouts}, or a batch of these."
        )
    pixels = pixels.float() / (255 if pixels.dtype == torch.uint8 else 1)
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # as with NaN
        raise ValueError(f"{name} has values from {pixels.min():.3g} to {pixels.max():.3g}, expected 0 to 1.")
    return pixels


def _as_batch(pixels, channels):
    """Return pixels as (N, channels, height, width), None if their shape is another; a mask needs no channels."""
    if pixels.ndim > 2 and pixels.shape[-1] == channels:
        pixels = pixels.movedim(-1, -3)
    elif channels == 1 and (pixels.ndim == 2 or pixels.ndim == 3 and len(pixels) > 1):
        pixels = pixels.unsqueeze(-3)
    pixels = pixels.unsqueeze(0) if pixels.ndim == 3 else pixels
    return pixels if pixels.ndim == 4 and pixels.shape[1] == channels and pixels.numel() else None
