"""The teacher's trajectories: generated once and kept on disk shard by shard.

A trajectory is the teacher's whole guided solve from one noise to one image. Each of its states is a training
example: the noisy latents, the guided velocity there, and the teacher's hidden states of some tokens, in the
directions in which they vary most.

Legend: B batch, K states a trajectory, C channels, H W latent height and width, N image tokens, D d width of the
teacher and of the basis.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..flow import average_velocity, noise_along, sample, seeded_noise, set_steps, solve
from .datasets import Trajectories
from .shards import compute_once, fill_shards

FEATURE_TOKENS = 192  # image tokens whose hidden states are compared with the teacher's, of each state
MAX_SAMPLED = 32768  # hidden states from which directions are found
Velocity = Callable[[Tensor, Tensor], Any]  # of (latents, timestep)


def sample_rows(states: Tensor, num_batches: int) -> Tensor:
    """Return evenly spaced rows of hidden states (B, N, D), in float32: of `num_batches` at most MAX_SAMPLED."""
    rows = states.flatten(0, 1)
    spacing = -(-num_batches * len(rows) // MAX_SAMPLED)
    return rows[::spacing].to(torch.float32, copy=True)  # a view would keep all rows in memory


class TrajectoryGenerator:
    """Computes the teacher's states for training, and stores them in shards; shards on disk are reused.

    `velocity_for(prompts, has_features)` returns the guided velocity as a function of (latents, timestep); with
    `has_features` that function returns (velocity, hidden states (B, N, D)). `basis` (D, d) is that of the hidden
    states on disk. Every rank computes its share of the shards, `in_step` with the others where the teacher is
    sharded over them.
    """

    basis: Tensor  # set by find_basis() if not given

    def __init__(
        self,
        accelerator,
        velocity_for: Callable[[Sequence[str], bool], Velocity],
        scheduler,
        num_steps: int,
        in_step: bool = False,
        basis: Tensor | None = None,
    ):
        self.accelerator, self.velocity_for = accelerator, velocity_for
        self.scheduler, self.num_steps = scheduler, num_steps
        self.in_step = in_step
        if basis is not None:
            self.basis = basis

    @torch.no_grad()
    def find_basis(self, folder: Path, prompts: Sequence[str], latent_shape, width: int) -> None:
        """Set the basis to the `width` directions in which hidden states vary most on trajectories of
        `prompts`.
        """

        def make():
            steps = self._solve(prompts, range(len(prompts)), latent_shape)
            rows = [sample_rows(features, self.num_steps) for *_, features in steps]
            return {"basis": principal_directions(torch.cat(rows), width).cpu()}

        self.basis = compute_once(self.accelerator, folder, make)["basis"].to(self.accelerator.device)

    def generate(self, folder: Path, jobs: Sequence[tuple], latent_shape) -> Trajectories:
        """Solve from noise to image for every (number, prompt, seed) of `jobs`."""

        def make(numbers, prompts, seeds):
            return _stack(self._solve(prompts, seeds, latent_shape), self.basis, numbers)

        return self._fill(folder, jobs, make, "teacher trajectories")

    def _solve(self, prompts, seeds, latent_shape):
        noise = seeded_noise(latent_shape, seeds).to(self.accelerator.device)
        return solve(self.velocity_for(prompts, True), noise, self.scheduler, self.num_steps)

    def compute_at_images(
        self, folder: Path, jobs: Sequence[tuple], latents_of: Callable[[Sequence], Tensor]
    ) -> Trajectories:
        """Compute the same states at real images, noised to each level of a solve, for every (number, prompt,
        seed, image) of `jobs`.

        `latents_of(images)` returns their latents (B, C, H, W).
        """

        def make(numbers, prompts, seeds, images):
            clean = latents_of(images).to(self.accelerator.device)
            velocity_of = self.velocity_for(prompts, True)
            steps = noise_along(velocity_of, clean, seeds, self.scheduler, self.num_steps)
            return _stack(steps, self.basis, numbers)

        return self._fill(folder, jobs, make, "teacher at images")

    def roll_out(
        self, folder: Path, jobs: Sequence[tuple], latent_shape, student_for, student_scheduler
    ) -> Trajectories:
        """Solve the first steps with the student and the others with the teacher, for every (number, prompt,
        seed, count, index) of `jobs`.

        The student takes `index` of `count` steps, the teacher the remaining part of its own steps. Kept are the
        state between both, and the average velocity from there to the teacher's image. Source: the roll-outs of
        pi-Flow (Chen et al. 2025), with one segment that ends at the image.
        """

        def make(numbers, prompts, seeds, counts, indices):
            noise = seeded_noise(latent_shape, seeds).to(self.accelerator.device)
            shard: dict[str, Tensor] = {}
            stops = list(zip(counts, indices))
            for stop in sorted(set(stops)):
                rows = [row for row, each in enumerate(stops) if each == stop]
                chosen = [prompts[row] for row in rows]
                states = self._roll_out(stop, chosen, noise[rows], student_for(chosen), student_scheduler)
                for name, tensor in states.items():
                    whole = tensor.new_empty(len(prompts), 1, *tensor.shape[1:])
                    shard.setdefault(name, whole)[rows] = tensor.unsqueeze(1)
            return shard | {"prompt": torch.tensor(numbers)}

        return self._fill(folder, jobs, make, "student rollouts")

    def _roll_out(self, stop, prompts, noise, student, student_scheduler):
        """Return the states of one stop, (steps of the student's schedule, steps that it takes)."""
        count, index = stop
        latents = sample(student, noise, student_scheduler, count, end=index)
        levels = set_steps(student_scheduler, count, latents.device)[index]
        timestep, noise_level = (level.float().expand(len(prompts)) for level in levels)
        begin = self.num_steps * index // count
        velocity_of = self.velocity_for(prompts, False)
        image = sample(velocity_of, latents, self.scheduler, self.num_steps, begin=begin)
        return {
            "latents": latents,
            "velocity": average_velocity(latents, image, noise_level),
            "noise_level": noise_level,
            "timestep": timestep,
        }

    @torch.no_grad()
    def _fill(self, folder, jobs, make, description):
        count = fill_shards(self.accelerator, folder, jobs, make, description, in_step=self.in_step)
        return Trajectories(folder, count)


def _stack(steps: Iterable[tuple], basis: Tensor, numbers) -> dict[str, Tensor]:
    """Return the tensors of a shard from (latents, timestep, noise_level, velocity, features) of each step.

    Some of each step's hidden states (B, N, D) are projected onto the basis (D, d) at once and kept in float16.
    """
    # Unlike a loop's variable, map() holds no step while the next one is computed.
    kept = map(partial(_in_basis, basis), count(), steps)
    latents, timestep, noise_level, velocity, features, first_token = (  # (K, ...)
        torch.stack(list(tensors)) for tensors in zip(*kept)
    )
    return {
        "latents": latents.transpose(0, 1),
        "velocity": velocity.transpose(0, 1),
        "features": features.transpose(0, 1),
        "first_token": first_token.transpose(0, 1),
        "timestep": timestep.float().repeat(len(numbers), 1),
        "prompt": torch.tensor(numbers),
        "noise_level": noise_level.float().repeat(len(numbers), 1),
    }


def _in_basis(basis, number, step):
    *state, features = step
    first_token = torch.full((len(features),), number % _token_spacing(features.shape[1]))
    compared = sample_tokens(features, first_token.to(features.device))
    return *state, (compared.float() @ basis).half(), first_token


def sample_tokens(states: Tensor, first_token: Tensor) -> Tensor:
    """Return the hidden states (B, n, D) of the tokens that are compared, of all tokens (B, N, D).

    They are evenly spaced from `first_token` (B,) on. Consecutive states of a trajectory start one token later, so
    that together they compare all.
    """
    num_tokens = states.shape[1]
    spaced = _token_spacing(num_tokens) * torch.arange(count_compared(num_tokens), device=states.device)
    tokens = (first_token.unsqueeze(1) + spaced) % num_tokens  # (B, n)
    return states.gather(1, tokens.unsqueeze(2).expand(-1, -1, states.shape[2]))


def count_compared(num_tokens: int) -> int:
    """Return the number of tokens that are compared: all of a small image, about FEATURE_TOKENS of a large one."""
    return -(-num_tokens // _token_spacing(num_tokens))


def _token_spacing(num_tokens):
    return num_tokens // FEATURE_TOKENS | 1  # odd, so that compared tokens lie in different columns


def principal_directions(states: Tensor, width: int) -> Tensor:
    """Return the directions (D, width) in which states (B, D) vary most."""
    states = states.double()
    states = states - states.mean(0)
    return torch.linalg.eigh(states.T @ states).eigenvectors[:, -width:].float()


def deal_out(jobs: Sequence, num_buckets: int, seed: int) -> list[list]:
    """Return a list of jobs for each bucket, about equally many, chosen at random by `seed`."""
    if len(jobs) < num_buckets:
        raise ValueError(
            f"{len(jobs)} images of the teacher are fewer than the {num_buckets} sizes of --aspect_ratios: raise "
            "--num_trajectories, or name fewer sizes."
        )
    bucket_of = torch.randperm(len(jobs), generator=torch.Generator().manual_seed(seed)) % num_buckets
    return [
        [jobs[number] for number in (bucket_of == bucket).nonzero().flatten().tolist()]
        for bucket in range(num_buckets)
    ]
