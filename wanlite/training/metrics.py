"""Quality of a given way to draw: faithful to captions, varied over seeds, and like the teacher's in what can
be counted.
"""

import math
import time

import numpy as np
import torch
from torch.nn import functional

from ..world import shapes

# A student beyond one of these is rejected: (lowest, highest), each figure beside the teacher's. Too much
# diversity is no fault of its own: a student that does not yet follow its captions has it, and is as far from
# its teacher as it is.
GUARDS = {"channel_drift": (0.0, 0.3), "saturation": (0.75, 1.33), "diversity": (0.6, math.inf)}


def prompt_accuracy(draw, captions, world=shapes):
    """Judge images drawn for captions of a tiny world: shares 0..1, whole and per attribute, and one and
    two objects apart.

    `draw(captions)` returns images (B, 64, 64, 3) uint8. Raises ValueError for a caption that is none of
    the world's.
    """
    scenes = [world.read_caption(caption) for caption in captions]
    if None in scenes:
        raise ValueError(
            f"{captions[scenes.index(None)]!r}: not a caption of {world.__name__}, which alone its judge can "
            f"read. "
            f"Take captions from {world.__name__}.captions()."
        )
    began = time.perf_counter()
    images = draw(captions)
    seconds = (time.perf_counter() - began) / len(captions)
    verdicts = [world.judge(image, scene) for image, scene in zip(images, scenes)]
    counts = np.array([len(scene.objects) for scene in scenes])
    whole = np.array([verdict["whole"] for verdict in verdicts])
    figures = {
        "accuracy": whole.mean(),
        "accuracy_one": whole[counts == 1].mean() if (counts == 1).any() else None,
        "accuracy_two": whole[counts == 2].mean() if (counts == 2).any() else None,
        "seconds": seconds,
    }
    figures |= {
        name: np.mean([verdict[name] for verdict in verdicts]) for name in verdicts[0] if name != "whole"
    }
    return {name: None if value is None else round(float(value), 4) for name, value in figures.items()}


def compare(draw_teacher, draw_student, num_steps, captions, world=shapes):
    """Judge teacher and student on the same captions; nothing where they are not of the tiny world.

    `draw_student` is {number of steps: a way to draw}; `num_steps` is the one that the student draws in by
    default.
    """
    if not all(world.read_caption(caption) for caption in captions):
        return {}
    teacher = prompt_accuracy(draw_teacher, captions, world)
    students = {str(count): prompt_accuracy(draw, captions, world) for count, draw in draw_student.items()}
    student = students[str(num_steps)]
    return {
        "captions": len(captions),
        "prompt_accuracy": {"teacher": teacher["accuracy"], "student": student["accuracy"]},
        "teacher": teacher,
        "student": student,
        "student_by_steps": students,
    }


def diversity(images_by_seed):
    """Return the mean distance between images of one caption over seeds, in grey levels 0..255, averaged
    over captions.

    Shape: (captions, seeds, 64, 64, 3). Compare with the teacher's: a collapsed student draws one image for
    all seeds.
    """
    images = images_by_seed.astype(np.float32)
    seeds = images.shape[1]
    pairs = [(i, j) for i in range(seeds) for j in range(i)]
    return float(np.mean([np.abs(images[:, i] - images[:, j]).mean() for i, j in pairs]))


def likeness(latents, images, by_seed, teacher_latents, teacher_images, teacher_by_seed):
    """Compare what a student drew with what its teacher drew from the same noise and prompts.

    `latents` (B, C, H, W) and `images` (B, height, width, 3) are of the same trajectories, `by_seed` as in
    diversity(). Returns `image_error` (squared distance of latents over the teacher's variance),
    `channel_drift`, and `saturation` and `diversity` over the teacher's.
    """
    error = (latents - teacher_latents).square().mean() / teacher_latents.var(dim=0).mean()
    return {
        "image_error": float(error),
        "channel_drift": channel_drift(latents, teacher_latents),
        "saturation": saturation(images) / max(saturation(teacher_images), 1e-6),
        "diversity": diversity(by_seed) / max(diversity(teacher_by_seed), 1e-6),
    }


def find_guard_violations(figures):
    """Return what figures of likeness() lie beyond GUARDS, in words."""
    return [
        f"{name.replace('channel', 'colour').replace('_', ' ')} {figures[name]:.2f}, "
        f"{f'at least {lowest:g}' if figures[name] < lowest else f'at most {highest:g}'}"
        for name, (lowest, highest) in GUARDS.items()
        if not lowest <= figures[name] <= highest
    ]


def channel_drift(latents, teacher_latents):
    """Return how far the mean of a channel lies from the teacher's, in the teacher's standard deviations: the
    worst channel.

    Shapes: (B, C, H, W).
    """
    shift = latents.mean((0, 2, 3)) - teacher_latents.mean((0, 2, 3))
    return float((shift / teacher_latents.std((0, 2, 3))).abs().max())


def channel_spread(latents, teacher_latents):
    """Return the standard deviation of a channel over the teacher's: the channel farthest from 1.

    Shapes: (B, C, H, W).
    """
    ratio = latents.std((0, 2, 3)) / teacher_latents.std((0, 2, 3))
    return float(ratio[ratio.log().abs().argmax()])


def saturation(images):
    """Return how far colours are from grey, on average: 0..255. Shape: (B, height, width, 3) uint8."""
    images = images.astype(np.int16)
    return float((images.max(-1) - images.min(-1)).mean())


def frechet_distance(images, others, width=32):
    """Return the Frechet distance of two sets of images in a random feature space: no FID, no network was
    trained for it.

    Features are `width` channels of two seeded random convolutions with ReLU, averaged over the image.
    Shapes: (B, h, w, 3). Source of the distance: Dowson and Landau 1982.
    """
    (mean, covariance), (other_mean, other_covariance) = (
        _moments(_random_features(each, width)) for each in (images, others)
    )
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    overlap = np.sqrt(
        np.linalg.eigvalsh(root @ other_covariance @ root).clip(min=0)
    ).sum()  # trace of the product's root
    return float(
        np.square(mean - other_mean).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * overlap
    )


def _moments(features):
    return features.mean(0), np.cov(features.T)


def _random_features(images, width):
    generator = torch.Generator().manual_seed(0)
    states = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    for channels, size in ((24, 5), (width, 3)):
        kernel = torch.randn(channels, states.shape[1], size, size, generator=generator)
        states = functional.relu(
            functional.conv2d(states, kernel / kernel[0].numel() ** 0.5, stride=2, padding=size // 2)
        )
    return states.mean((2, 3)).double().numpy()
