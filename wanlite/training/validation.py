"""A student -> its likeness to the teacher: figures, a grid of the images of both, and the verdict of a judge.

Legend: B batch, C channels, H W latent height and width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.autoencoder import decode_latents, to_images
from ..data.grids import Grid
from ..flow import sample, seeded_noise
from ..network import TextTokens, pack_text
from ..phases import count_validated
from ..runtime.progress import print_above, track
from ..runtime.ranks import broadcast
from ..world import shapes
from ..world.record import read_world
from .metrics import compare, find_guard_violations, frechet_distance, likeness
from .steps import velocity_in_chunks

GRID_FIGURES = {  # {label in the title of a row: figure}
    "diversity": "diversity",
    "colour": "saturation",
    "drift": "channel_drift",
}
MEASURE = "image_error"  # by which the best student is chosen
DECODED_TOGETHER = 64  # images of the teacher
STATES_PER_PASS = 256  # of held-out trajectories


@dataclass(frozen=True)
class ImageSampler:
    """Samples images from noise with any velocity; `check` is called between batches and may raise Stopped."""

    autoencoder: Any
    scheduler: Any
    latent_shape: Sequence[int]  # (C, H, W)
    check: Callable[[], None] = lambda: None

    def sample(self, velocity_of: Callable, noise: Tensor, num_steps: int) -> tuple[Tensor, np.ndarray]:
        """Return latents (B, C, H, W) and images (B, height, width, 3) uint8."""
        latents = sample(velocity_of, noise, self.scheduler, num_steps)
        return latents, to_images(decode_latents(self.autoencoder, latents))


class TeacherImages(NamedTuple):
    """The teacher's images that a student is compared with, and the noise and text that they come from."""

    noise: Tensor  # (B, C, H, W)
    text: TextTokens
    latents: Tensor  # (B, C, H, W)
    images: np.ndarray  # (B, height, width, 3) uint8


class Validator:
    """Compares students with the teacher of `teacher_data`, at each number of steps that they are trained for.

    `run` is a planning.Run, `few` the FewSteps of its student, `resolution` the number of the resolution of the
    images. `check` is called between batches and may raise Stopped.
    """

    find_violations = staticmethod(find_guard_violations)
    compare = staticmethod(compare)

    def __init__(self, run, teacher_data, few, autoencoder, check=lambda: None, resolution=-1):
        self.run = run
        self.settings = run.settings
        self.teacher_data = teacher_data
        self.validated = teacher_data.validated
        self.grid_prompts = run.settings.validation_prompts
        self.counts = few.counts
        self.scheduler = few.scheduler if run.few_steps else teacher_data.scheduler
        latent_shape = run.resolutions[resolution].latent_shape
        self.sampler = ImageSampler(autoencoder, self.scheduler, latent_shape, check)
        self.is_last_resolution = latent_shape == run.resolutions[-1].latent_shape
        self.states, states_by_seed = teacher_data.validation_states[resolution]
        self.num_seeds = count_validated(self.settings.validation_trajectories, len(self.validated))[1]
        self.references = [
            read_teacher_images(states, teacher_data.prompt_embeddings, self.validated, autoencoder)
            for states in (self.states, states_by_seed)
        ]
        num_images = max(len(self.grid_prompts), len(teacher_data.held_out))
        self.seeds = [self.settings.seed + number for number in range(num_images)]
        self.teacher_grid = teacher_data.compute_once(
            "grid",
            lambda: {"images": torch.from_numpy(self._generate_teacher(self.grid_prompts))},
            prompts=self.grid_prompts,
            seeds=self.seeds[: len(self.grid_prompts)],
            reference=self.settings.reference_steps,
            latents=latent_shape,
        )["images"].numpy()

    def __call__(self, state, log):
        """Validate the averaged student, log figures and a grid, and consider it as the best candidate."""
        progress = state.progress
        with state.averaged() as student:
            figures_by_steps, figures = self.validate(student)
            log.record(progress.step, grid=self.make_grid(student, figures_by_steps), **figures)
            progress.last_validation = {"step": progress.step, **figures}
            is_candidate = progress.phase != "velocity" or not self.run.few_steps
            if is_candidate and self.is_last_resolution:
                self.consider(state, figures, figures_by_steps)
        log.pace.restart()  # a validation is not part of a step

    def consider(self, state, figures, figures_by_steps):
        """Keep the student as the best candidate, unless it is rejected or an earlier one of its phase was closer.

        A later phase has a different aim, so that its first accepted student replaces those of earlier phases.
        """
        progress = state.progress
        score = sum(each[MEASURE] for each in figures_by_steps.values()) / len(figures_by_steps)
        violations = [
            f"in {_format_steps(count)}: {violation}"
            for count, each in figures_by_steps.items()
            for violation in self.find_violations(each)
        ]
        is_closest = not progress.best or score < progress.best["score"]
        progress.rejected_validations = (
            progress.rejected_validations + 1 if violations and not is_closest else 0
        )
        if violations:  # metrics.jsonl has all figures
            text = f"step {progress.step}: rejected, unlike the teacher {violations[0]}"
            print_above(self.run.accelerator, text)
        elif is_closest or progress.best.get("phase") != progress.phase:
            state.keep_as_best(score, figures)

    def validate(self, student):
        """Return {number of steps: figures}, and all figures by name with the error on held-out states.

        All ranks get those of rank 0, because they decide by them which student is kept and when training ends.
        """
        error = self.held_out_error(student)
        velocity_for = partial(velocity_in_chunks, student)
        figures_by_steps = {
            count: compare_images(self.references, velocity_for, count, self.num_seeds, self.sampler)
            for count in self.counts
        }
        error, figures_by_steps = broadcast((error, figures_by_steps))
        return figures_by_steps, {"held_out_error": error} | {
            f"{name}_{count}": value
            for count, each in figures_by_steps.items()
            for name, value in each.items()
        }

    def held_out_error(self, student):
        """Return the student's velocity error on held-out trajectories; see relative_error()."""
        return relative_error(
            student,
            self.states,
            self.teacher_data.prompt_embeddings,
            self.validated,
            self.sampler.autoencoder.device,
            self.sampler.check,
        )

    def make_grid(self, student, figures_by_steps):
        """Return the Grid of teacher and student, the teacher's row first."""
        rows = {f"teacher {self.settings.reference_steps} steps": self.teacher_grid}
        for count, figures in reversed(figures_by_steps.items()):
            labels = [f"{label} {figures[name]:.2f}" for label, name in GRID_FIGURES.items()]
            title = ", ".join([f"student {_format_steps(count)}", *labels])
            rows[title] = self._generate(student, count, self.grid_prompts)
        return Grid(rows, self.grid_prompts, self.seeds[: len(self.grid_prompts)])

    def judge(self, student):
        """Return the accuracy of teacher and student on the held-out captions, {} unless a judge can read them."""
        # A copy of the tiny teacher in another layout has no record of its world.
        world = read_world(self.settings.teacher) or shapes
        if self.settings.resolution != world.IMAGE_SIZE:
            return {}
        return self.compare(
            self._generate_teacher,
            {count: partial(self._generate, student, count) for count in self.counts},
            self.settings.num_inference_steps,
            self.teacher_data.held_out,
            world,
        )

    def _generate(self, student, num_steps, prompts):
        velocity_for = partial(velocity_in_chunks, student)
        return generate_images(velocity_for, self._embed(prompts), self.seeds, num_steps, self.sampler)

    def _generate_teacher(self, prompts):
        sampler = replace(self.sampler, scheduler=self.teacher_data.scheduler)
        velocity_for, num_steps = self.teacher_data.guided, self.settings.reference_steps
        return generate_images(velocity_for, self._embed(prompts), self.seeds, num_steps, sampler)

    def _embed(self, prompts):
        return [self.teacher_data.prompt_embeddings[prompt] for prompt in prompts]


