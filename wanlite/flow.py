"""Flow matching as Wan has it: noise level, velocity, and the solve from noise to image.

    noisy = (1 - noise_level) * clean + noise_level * noise        velocity = noise - clean        timestep = 1000 * noise_level

Noise levels and timesteps stay in float32: bfloat16 misses timesteps by up to 2.
Legend: B batch, C channels, H W latent height and width.
"""

import torch
from diffusers import UniPCMultistepScheduler

from .schedule import scheduler_arguments


def add_noise(clean, noise, noise_level):
    """Shapes: clean and noise (B, C, H, W), noise_level (B,)."""
    level = noise_level.view(-1, 1, 1, 1)
    return (1 - level) * clean + level * noise


def clean_from(noisy, velocity, noise_level):
    """Return the clean latents that a velocity points at. Shapes: (B, C, H, W), (B, C, H, W), (B,)."""
    return noisy - noise_level.view(-1, 1, 1, 1) * velocity


def shift_noise_level(noise_level, shift):
    """Move noise levels 0..1 towards 1, as a larger image needs: s' = k*s / (1 + (k-1)*s)."""
    return shift * noise_level / (1 + (shift - 1) * noise_level)


def average_velocity(start, end, noise_level):
    """Return the velocity that leads straight from `start`, at `noise_level` (B,), to the image `end`: both
    (B, C, H, W).
    """
    return (start - end) / noise_level.view(-1, 1, 1, 1)


def make_scheduler(shift, few_steps=()):
    """Return diffusers' UniPC, set up as Wan uses it; the schedule lives in its config, where a stock
    WanPipeline finds it.
    """
    return UniPCMultistepScheduler(**scheduler_arguments(shift, few_steps))


def check_schedule(scheduler, num_steps):
    """Raise ValueError for a schedule that does not fall from noise to a noise level of 0: images would
    keep noise.
    """
    scheduler.set_timesteps(num_steps)
    levels = scheduler.sigmas.tolist()
    if levels[-1] != 0:
        raise ValueError(
            f"the schedule of {num_steps} steps ends at a noise level of {levels[-1]:.4f}, expected 0. Set "
            '"final_sigmas_type": "zero" in scheduler_config.json.'
        )
    if any(after >= before for before, after in zip(levels, levels[1:])) or levels[0] < 0.9:
        raise ValueError(
            f"the schedule of {num_steps} steps passes noise levels {levels}, expected a fall from about 1 "
            f"to 0. "
            "Take scheduler_config.json from the folder that train_distillation.py wrote."
        )


def states_passed(scheduler, num_steps, device):
    """Set up a scheduler; returns the (timestep, noise level) before each step, on `device`: diffusers has
    levels on the CPU.
    """
    scheduler.set_timesteps(num_steps, device=device)
    return list(zip(scheduler.timesteps, scheduler.sigmas.to(device)))


def solve(velocity_of, latents, scheduler, num_steps, begin=0, end=None):
    """Walk from noise to a image, yielding (latents, timestep, noise_level, velocity) before each step;
    returns the last latents.

    `velocity_of(latents, timestep (B,))` is called once a step. Shapes: (B, C, H, W). Where it returns a pair,
    as (velocity, hidden states), the second value is yielded as well. With `begin` the solve starts before
    that step of `num_steps`, from latents that are there already, and with `end` it stops before that one.
    """
    states = states_passed(scheduler, num_steps, latents.device)
    scheduler.set_begin_index(begin)
    latents = latents.float()
    for timestep, noise_level in states[begin:end]:
        predicted = _predict(velocity_of, latents, timestep)
        yield latents, timestep, noise_level, *predicted
        velocity = predicted[0]
        del predicted  # hidden states are large, and the next step computes new ones
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def noise_along(velocity_of, clean, seeds, scheduler, num_steps):
    """Yield what solve() does, not on a solve but at the images `clean` (B, C, H, W), noised anew to each of
    its levels.
    """
    noises = seeded_noise((num_steps, *clean.shape[1:]), seeds).to(clean.device).unbind(1)
    for (timestep, noise_level), noise in zip(states_passed(scheduler, num_steps, clean.device), noises):
        noisy = add_noise(clean.float(), noise, noise_level.expand(len(clean)))
        yield noisy, timestep, noise_level, *_predict(velocity_of, noisy, timestep)


