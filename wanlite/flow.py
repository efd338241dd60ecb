"""Flow matching as Wan has it: noise level, velocity, and the walk from noise to picture.

    noisy = (1 - noise_level) * clean + noise_level * noise        velocity = noise - clean        timestep = 1000 * noise_level

Noise levels and timesteps stay in float32: bfloat16 misses timesteps by up to 2.
Legend: B batch, C channels, H W latent height and width.
"""

import torch
from diffusers import UniPCMultistepScheduler

TIMESTEPS = 1000  # the teacher's unit of time


def add_noise(clean, noise, noise_level):
    """Shapes: clean and noise (B, C, H, W), noise_level (B,)."""
    level = noise_level.view(-1, 1, 1, 1)
    return (1 - level) * clean + level * noise


def clean_from(noisy, velocity, noise_level):
    """Return the clean latents that a velocity points at. Shapes: (B, C, H, W), (B, C, H, W), (B,)."""
    return noisy - noise_level.view(-1, 1, 1, 1) * velocity


def shift_noise_level(noise_level, shift):
    """Move noise levels 0..1 towards 1, as a larger picture needs: s' = k*s / (1 + (k-1)*s)."""
    return shift * noise_level / (1 + (shift - 1) * noise_level)


def make_scheduler(shift, order=2):
    """Return diffusers' UniPC, set up as Wan uses it; the schedule lives in its config, where a stock WanPipeline finds it."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift,
                                   solver_order=order, num_train_timesteps=TIMESTEPS)


def walk(velocity_of, noise, scheduler, num_steps):
    """Walk from noise to a picture, yielding (latents, timestep, noise_level, velocity) before each step; returns the last latents.

    `velocity_of(latents, timestep (B,))` is asked once a step. Shapes: (B, C, H, W).
    """
    scheduler.set_timesteps(num_steps, device=noise.device)
    scheduler.set_begin_index(0)
    latents = noise.float()
    for timestep, noise_level in zip(scheduler.timesteps, scheduler.sigmas):
        velocity = velocity_of(latents, timestep.float().expand(len(latents))).float()
        yield latents, timestep, noise_level, velocity
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def sample(velocity_of, noise, scheduler, num_steps):
    """Return the latents (B, C, H, W) at the end of the walk from `noise`."""
    steps = walk(velocity_of, noise, scheduler, num_steps)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            return finished.value


def seeded_noise(shape, seeds):
    """Return standard normal noise (B, *shape), one seed a picture, the same on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
