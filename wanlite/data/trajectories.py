"""The teacher's trajectories, generated once and stored in shards on disk.

A trajectory is a complete guided solve of the teacher, from noise to an image. Each of its states is a training
example: noisy latents, the guided velocity, and the teacher's hidden states of some tokens
in the student's basis.

Legend: B batch, K states per trajectory, C channels, H W latent height and width, N image tokens, D d width of the
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

FEATURE_TOKENS = 192  # image tokens of a state whose hidden states are compared with the teacher's
MAX_SAMPLED = 32768  # hidden states from which the basis is computed
Velocity = Callable[[Tensor, Tensor], Any]  # of (latents, timestep)


def sample_rows(hidden_states: Tensor, num_batches: int) -> Tensor:
    """Return evenly spaced rows of hidden states (B, N, D) in float32, at most MAX_SAMPLED in `num_batches`."""
    rows = hidden_states.flatten(0, 1)
    spacing = -(-num_batches * len(rows) // MAX_SAMPLED)
    return rows[::spacing].to(torch.float32, copy=True)  # a view would keep all rows in memory


class TrajectoryGenerator:
    """Computes the teacher's states and stores them in shards; shards that exist are reused.

    `velocity_for(prompts, has_features)` returns the guided velocity as a function of (latents, timestep); with
    `has_features`, that function returns (velocity, hidden states (B, N, D)). Hidden states are stored in the
    `basis` (D, d). Each rank computes a share of the shards, `in_step` with the others if the teacher is sharded.
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
        self.accelerator = accelerator
        self.velocity_for = velocity_for
        self.scheduler = scheduler
        self.num_steps = num_steps
        self.in_step = in_step
        if basis is not None:
            self.basis = basis

    @torch.no_grad()
    def find_basis(self, folder: Path, prompts: Sequence[str], latent_shape, width: int) -> None:
        """Set the basis to the `width` principal directions of the hidden states on trajectories of `prompts`."""

        def make():
            steps = self._solve(prompts, range(len(prompts)), latent_shape)
            rows = [sample_rows(features, self.num_steps) for *_, features in steps]
            return {"basis": principal_directions(torch.cat(rows), width).cpu()}

        self.basis = compute_once(self.accelerator, folder, make)["basis"].to(self.accelerator.device)

    def generate(
        self, folder: Path, jobs: Sequence[tuple], latent_shape, has_features: bool = True
    ) -> Trajectories:
        """Generate a trajectory for each (number of the prompt, prompt, seed) of `jobs`."""

        def make(numbers, prompts, seeds):
            return _stack(self._solve(prompts, seeds, latent_shape, has_features), self.basis, numbers)

        return self._fill(folder, jobs, make, "teacher trajectories")

    def _solve(self, prompts, seeds, latent_shape, has_features=True):
        """Yield the steps of the teacher's trajectories."""
        noise = seeded_noise(latent_shape, seeds).to(self.accelerator.device)
        return solve(self.velocity_for(prompts, has_features), noise, self.scheduler, self.num_steps)

    def compute_at_images(
        self,
        folder: Path,
        jobs: Sequence[tuple],
        encode: Callable[[Sequence], Tensor],
        has_features: bool = True,
    ) -> Trajectories:
        """Compute the states at real images with noise of each level, for each job of `jobs`.

        A job is (number of the prompt, prompt, seed, image); `encode(images)` returns latents (B, C, H, W).
        """

        def make(numbers, prompts, seeds, images):
            clean = encode(images).to(self.accelerator.device)
            velocity_of = self.velocity_for(prompts, has_features)
            steps = noise_along(velocity_of, clean, seeds, self.scheduler, self.num_steps)
            return _stack(steps, self.basis, numbers)

        return self._fill(folder, jobs, make, "teacher at images")

    def roll_out(
        self,
        folder: Path,
        jobs: Sequence[tuple],
        latent_shape,
        student_for,
        student_scheduler,
        irreplaceable: str = "",
    ) -> Trajectories:
        """Compute on-policy states: the student solves the first steps, and the teacher the remaining ones.

        A job is (number of the prompt, prompt, seed, count, index): the student takes `index` of `count` steps,
        then the teacher takes the remaining steps of its own schedule. The state between both is stored with the
        average velocity from it to the teacher's image. Source: the roll-outs of pi-Flow (Chen et al. 2025), with
        a single segment that ends at the image. `irreplaceable` is that of fill_shards().
        """

        def make(numbers, prompts, seeds, counts, indices):
            noise = seeded_noise(latent_shape, seeds).to(self.accelerator.device)
            shard: dict[str, Tensor] = {}
            stops = list(zip(counts, indices))
            for stop in sorted(set(stops)):
                rows = [row for row, each in enumerate(stops) if each == stop]
                own_prompts = [prompts[row] for row in rows]
                student = student_for(own_prompts)
                states = self._roll_out(stop, own_prompts, noise[rows], student, student_scheduler)
                for name, tensor in states.items():
                    empty = tensor.new_empty(len(prompts), 1, *tensor.shape[1:])
                    shard.setdefault(name, empty)[rows] = tensor.unsqueeze(1)
            return shard | {"prompt": torch.tensor(numbers)}

        return self._fill(folder, jobs, make, "student rollouts", irreplaceable)

    def _roll_out(self, stop, prompts, noise, student, student_scheduler):
        """Return the states at a stop, (number of steps of the student's schedule, number of steps that it takes)."""
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
    def _fill(self, folder, jobs, make, description, irreplaceable=""):
        return Trajectories(
            fill_shards(self.accelerator, folder, jobs, make, description, self.in_step, irreplaceable)
        )


