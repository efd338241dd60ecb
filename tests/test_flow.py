"""Noise levels, velocities and the walk from noise to picture."""

import pytest
import torch

from wanlite.flow import add_noise, clean_from, make_scheduler, sample, seeded_noise, shift_noise_level, walk

CLEAN, NOISE = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize("num_steps", [1, 2, 4, 12])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_sampler_is_exact_when_velocity_is_constant(num_steps, shift):
    end = sample(lambda latents, timestep: NOISE - CLEAN, NOISE, make_scheduler(shift), num_steps)
    assert torch.allclose(end, CLEAN, atol=1e-4)


def test_the_walk_asks_once_a_step_from_noise_down_and_says_where_it_is():
    steps = list(walk(lambda latents, timestep: NOISE - CLEAN, NOISE, make_scheduler(3.0), 4))
    latents, timestep, noise_level, _ = zip(*steps)
    assert torch.equal(latents[0], NOISE) and [int(t) for t in timestep] == [999, 900, 750, 500]
    for where, level in zip(latents, noise_level):
        assert torch.allclose(where, add_noise(CLEAN, NOISE, level.expand(3)), atol=1e-4)


def test_a_walk_of_few_steps_passes_timesteps_of_a_walk_of_many():
    """A student trained on the states of twenty steps is asked nothing new in ten, five, four, two or one."""
    many = {int(t) for t in _timesteps(20)}
    assert all(any(abs(int(t) - u) <= 1 for u in many) for few in (1, 2, 4, 5, 10) for t in _timesteps(few))


def _timesteps(num_steps):
    scheduler = make_scheduler(3.0)
    scheduler.set_timesteps(num_steps)
    return scheduler.timesteps


def test_clean_noise_and_velocity_are_three_sides_of_one_line():
    level = torch.tensor([0.0, 0.3, 1.0])
    noisy = add_noise(CLEAN, NOISE, level)
    assert torch.allclose(clean_from(noisy, NOISE - CLEAN, level), CLEAN, atol=1e-6)
    assert torch.equal(noisy[0], CLEAN[0]) and torch.equal(noisy[2], NOISE[2])


def test_shift_keeps_both_ends_and_has_its_closed_form():
    level = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(shift_noise_level(level, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    assert torch.equal(shift_noise_level(level, 1.0), level)


def test_noise_of_a_seed_does_not_depend_on_its_batch():
    assert torch.equal(seeded_noise((2, 3, 3), [7, 8])[1], seeded_noise((2, 3, 3), [8])[0])
