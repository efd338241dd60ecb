"""Quality of generated images: accuracy of captions, diversity over seeds, and likeness to the teacher's images."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..world import shapes

Generate = Callable[[Sequence[str]], np.ndarray]  # captions -> images (B, 64, 64, 3) uint8

# Limits (lowest, highest) of figures relative to the teacher's; a student beyond one is rejected. Diversity has
# no upper limit: it is higher in a student that does not yet follow its captions, and image_error shows that.
GUARDS = {"channel_drift": (0.0, 0.3), "saturation": (0.75, 1.33), "diversity": (0.6, math.inf)}


def prompt_accuracy(
    generate: Generate, captions: Sequence[str], world: Any = shapes
) -> dict[str, float | None]:
    """Judge the images of captions of a tiny world: fractions 0..1, overall, by attribute and by object count.

    Raises ValueError for a caption that is not of `world`, a module such as wanlite.world.shapes.
    """
    scenes = [world.read_caption(caption) for caption in captions]
    if None in scenes:
        raise ValueError(
            f"{captions[scenes.index(None)]!r}: the judge reads only captions of {world.__name__}. Take captions "
            f"from {world.__name__}.captions()."
        )
    began = time.perf_counter()
    images = generate(captions)
    seconds = (time.perf_counter() - began) / len(captions)
    verdicts = [world.judge(image, scene) for image, scene in zip(images, scenes)]
    counts = np.array([len(scene.objects) for scene in scenes])
    right = np.array([verdict[world.RIGHT] for verdict in verdicts])
    figures = {
        "accuracy": right.mean(),
        "accuracy_one": right[counts == 1].mean() if (counts == 1).any() else None,
        "accuracy_two": right[counts == 2].mean() if (counts == 2).any() else None,
        "seconds": seconds,
    }
    figures |= {
        name: np.mean([verdict[name] for verdict in verdicts]) for name in verdicts[0] if name != world.RIGHT
    }
    return {name: None if value is None else round(float(value), 4) for name, value in figures.items()}


def compare(
    teacher: Generate,
    students: Mapping[int, Generate],
    num_steps: int,
    captions: Sequence[str],
    world: Any = shapes,
) -> dict[str, Any]:
    """Judge teacher and student on the same captions; returns {} unless all captions are of the tiny world.

    `students` is {number of steps: function}; `num_steps` is the default number of steps.
    """
    if not all(world.read_caption(caption) for caption in captions):
        return {}
    teacher_figures = prompt_accuracy(teacher, captions, world)
    figures_by_steps = {
        str(count): prompt_accuracy(student, captions, world) for count, student in students.items()
    }
    student_figures = figures_by_steps[str(num_steps)]
    return {
        "captions": len(captions),
        "prompt_accuracy": {"teacher": teacher_figures["accuracy"], "student": student_figures["accuracy"]},
        "teacher": teacher_figures,
        "student": student_figures,
        "student_by_steps": figures_by_steps,
    }


def diversity(images_by_seed: np.ndarray) -> float:
    """Return the mean absolute difference between images of one caption from different seeds, in grey levels.

    Shape: (captions, seeds, height, width, 3) uint8. Compare it with the teacher's; a collapsed student is near 0.
    """
    images = images_by_seed.astype(np.float32)
    seeds = images.shape[1]
    pairs = [(i, j) for i in range(seeds) for j in range(i)]
    return float(np.mean([np.abs(images[:, i] - images[:, j]).mean() for i, j in pairs]))


def likeness(
    latents: torch.Tensor,
    images: np.ndarray,
    by_seed: np.ndarray,
    teacher_latents: torch.Tensor,
    teacher_images: np.ndarray,
    teacher_by_seed: np.ndarray,
) -> dict[str, float]:
    """Compare a student's images with its teacher's from the same noise and prompts.

    `latents` (B, C, H, W) and `images` (B, height, width, 3) are of the same trajectories; `by_seed` has the
    shape that diversity() expects. Returns `image_error` (squared distance of latents over the teacher's variance),
    `channel_drift`, and `saturation` and `diversity` over the teacher's.
    """
    error = (latents - teacher_latents).square().mean() / teacher_latents.var(dim=0).mean()
    return {
        "image_error": float(error),
        "channel_drift": channel_drift(latents, teacher_latents),
        "saturation": saturation(images) / max(saturation(teacher_images), 1e-6),
        "diversity": diversity(by_seed) / max(diversity(teacher_by_seed), 1e-6),
    }


def find_guard_violations(figures: Mapping[str, float]) -> list[str]:
    """Return a description of each figure of likeness() that is beyond GUARDS."""
    return [
        f"{name.replace('channel', 'colour').replace('_', ' ')} {figures[name]:.2f}, "
        f"{f'at least {lowest:g}' if figures[name] < lowest else f'at most {highest:g}'}"
        for name, (lowest, highest) in GUARDS.items()
        if not lowest <= figures[name] <= highest
    ]


def channel_drift(latents: torch.Tensor, teacher_latents: torch.Tensor) -> float:
    """Return the largest distance of a channel's mean from the teacher's, in the teacher's standard deviations.

    Shapes: (B, C, H, W).
    """
    shift = latents.mean((0, 2, 3)) - teacher_latents.mean((0, 2, 3))
    return float((shift / teacher_latents.std((0, 2, 3))).abs().max())


def channel_spread(latents: torch.Tensor, teacher_latents: torch.Tensor) -> float:
    """Return the ratio of a channel's standard deviation to the teacher's, for the channel farthest from 1.

    Shapes: (B, C, H, W).
    """
    ratio = latents.std((0, 2, 3)) / teacher_latents.std((0, 2, 3))
    return float(ratio[ratio.log().abs().argmax()])


def saturation(images: np.ndarray) -> float:
    """Return the mean distance of colours from grey: 0..255. Shape: (B, height, width, 3) uint8."""
    images = images.astype(np.int16)
    return float((images.max(-1) - images.min(-1)).mean())


def frechet_distance(images: np.ndarray, others: np.ndarray, width: int = 32) -> float:
    """Return the Frechet distance of two sets of images in a random feature space, without FID's trained network.

    Features are `width` channels of two seeded random convolutions with ReLU, averaged over the image.
    Shapes: (B, h, w, 3). Source of the distance: Dowson and Landau 1982.
    """
    (mean, covariance), (other_mean, other_covariance) = (
        _moments(_random_features(each, width)) for each in (images, others)
    )
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    # Trace of the square root of the product of both covariances.
    overlap = np.sqrt(np.linalg.eigvalsh(root @ other_covariance @ root).clip(min=0)).sum()
    return float(
        np.square(mean - other_mean).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * overlap
    )


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features.T)


def _random_features(images: np.ndarray, width: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    features = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    for channels, size in ((24, 5), (width, 3)):
        kernel = torch.randn(channels, features.shape[1], size, size, generator=generator)
        features = functional.relu(
            functional.conv2d(features, kernel / kernel[0].numel() ** 0.5, stride=2, padding=size // 2)
        )
    return features.mean((2, 3)).double().numpy()
