"""A student -> how like its teacher it draws: figures, a grid of both, and what a judge of the tiny world
reads in its images.
"""

from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from ..data.autoencoder import decode_latents, to_images
from ..flow import sample, seeded_noise
from ..network import pack_text
from ..phases import count_validated
from ..runtime.ranks import broadcast
from ..world import shapes
from ..world.record import read_world
from .metrics import compare, find_guard_violations, frechet_distance, likeness
from .steps import velocity_in_chunks

GRID_FIGURES = {
    "diversity": "diversity",
    "colour": "saturation",
    "drift": "channel_drift",
}  # {title in a row of a grid: figure}


class Validator:
    """Compares students with the teacher of `teacher_data`, at each number of steps that they are trained for.

    `run` is a planning.Run, `few` the FewSteps of its student. `check` is called between batches, and may end
    a validation.
    """

    find_violations = staticmethod(find_guard_violations)
    compare = staticmethod(compare)

    def __init__(self, run, teacher_data, few, autoencoder, check=lambda: None):
        self.run, self.teacher_data, self.settings = run, teacher_data, run.settings
        self.validated, self.shown = teacher_data.validated, run.settings.validation_prompts
        self.counts, self.autoencoder, self.check = few.counts, autoencoder, check
        self.scheduler = few.scheduler if run.few_steps else teacher_data.scheduler
        self.measure = "frechet_distance" if run.settings.matching_steps else "image_error"
        self.states, by_seed = teacher_data.validation_states
        self.num_seeds = count_validated(self.settings.validation_trajectories, len(self.validated))[1]
        self.trajectories = [
            teacher_references(each, teacher_data.prompt_embeddings, self.validated, autoencoder)
            for each in (self.states, by_seed)
        ]
        num_images = max(len(self.shown), len(teacher_data.held_out))
        self.seeds = [self.settings.seed + number for number in range(num_images)]
        self.teacher_drawn = teacher_data.keep(
            "grid",
            lambda: {"images": torch.from_numpy(self._draw_teacher(self.shown))},
            prompts=self.shown,
            seeds=self.seeds[: len(self.shown)],
            reference=self.settings.reference_steps,
        )["images"].numpy()

    def __call__(self, state, log):
        """Validate the averaged student, log figures and a grid, and consider it as the one to be saved."""
        progress = state.progress
        with state.averaged() as student:
            figures_by_steps, figures = self.validate(student)
            log.record(progress.step, grid=self.draw_grid(student, figures_by_steps), **figures)
            progress.last_validation = {"step": progress.step, **figures}
            if progress.phase != "velocity" or not self.run.few_steps:
                self.consider(state, figures, figures_by_steps)
        log.pace.restart()  # validation is no part of a step

    def consider(self, state, figures, figures_by_steps):
        """Keep the student as the best candidate, unless it is rejected or an earlier one was closer."""
        progress = state.progress
        score = sum(each[self.measure] for each in figures_by_steps.values()) / len(figures_by_steps)
        violations = [
            f"in {count} step{'s' * (count > 1)}: {reason}"
            for count, each in figures_by_steps.items()
            for reason in self.find_violations(each)
        ]
        is_closest = not progress.best or score < progress.best["score"]
        progress.rejected_validations = (
            progress.rejected_validations + 1 if violations and not is_closest else 0
        )
        if violations:  # all figures are in metrics.jsonl
            self.run.accelerator.print(
                f"\nstep {progress.step}: rejected, unlike the teacher {violations[0]}"
            )
        elif is_closest:
            state.keep_as_best(score, figures)

    def validate(self, student):
        """Return figures by number of steps, and all of them by name with the error on held-out states; the
        same on all ranks.
        """
        error = self.held_out_error(student)
        figures_by_steps = {
            count: compare_trajectories(
                self.trajectories,
                partial(velocity_in_chunks, student),
                count,
                self.num_seeds,
                self.autoencoder,
                self.scheduler,
                self.check,
            )
            for count in self.counts
        }
        error, figures_by_steps = broadcast(
            (error, figures_by_steps)
        )  # by which every rank chooses, and ends
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
            self.autoencoder.device,
            self.check,
        )

    def draw_grid(self, student, figures_by_steps):
        """Return {what a row shows: its images (B, height, width, 3)}, the teacher's above the student's."""
        grid = {f"teacher {self.settings.reference_steps} steps": self.teacher_drawn}
        for count, each in reversed(figures_by_steps.items()):
            said = [f"{name} {each[measure]:.2f}" for name, measure in GRID_FIGURES.items()]
            grid[", ".join([f"student {count} step{'s' * (count > 1)}", *said])] = self._draw(
                student, count, self.shown
            )
        return grid

    def judge(self, student):
        """Return what share of the held-out captions teacher and student draw right, where there is a judge
        for them.
        """
        world = (
            read_world(self.settings.teacher) or shapes
        )  # copies of the tiny teacher in other layouts carry no record
        if self.settings.resolution != world.IMAGE_SIZE:
            return {}
        return self.compare(
            self._draw_teacher,
            {count: partial(self._draw, student, count) for count in self.counts},
            self.settings.num_inference_steps,
            self.teacher_data.held_out,
            world,
        )

    def _draw(self, student, count, prompts):
        return self._draw_by(partial(velocity_in_chunks, student), prompts, self.scheduler, count)

    def _draw_teacher(self, prompts):
        return self._draw_by(
            self.teacher_data.guided, prompts, self.teacher_data.scheduler, self.settings.reference_steps
        )

    def _draw_by(self, velocity_for, prompts, scheduler, num_steps):
        return generate_images(
            velocity_for,
            self.autoencoder,
            [self.teacher_data.prompt_embeddings[prompt] for prompt in prompts],
            self.seeds,
            scheduler,
            num_steps,
            self.teacher_data.latent_shape,
            self.check,
        )


