"""The phases of a run: the loss and the training data of each.

A loss is called as `loss(networks, settings, batch, text, progress, generator)`, see steps.py. Data is called as
`data(state, teacher_data, phase)` and returns Buckets. To train a further
phase, pass a table with an entry for it to train_distillation.train().
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..data.datasets import Buckets, FewStepStates
from ..runtime.ranks import broadcast
from .steps import few_step_regression, matching_step, velocity_step

SEEDS_PER_PHASE = 1000  # distance between the seeds of two phases' batches


@dataclass(frozen=True)
class PhaseDefinition:
    """The loss and the data of a phase."""

    loss: Callable
    data: Callable


@dataclass(frozen=True)
class Phase:
    """A phase of a run: the steps from `first` up to, but not including, `last`, at one resolution."""

    name: str
    first: int
    last: int
    resolution: int  # its number
    seed: int  # of the order of its batches
    batch_size: int  # of a micro-batch on each device
    accumulation: int  # micro-batches of a step
    loss: Callable
    data: Callable

    def progress(self, step: int) -> float:
        """Return the position of a step in the phase, 0 to 1."""
        return (step - self.first) / (self.last - self.first)


def phases_to_train(run, table):
    """Return the phases of a run in order, with losses and data from `table`."""
    return [
        Phase(
            **span._asdict(),
            **_fit_batch(run, span.resolution),
            seed=run.settings.seed + SEEDS_PER_PHASE * number,
            loss=table[span.name].loss,
            data=table[span.name].data,
        )
        for number, span in enumerate(run.phases)
    ]


def _fit_batch(run, number):
    """Return the micro-batch and the accumulation at a resolution: a step has as many states at each.

    Small images have larger micro-batches, in the memory that those of the last resolution take.
    """
    settings = run.settings
    largest, tokens = run.resolutions[-1].tokens, run.resolutions[number].tokens
    merged = math.gcd(settings.gradient_accumulation_steps, largest // tokens)
    return {
        "batch_size": settings.train_batch_size * merged,
        "accumulation": settings.gradient_accumulation_steps // merged,
    }


def make_velocity_data(state, teacher_data, phase):
    """Return all states of the teacher's trajectories at a resolution, and its states at real images."""
    return Buckets(
        [
            states + at_images if at_images else states
            for states, at_images in zip(
                teacher_data.training_states[phase.resolution], teacher_data.image_states[phase.resolution]
            )
        ]
    )


def make_few_step_data(state, teacher_data, phase):
    """Return the states of few-step solves, with a rollout of the averaged student at the start of the phase.

    The digest of that student is kept in the progress, so that a resumed run finds the same rollout in the cache.
    """
    few, progress, first = state.networks.few, state.progress, phase.first
    with state.averaged() as student:
        if progress.rollout.get("first") != first:
            progress.rollout = {"first": first, "student": broadcast(hash_weights(student))}
        rollouts = teacher_data.roll_out(
            student, progress.rollout["student"], few, first, is_past=progress.step != first
        )
    return Buckets(
        [
            FewStepStates(states, few.levels, rollout)
            for states, rollout in zip(teacher_data.training_states[phase.resolution], rollouts)
        ]
    )


def hash_weights(network: torch.nn.Module) -> str:
    """Return the sha256 of a network's weights."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


PHASES = {
    "velocity": PhaseDefinition(velocity_step, make_velocity_data),
    "few_step": PhaseDefinition(few_step_regression, make_few_step_data),
    "matching": PhaseDefinition(matching_step, make_few_step_data),
}  # names: phases.PHASE_NAMES
