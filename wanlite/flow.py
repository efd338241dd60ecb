"""Flow matching as in Wan: noise level, velocity, and the solve from noise to image.

    noisy = (1 - noise_level) * clean + noise_level * noise      velocity = noise - clean      timestep = TIMESTEPS * noise_level

Noise levels and timesteps stay in float32: bfloat16 misses timesteps by up to 2.
Legend: B batch, C channels, H W latent height and width.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from .files.file_names import SCHEDULER_CONFIG
from .schedule import scheduler_arguments

# (latents (B, C, H, W), timestep (B,)) -> velocity (B, C, H, W), or a pair of it and hidden states
Velocity = Callable[[Tensor, Tensor], Any]
Step = tuple[
    Any, ...
]  # noisy latents, timestep, noise level, velocity, and the hidden states if there are any


def add_noise(clean: Tensor, noise: Tensor, noise_level: Tensor) -> Tensor:
    """Mix clean latents and noise, both (B, C, H, W), at noise_level (B,)."""
    level = noise_level.view(-1, 1, 1, 1)
    return (1 - level) * clean + level * noise


def clean_from(noisy: Tensor, velocity: Tensor, noise_level: Tensor) -> Tensor:
    """Return the clean latents that a velocity points to. Shapes: (B, C, H, W), (B, C, H, W), (B,)."""
    return noisy - noise_level.view(-1, 1, 1, 1) * velocity


def shift_noise_level(noise_level: Tensor, shift: float) -> Tensor:
    """Move noise levels 0..1 towards 1, as larger images need: s' = k*s / (1 + (k-1)*s)."""
    return shift * noise_level / (1 + (shift - 1) * noise_level)


def average_velocity(start: Tensor, end: Tensor, noise_level: Tensor) -> Tensor:
    """Return the velocity straight from `start`, at `noise_level` (B,), to the image `end`: both (B, C, H, W)."""
    return (start - end) / noise_level.view(-1, 1, 1, 1)


def make_scheduler(shift: float, few_steps: Sequence[int] = ()) -> Any:
    """Return diffusers' UniPC, set up for Wan; its config holds the schedule, as a stock WanPipeline expects."""
    return UniPCMultistepScheduler(**scheduler_arguments(shift, few_steps))


def check_schedule(scheduler: Any, num_steps: int) -> None:
    """Raise ValueError for a schedule that does not fall to a noise level of 0: images would keep noise."""
    scheduler.set_timesteps(num_steps)
    levels = scheduler.sigmas.tolist()
    if levels[-1] != 0:
        raise ValueError(
            f"the schedule of {num_steps} steps ends at a noise level of {levels[-1]:.4f}, expected 0. Set "
            f'"final_sigmas_type": "zero" in {SCHEDULER_CONFIG}.'
        )
    if any(after >= before for before, after in zip(levels, levels[1:])) or levels[0] < 0.9:
        raise ValueError(
            f"the schedule of {num_steps} steps has the noise levels {levels}, expected a fall from about 1 to 0. "
            f"Take {SCHEDULER_CONFIG} from the folder that train_distillation.py wrote."
        )


def set_steps(scheduler: Any, num_steps: int, device: str | torch.device) -> list[tuple[Tensor, Tensor]]:
    """Set a scheduler's steps; returns the (timestep, noise level) before each, on `device`."""
    scheduler.set_timesteps(num_steps, device=device)
    return list(zip(scheduler.timesteps, scheduler.sigmas.to(device)))


class Steps:
    """The steps of a solve with a scheduler: `states` are the (timestep, noise level) before each, on `device`.

    The scheduler of a few-step student takes plain Euler steps. They are computed here in one operation: the
    general solver takes about forty, and one of them copies from the CPU.
    """

    def __init__(self, scheduler: Any, num_steps: int, device: str | torch.device, begin: int = 0):
        self.states = set_steps(scheduler, num_steps, device)
        self.scheduler, self.index = scheduler, begin
        self.levels = scheduler.sigmas.tolist() if takes_euler_steps(scheduler, num_steps) else None
        scheduler.set_begin_index(begin)

    def take(self, velocity: Tensor, latents: Tensor) -> Tensor:
        """Return the latents (B, C, H, W) after the next step, for the velocity before it."""
        timestep, _ = self.states[self.index]
        self.index += 1
        if self.levels is None:
            return self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return torch.add(latents, velocity, alpha=self.levels[self.index] - self.levels[self.index - 1])


def takes_euler_steps(scheduler: Any, num_steps: int) -> bool:
    """Whether a scheduler is UniPC with the settings under which its steps of a flow are Euler's."""
    config, is_unipc = scheduler.config, type(scheduler) is UniPCMultistepScheduler
    return (
        is_unipc
        and config.solver_order == 1
        and config.prediction_type == "flow_prediction"
        and config.predict_x0
        and not config.thresholding
        and scheduler.solver_p is None
        and {*range(num_steps - 1)} <= {*scheduler.disable_corrector}
    )


def solve(
    velocity_of: Velocity,
    latents: Tensor,
    scheduler: Any,
    num_steps: int,
    begin: int = 0,
    end: int | None = None,
) -> Generator[Step, None, Tensor]:
    """Solve from noise to an image; yields (latents, timestep, noise_level, velocity) before each step and
    returns the last latents.

    `velocity_of(latents, timestep (B,))` is called once a step. Shapes: (B, C, H, W). If it returns a pair, as
    (velocity, hidden states), the second value is yielded as well. With `begin` the solve starts before that
    step of `num_steps`, from the latents at its noise level; with `end` it stops before that step.
    """
    steps = Steps(scheduler, num_steps, latents.device, begin)
    latents = latents.float()
    for timestep, noise_level in steps.states[begin:end]:
        predicted = _predict(velocity_of, latents, timestep)
        yield latents, timestep, noise_level, *predicted
        velocity = predicted[0]
        del predicted  # hidden states are large, and the next step computes new ones
        latents = steps.take(velocity, latents)
    return latents