def _predict(velocity_of, latents, timestep):
    """Return (velocity,) in float32, followed by the hidden states where `velocity_of` returns them too."""
    predicted = velocity_of(latents, timestep.float().expand(len(latents)))
    velocity, *features = predicted if isinstance(predicted, tuple) else (predicted,)
    return velocity.float(), *features


def sample(velocity_of, noise, scheduler, num_steps, begin=0, end=None):
    """Return the latents (B, C, H, W) at the end of the solve from `noise`; see solve()."""
    steps = solve(velocity_of, noise, scheduler, num_steps, begin, end)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            return finished.value


def seeded_noise(shape, seeds):
    """Return standard normal noise (B, *shape), one seed a image, the same on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class FewSteps:
    """Where trajectories of few steps stop: one student serves every number of steps, for each leads straight to the
    image.

    `levels` are the (timestep, noise level) that any of them passes, noise first; `stops` the (count, index)
    after noise; `teacher_levels` (K, 2) those of the teacher's solve. The timesteps are those that sampling
    passes, truncated to whole numbers as the scheduler does. `share` is (rank, ranks): all draw from equal
    generators for the rows of all, and each takes its own.
    """

    def __init__(self, shift, counts, latent_shape, teacher_steps, share=(0, 1)):
        self.scheduler, self.counts, self.latent_shape = (
            make_scheduler(shift, counts),
            tuple(counts),
            latent_shape,
        )
        self.rank, self.ranks = share
        self.teacher_levels = torch.tensor(self._pass(teacher_steps))
        self.paths = {count: self._pass(count) for count in counts}
        self.levels = sorted({state for path in self.paths.values() for state in path}, reverse=True)
        self.stops = [(count, index) for count in counts for index in range(1, count)]

    def _pass(self, count):
        check_schedule(self.scheduler, count)
        return list(zip(self.scheduler.timesteps.float().tolist(), self.scheduler.sigmas.tolist()))

    def draw(self, num_teacher_images, velocity_of, generator, device, latent_shape=None):
        """Return the images (B, C, H, W) that a student sees from a stop drawn at random; the gradient is
        of its last step.

        `latent_shape` (C, H, W) where it is not the one of all.
        """
        count = self.counts[int(torch.randint(len(self.counts), (1,), generator=generator))]
        index = int(torch.randint(count, (1,), generator=generator))
        noise = self.own_noise((num_teacher_images, *(latent_shape or self.latent_shape)), generator, device)
        with torch.no_grad():
            latents = sample(velocity_of, noise, self.scheduler, count, end=index)
        timestep, noise_level = (
            torch.full((num_teacher_images,), value, device=device) for value in self.paths[count][index]
        )
        return clean_from(latents, velocity_of(latents, timestep).float(), noise_level)

    def renoise(self, clean, generator, is_one_level=False):
        """Return (noisy, noise, timestep (B,), noise level (B,)) at inner levels of the teacher's solve, drawn
        at random.

        One level for all rows of all ranks keeps a micro-batch with one of the teacher's experts.
        """
        count = 1 if is_one_level else len(clean) * self.ranks
        chosen = torch.randint(1, max(2, len(self.teacher_levels) - 1), (count,), generator=generator)
        chosen = chosen.expand(len(clean)) if is_one_level else chosen[self.rank :: self.ranks]
        timestep, noise_level = self.teacher_levels[chosen].to(clean.device).unbind(1)
        noise = self.own_noise(clean.shape, generator, clean.device)
        return add_noise(clean.detach(), noise, noise_level), noise, timestep, noise_level

    def own_noise(self, shape, generator, device):
        """Return this rank's rows (B, C, H, W) of noise that is drawn for all ranks; a GPU draws it itself,
        for the CPU is slow.
        """
        if torch.device(device).type == "cuda":
            generator = torch.Generator(device).manual_seed(
                int(torch.randint(2**62, (1,), generator=generator))
            )
        noise = torch.randn(shape[0] * self.ranks, *shape[1:], generator=generator, device=generator.device)
        return noise[self.rank :: self.ranks].to(device)
