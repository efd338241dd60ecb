"""Noise levels, velocities and the solver from noise to image."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from wanlite.flow import (
    FewSteps,
    Steps,
    add_noise,
    average_velocity,
    check_schedule,
    clean_from,
    make_scheduler,
    sample,
    seeded_noise,
    shift_noise_level,
    solve,
    takes_euler_steps,
)

CLEAN, NOISE = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize("num_steps", [1, 2, 4, 12])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_sampler_is_exact_when_velocity_is_constant(num_steps, shift):
    end = sample(lambda latents, timestep: NOISE - CLEAN, NOISE, make_scheduler(shift), num_steps)
    assert torch.allclose(end, CLEAN, atol=1e-4)


def test_the_solver_calls_the_velocity_once_a_step_from_noise_downwards():
    steps = list(solve(lambda latents, timestep: NOISE - CLEAN, NOISE, make_scheduler(3.0), 4))
    latents, timestep, noise_level, _ = zip(*steps)
    assert torch.equal(latents[0], NOISE) and [int(t) for t in timestep] == [999, 900, 750, 500]
    for where, level in zip(latents, noise_level):
        assert torch.allclose(where, add_noise(CLEAN, NOISE, level.expand(3)), atol=1e-4)


def test_the_timesteps_of_few_steps_are_among_those_of_many():
    """A student trained on the states of twenty steps sees the same timesteps in ten, five, four, two or
    one.
    """
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


# ---- few steps ---------------------------------------------------------------------------------------------


def bent(latents, timestep):
    """A velocity field with curved paths, on which solvers differ."""
    return latents * (timestep / 1000).view(-1, 1, 1, 1) + NOISE


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_few_step_schedule_takes_plain_euler_steps(count):
    scheduler, latents = make_scheduler(5.0, (1, 2, 4)), NOISE
    for (timestep, level), after in zip(
        FewSteps(5.0, (1, 2, 4), (3, 4, 4), 20).paths[count], [*_levels(count)[1:], 0.0]
    ):
        latents = latents + (after - level) * bent(latents, torch.full((3,), timestep))
    assert torch.allclose(sample(bent, NOISE, scheduler, count), latents, atol=1e-5)
    if count == 4:
        assert not torch.allclose(sample(bent, NOISE, make_scheduler(5.0), count), latents, atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_euler_steps_are_those_of_the_scheduler_within_rounding(count, shift):
    steps, scheduler = Steps(make_scheduler(shift, (1, 2, 4)), count, "cpu"), make_scheduler(shift, (1, 2, 4))
    scheduler.set_timesteps(count)
    latents = expected = NOISE
    for timestep in scheduler.timesteps:
        velocity = bent(expected, timestep.float().expand(3))
        latents = steps.take(velocity, latents)
        expected = scheduler.step(velocity, timestep, expected, return_dict=False)[0]
    assert steps.levels and torch.allclose(latents, expected, rtol=0, atol=2e-6)


def test_other_schedulers_take_their_own_steps():
    with_corrector = make_scheduler(3.0, (2,))  # of four steps, the last two are corrected
    for scheduler in (make_scheduler(3.0), with_corrector, FlowMatchEulerDiscreteScheduler(shift=3.0)):
        assert not takes_euler_steps(scheduler, 4)


def _levels(count):
    return [level for _, level in FewSteps(5.0, (1, 2, 4), (3, 4, 4), 20).paths[count]]


def test_few_steps_use_the_published_levels_for_shift_five():
    few = FewSteps(5.0, (1, 2, 4), (3, 4, 4), 20)
    assert _levels(4) == pytest.approx([1.0, 0.9376, 0.8336, 0.6259], abs=1e-4) and _levels(1) == [
        pytest.approx(1.0, abs=1e-4)
    ]
    assert [timestep for timestep, _ in few.levels] == [999.0, 937.0, 833.0, 625.0]
    assert few.stops == [(2, 1), (4, 1), (4, 2), (4, 3)]


def test_a_schedule_that_is_saved_and_loaded_takes_the_same_steps(tmp_path):
    scheduler = make_scheduler(3.0, (1, 2, 4))
    scheduler.save_pretrained(tmp_path)
    again = type(scheduler).from_pretrained(tmp_path)
    assert torch.equal(sample(bent, NOISE, scheduler, 4), sample(bent, NOISE, again, 4))


def test_two_halves_of_a_trajectory_equal_the_full_one():
    scheduler = make_scheduler(3.0, (8,))
    half = sample(bent, NOISE, scheduler, 8, end=5)
    assert torch.allclose(
        sample(bent, half, scheduler, 8, begin=5), sample(bent, NOISE, scheduler, 8), atol=1e-5
    )
    assert torch.equal(sample(bent, NOISE, scheduler, 8, end=0), NOISE)


def test_the_average_velocity_reaches_the_image_in_one_step():
    level = torch.tensor([0.2, 0.7, 1.0])
    assert torch.allclose(clean_from(NOISE, average_velocity(NOISE, CLEAN, level), level), CLEAN, atol=1e-6)


def test_a_schedule_that_does_not_end_at_zero_is_refused(tmp_path):
    scheduler = make_scheduler(3.0)
    check_schedule(scheduler, 4)
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config | {"final_sigmas_type": "sigma_min"}))
    kept = type(scheduler).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='expected 0. Set "final_sigmas_type": "zero"'):
        check_schedule(kept, 4)


def test_a_rollout_from_any_stop_is_exact_and_has_a_gradient_in_its_last_step():
    few, scale = FewSteps(3.0, (1, 2, 4), (4, 4, 4), 20), torch.ones((), requires_grad=True)
    calls, stops = [], set()

    def constant(latents, timestep):
        calls.append((float(timestep[0]), latents.clone()))
        return scale * (latents - CLEAN) / (timestep / 1000).view(-1, 1, 1, 1)

    for seed in range(20):
        calls.clear()
        image = few.draw(3, constant, torch.Generator().manual_seed(seed), "cpu")
        stops.add(tuple(timestep for timestep, _ in calls))
        assert (
            torch.allclose(image, CLEAN, atol=0.02) and not calls[-1][1].requires_grad and image.requires_grad
        )
    assert len(stops) > 4


def test_renoised_images_are_at_inner_levels_or_the_requested_one():
    few, generator = FewSteps(3.0, (1, 2, 4), (3, 4, 4), 20), torch.Generator().manual_seed(0)
    clean = CLEAN.repeat(20, 1, 1, 1)
    noisy, noise, timestep, level = few.renoise(clean, generator)
    assert torch.allclose(noisy, add_noise(clean, noise, level)) and len(level.unique()) > 5
    assert set(timestep.tolist()) < {time for time, _ in few.teacher_levels[1:-1].tolist()}
    assert len(few.renoise(clean, generator, is_one_level=True)[3].unique()) == 1