def noise_along(
    velocity_of: Velocity, clean: Tensor, seeds: Sequence[int], scheduler: Any, num_steps: int
) -> Iterator[Step]:
    """Yield the same as solve(), for the images `clean` (B, C, H, W) with fresh noise at each of its levels."""
    noises = seeded_noise((num_steps, *clean.shape[1:]), seeds).to(clean.device).unbind(1)
    for (timestep, noise_level), noise in zip(set_steps(scheduler, num_steps, clean.device), noises):
        noisy = add_noise(clean.float(), noise, noise_level.expand(len(clean)))
        yield noisy, timestep, noise_level, *_predict(velocity_of, noisy, timestep)


def _predict(velocity_of: Velocity, latents: Tensor, timestep: Tensor) -> tuple[Any, ...]:
    """Return (velocity,) in float32, followed by the hidden states if `velocity_of` returns them too."""
    predicted = velocity_of(latents, timestep.float().expand(len(latents)))
    velocity, *features = predicted if isinstance(predicted, tuple) else (predicted,)
    return velocity.float(), *features


def sample(
    velocity_of: Velocity,
    noise: Tensor,
    scheduler: Any,
    num_steps: int,
    begin: int = 0,
    end: int | None = None,
) -> Tensor:
    """Return the latents (B, C, H, W) at the end of the solve from `noise`; see solve()."""
    steps = solve(velocity_of, noise, scheduler, num_steps, begin, end)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            return finished.value


def seeded_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Return standard normal noise (B, *shape), one seed an image, the same on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class FewSteps:
    """The states of few-step solves, for one student that serves every number of steps in `counts`.

    `levels` are their (timestep, noise level), noise first; `stops` the (count, index) after noise;
    `teacher_levels` (K, 2) those of the teacher's solve. Timesteps are truncated to whole numbers, as in the
    scheduler. `share` is (rank, ranks): all draw from equal generators for the rows of all, and each takes
    its own.
    """

    def __init__(
        self,
        shift: float,
        counts: Sequence[int],
        latent_shape: Sequence[int],
        teacher_steps: int,
        share: tuple[int, int] = (0, 1),
    ):
        self.scheduler = make_scheduler(shift, counts)
        self.counts, self.latent_shape = tuple(counts), latent_shape
        self.rank, self.ranks = share
        self.teacher_levels = torch.tensor(self._states(teacher_steps))
        self.paths = {count: self._states(count) for count in counts}
        self.levels = sorted({state for path in self.paths.values() for state in path}, reverse=True)
        self.stops = [(count, index) for count in counts for index in range(1, count)]

    def _states(self, count: int) -> list[tuple[float, float]]:
        check_schedule(self.scheduler, count)
        return list(zip(self.scheduler.timesteps.float().tolist(), self.scheduler.sigmas.tolist()))

    def draw(
        self,
        num_images: int,
        velocity_of: Velocity,
        generator: torch.Generator,
        device: str | torch.device,
        latent_shape: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the images (B, C, H, W) that a student predicts at a random stop; the gradient is of its last step.

        `latent_shape` (C, H, W) overrides the default one.
        """
        count = self.counts[int(torch.randint(len(self.counts), (1,), generator=generator))]
        index = int(torch.randint(count, (1,), generator=generator))
        noise = self.own_noise((num_images, *(latent_shape or self.latent_shape)), generator, device)
        with torch.no_grad():
            latents = sample(velocity_of, noise, self.scheduler, count, end=index)
        timestep, noise_level = (
            torch.full((num_images,), value, device=device) for value in self.paths[count][index]
        )
        return clean_from(latents, velocity_of(latents, timestep).float(), noise_level)

    def renoise(
        self, clean: Tensor, generator: torch.Generator, is_one_level: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (noisy, noise, timestep (B,), noise level (B,)) at random inner levels of the teacher's solve.

        One level for all rows of all ranks keeps a micro-batch with one of the teacher's experts.
        """
        count = 1 if is_one_level else len(clean) * self.ranks
        chosen = torch.randint(1, max(2, len(self.teacher_levels) - 1), (count,), generator=generator)
        chosen = chosen.expand(len(clean)) if is_one_level else chosen[self.rank :: self.ranks]
        timestep, noise_level = self.teacher_levels[chosen].to(clean.device).unbind(1)
        noise = self.own_noise(clean.shape, generator, clean.device)
        return add_noise(clean.detach(), noise, noise_level), noise, timestep, noise_level

    def own_noise(
        self, shape: Sequence[int], generator: torch.Generator, device: str | torch.device
    ) -> Tensor:
        """Return this rank's rows (B, C, H, W) of noise that is drawn for all ranks, on the GPU if there is one."""
        if torch.device(device).type == "cuda":
            generator = torch.Generator(device).manual_seed(
                int(torch.randint(2**62, (1,), generator=generator))
            )
        noise = torch.randn(shape[0] * self.ranks, *shape[1:], generator=generator, device=generator.device)
        return noise[self.rank :: self.ranks].to(device)
