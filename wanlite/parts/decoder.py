"""Distillation of a narrow decoder: the wide decoder's images of a student's latents are its targets.

No images are needed. The loss compares pixels and their differences to neighbours at several sizes, because squared
error alone forgives blur.

Legend: B images, C channels, H W latent height and width, S spatial stride.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..data.autoencoder import decode_latents, raw_latents
from ..data.single_frame import SingleFrameAutoencoder

CROP = 32  # latents along a side of a training crop, at most
SIZES = 3  # the image and its halves, whose differences to neighbours are compared
GRADIENT_WEIGHT = 1.0


def decoder_loss(
    wide: SingleFrameAutoencoder,
    narrow: Any,
    latents: Tensor,
    batch_size: int,
    compare: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Callable[[torch.Generator], Tensor]:
    """Return the loss of a batch of crops of `latents` (n, C, H, W), as a function of a random generator.

    `compare(pixels, target)` is image_loss() by default.
    """
    compare = compare or image_loss

    def loss(generator):
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        crops = crop(latents[rows], generator).to(narrow.device)
        with torch.no_grad():
            target = decode_latents(wide, crops)
        return compare(decode_frames(narrow, crops), target)

    return loss


@contextmanager
def convolutions_as_matrices(decoder: Any) -> Iterator[None]:
    """Store each convolution as the matrix (out, in * height * width) of its last temporal tap, within the context.

    Muon trains matrices, and earlier taps stay zero.
    """
    convolutions = [each for each in decoder.modules() if isinstance(each, (nn.Conv2d, nn.Conv3d))]
    for convolution in convolutions:
        kernel = LastTap(convolution.weight.shape)
        parametrize.register_parametrization(convolution, "weight", kernel, unsafe=True)
    try:
        yield
    finally:
        for convolution in convolutions:
            parametrize.remove_parametrizations(convolution, "weight")


class LastTap(nn.Module):
    """A matrix as the weights of a convolution, (out, in, height, width) or (out, in, frames, height, width)."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape = shape

    def forward(self, matrix: Tensor) -> Tensor:
        out, inner, *frames, height, width = self.shape
        kernel = matrix.view(out, inner, *(1 for _ in frames), height, width)
        return F.pad(kernel, (0, 0, 0, 0, frames[0] - 1, 0)) if frames else kernel

    def right_inverse(self, weight: Tensor) -> Tensor:
        return (weight[:, :, -1] if weight.ndim == 5 else weight).flatten(1).clone()


def crop(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Return a crop (B, C, h, w) of latents at a random place."""
    sizes = [min(CROP, side) for side in latents.shape[-2:]]
    tops = [
        int(torch.randint(side - size + 1, (1,), generator=generator))
        for side, size in zip(latents.shape[-2:], sizes)
    ]
    return latents[..., tops[0] : tops[0] + sizes[0], tops[1] : tops[1] + sizes[1]]


def decode_frames(autoencoder: Any, latents: Tensor) -> Tensor:
    """Decode latents (B, C, H, W) with an AutoencoderKLWan that is being trained, to pixels (B, 3, S*H, S*W)."""
    raw = raw_latents(autoencoder, latents).unsqueeze(2)
    pixels = autoencoder.decoder(autoencoder.post_quant_conv(raw), first_chunk=True)
    if autoencoder.config.patch_size is not None:
        pixels = unpatchify(pixels, autoencoder.config.patch_size)
    return pixels.squeeze(2)


def image_loss(pixels: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute error of pixels (B, 3, h, w), and of their differences at SIZES sizes."""
    loss = F.l1_loss(pixels, target)
    for number in range(SIZES):
        if number:
            pixels, target = F.avg_pool2d(pixels, 2), F.avg_pool2d(target, 2)
        for dim in (-1, -2):
            loss = loss + GRADIENT_WEIGHT / SIZES * F.l1_loss(pixels.diff(dim=dim), target.diff(dim=dim))
    return loss


def clipped_error(pixels: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of an image (B, 3, h, w), whose pixels are clipped, as those of `target`."""
    return F.mse_loss(pixels.clamp(-1, 1), target)


@torch.no_grad()
def peak_signal_to_noise(
    wide: SingleFrameAutoencoder, narrow: SingleFrameAutoencoder, latents: Tensor
) -> float:
    """Return the PSNR in dB of the narrow decoder's images of latents (B, C, H, W), to the wide decoder's."""
    target, pixels = (decode_latents(each, latents.to(each.device)) for each in (wide, narrow))
    return float(-10 * ((pixels - target) / 2).square().mean().log10())  # pixels are -1..1