@torch.no_grad()
def generate_images(
    velocity_for,
    autoencoder,
    embeddings,
    seeds,
    scheduler,
    num_steps,
    latent_shape,
    check=lambda: None,
    batch_size=64,
):
    """Draw one image for each embedding and seed: (B, height, width, 3) uint8; `check` may end it between
    two batches.
    """
    drawn, device = [], autoencoder.device
    for start in tqdm(
        range(0, len(embeddings), batch_size),
        desc="drawing",
        unit="batch",
        leave=False,
        disable=len(embeddings) <= batch_size,
    ):
        check()
        text = pack_text(embeddings[start : start + batch_size]).to(device)
        noise = seeded_noise(latent_shape, seeds[start : start + len(text.tokens)]).to(device)
        latents = sample(velocity_for(text), noise, scheduler, num_steps)
        drawn.append(to_images(decode_latents(autoencoder, latents)))
    return np.concatenate(drawn)


@torch.no_grad()
def teacher_references(trajectories, words, prompts, autoencoder):
    """Return what a student is held against: noise, text, and the teacher's latents (B, C, H, W) and images
    from that noise.
    """
    noise, latents, numbers = trajectories.ends(range(len(trajectories) // trajectories.states_each))
    device, text = autoencoder.device, words.pack([prompts[number] for number in numbers.tolist()])
    images = [to_images(decode_latents(autoencoder, chunk.to(device))) for chunk in latents.split(64)]
    return noise.to(device), text.to(device), latents, np.concatenate(images)


@torch.no_grad()
def compare_trajectories(trajectories, velocity_for, num_steps, num_seeds, autoencoder, scheduler, check):
    """Draw from the noise of `trajectories`, of many prompts and of `num_seeds` seeds each; returns figures of its
    likeness.
    """
    drawn = []
    for noise, text, _, _ in trajectories:
        check()
        latents = sample(velocity_for(text), noise, scheduler, num_steps)
        drawn.append((latents.cpu(), to_images(decode_latents(autoencoder, latents))))
    (_, _, latents, images), (_, _, _, by_seed) = trajectories
    by_seed, own_by_seed = (each.reshape(-1, num_seeds, *each.shape[1:]) for each in (by_seed, drawn[1][1]))
    return likeness(*drawn[0], own_by_seed, latents, images, by_seed) | {
        "frechet_distance": frechet_distance(drawn[0][1], images)
    }


@torch.no_grad()
def relative_error(student, states, embeddings, prompts, device, check):
    """Return the student's squared velocity error on held-out trajectories, over the power of the teacher's
    velocity.
    """
    error = power = 0.0
    for start in range(0, len(states), 256):
        check()
        batch = states.__getitems__(range(start, min(start + 256, len(states))))
        text = pack_text([embeddings[prompts[number]] for number in batch["prompt"].tolist()]).to(device)
        velocity = velocity_in_chunks(student, text)(
            batch["latents"].float().to(device), batch["timestep"].to(device)
        )
        error += (velocity.float().cpu() - batch["velocity"]).square().sum().item()
        power += batch["velocity"].float().square().sum().item()
    return error / power