def _stack(steps: Iterable[tuple], basis: Tensor, numbers) -> dict[str, Tensor]:
    """Return the tensors of a shard from (latents, timestep, noise_level, velocity) of each step, and its features.

    The hidden states (B, N, D) of some tokens, if there are any, are projected onto the basis (D, d) immediately,
    in float16.
    """
    # Unlike a loop variable, map() does not keep a step in memory while the next one is computed.
    projected = map(partial(_project_features, basis), count(), steps)
    latents, timestep, noise_level, velocity, *features = (  # (K, ...)
        torch.stack(list(tensors)) for tensors in zip(*projected)
    )
    shard = {
        "latents": latents.transpose(0, 1),
        "velocity": velocity.transpose(0, 1),
        "timestep": timestep.float().repeat(len(numbers), 1),
        "prompt": torch.tensor(numbers),
        "noise_level": noise_level.float().repeat(len(numbers), 1),
    }
    names = ("features", "first_token")
    return shard | {name: tensor.transpose(0, 1) for name, tensor in zip(names, features)}


def _project_features(basis, number, step):
    if len(step) < 5:  # without hidden states
        return step
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


def principal_directions(hidden_states: Tensor, width: int) -> Tensor:
    """Return the `width` principal directions (D, width) of hidden states (B, D)."""
    deviations = hidden_states.double()
    deviations = deviations - deviations.mean(0)
    return torch.linalg.eigh(deviations.T @ deviations).eigenvectors[:, -width:].float()


def split_jobs(jobs: Sequence, num_buckets: int, seed: int) -> list[list]:
    """Return a random list of jobs for each bucket, of equal lengths but for one; more jobs only lengthen the lists."""
    if len(jobs) < num_buckets:
        raise ValueError(
            f"{len(jobs)} images of the teacher are fewer than the {num_buckets} sizes of --aspect_ratios: raise "
            "--num_trajectories, or name fewer sizes."
        )
    generator = torch.Generator().manual_seed(seed)
    bucket_of = [
        bucket
        for _ in range(0, len(jobs), num_buckets)
        for bucket in torch.randperm(num_buckets, generator=generator).tolist()
    ]
    return [[job for job, own in zip(jobs, bucket_of) if own == bucket] for bucket in range(num_buckets)]
