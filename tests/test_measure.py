"""Figures of likeness: closed forms, and the guards that reject a student."""

import numpy as np
import pytest
import torch

from wanlite.training.metrics import (
    channel_drift,
    channel_spread,
    diversity,
    find_guard_violations,
    frechet_distance,
    likeness,
    saturation,
)
from wanlite.world import shapes

LATENTS = (
    torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    * torch.tensor([1.0, 2, 3, 4])[:, None, None]
)


def images(seed, count, jitter=True):
    random = np.random.default_rng(seed)
    return np.stack([shapes.draw(scene, random if jitter else None) for scene in shapes.scenes(3, count)])


def test_drift_is_the_shift_of_the_worst_channel_in_deviations_of_the_teacher():
    moved = LATENTS + torch.tensor([0.0, 0.0, 0.0, 0.4])[:, None, None]
    assert (
        channel_drift(moved, LATENTS) == pytest.approx(0.1, rel=0.02) and channel_drift(LATENTS, LATENTS) == 0
    )


def test_spread_is_the_ratio_of_the_channel_farthest_from_the_teachers():
    narrowed = LATENTS * torch.tensor([1.0, 0.5, 1.2, 1.0])[:, None, None]
    assert channel_spread(narrowed, LATENTS) == pytest.approx(0.5, rel=1e-3)


def test_frechet_distance_is_zero_for_equal_images_and_grows_with_their_changes():
    drawn = images(0, 200)
    others, grey = images(1, 200), np.full_like(drawn, 128)
    assert abs(frechet_distance(drawn, drawn)) < 1e-8
    faded = (128 + 0.7 * (drawn.astype(float) - 128)).astype(np.uint8)
    assert frechet_distance(drawn, others) < frechet_distance(drawn, faded) < frechet_distance(drawn, grey)


def test_guards_accept_the_teachers_images_and_reject_collapsed_or_faded_ones():
    drawn = images(0, 64)
    seeds = np.stack([images(seed, 8) for seed in range(8)], axis=1)
    same = likeness(LATENTS, drawn, seeds, LATENTS, drawn, seeds)
    assert same == pytest.approx({"image_error": 0, "channel_drift": 0, "saturation": 1, "diversity": 1})
    assert not find_guard_violations(same)
    collapsed = likeness(LATENTS, drawn, np.repeat(seeds[:, :1], 8, axis=1), LATENTS, drawn, seeds)
    assert collapsed["diversity"] == 0 and [
        reason.split()[0] for reason in find_guard_violations(collapsed)
    ] == ["diversity"]
    assert "at least 0.6" in find_guard_violations(collapsed)[0]
    unruly = likeness(LATENTS, drawn, seeds, LATENTS, drawn, np.clip(0.2 * seeds, 0, 255).astype(np.uint8))
    assert unruly["diversity"] > 3 and not find_guard_violations(unruly)
    faded = likeness(LATENTS, (drawn // 2 + 64), seeds, LATENTS, drawn, seeds)
    assert [reason.split()[0] for reason in find_guard_violations(faded)] == ["saturation"]
    drifted = likeness(LATENTS + 2, drawn, seeds, LATENTS, drawn, seeds)
    assert any("colour drift" in reason for reason in find_guard_violations(drifted))


def test_diversity_and_saturation_have_closed_forms():
    two = np.zeros((1, 2, 4, 4, 3), np.uint8)
    two[:, 1] = 10
    assert diversity(two) == 10.0
    assert saturation(np.tile(np.uint8([200, 50, 100]), (1, 4, 4, 1))) == 150.0