def _format_steps(count):
    return f"{count} step{'s' * (count > 1)}"


@torch.no_grad()
def generate_images(velocity_for, embeddings, seeds, num_steps, sampler, batch_size=64):
    """Generate one image for each embedding and seed: (B, height, width, 3) uint8."""
    batches, device = [], sampler.autoencoder.device
    is_short = len(embeddings) <= batch_size
    with track(len(embeddings), "generating", is_hidden=is_short) as progress:
        for start in range(0, len(embeddings), batch_size):
            sampler.check()
            text = pack_text(embeddings[start : start + batch_size]).to(device)
            noise = seeded_noise(sampler.latent_shape, seeds[start : start + len(text.tokens)]).to(device)
            batches.append(sampler.sample(velocity_for(text), noise, num_steps)[1])
            progress.update(len(text.tokens))
    return np.concatenate(batches)


@torch.no_grad()
def read_teacher_images(states, prompt_embeddings, prompts, autoencoder):
    """Return the TeacherImages of trajectories, whose prompts are numbers in `prompts`."""
    noise, latents, numbers = states.ends(range(len(states) // states.states_each))
    device = autoencoder.device
    text = prompt_embeddings.pack([prompts[number] for number in numbers.tolist()])
    images = [
        to_images(decode_latents(autoencoder, chunk.to(device))) for chunk in latents.split(DECODED_TOGETHER)
    ]
    return TeacherImages(noise.to(device), text.to(device), latents, np.concatenate(images))


@torch.no_grad()
def compare_images(references, velocity_for, num_steps, num_seeds, sampler):
    """Return figures of the likeness of a student's images to the teacher's from the same noise.

    `references` are two TeacherImages: of many prompts, and of `num_seeds` seeds per prompt.
    """
    sampled = []
    for reference in references:
        sampler.check()
        latents, images = sampler.sample(velocity_for(reference.text), reference.noise, num_steps)
        sampled.append((latents.cpu(), images))
    (latents, images), (_, images_by_seed) = sampled
    teacher, teacher_by_seed = references
    by_seed, teacher_by_seed = (
        each.reshape(-1, num_seeds, *each.shape[1:]) for each in (images_by_seed, teacher_by_seed.images)
    )
    figures = likeness(latents, images, by_seed, teacher.latents, teacher.images, teacher_by_seed)
    return figures | {"frechet_distance": frechet_distance(images, teacher.images)}


@torch.no_grad()
def relative_error(student, states, prompt_embeddings, prompts, device, check):
    """Return a student's squared velocity error on trajectories, relative to the power of the teacher's velocity."""
    error = power = 0.0
    for start in range(0, len(states), STATES_PER_PASS):
        check()
        batch = states.__getitems__(range(start, min(start + STATES_PER_PASS, len(states))))
        text = pack_text([prompt_embeddings[prompts[number]] for number in batch["prompt"].tolist()])
        velocity_of = velocity_in_chunks(student, text.to(device))
        velocity = velocity_of(batch["latents"].float().to(device), batch["timestep"].to(device))
        error += (velocity.float().cpu() - batch["velocity"]).square().sum().item()
        power += batch["velocity"].float().square().sum().item()
    return error / power
