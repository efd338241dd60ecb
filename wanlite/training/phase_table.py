"""The phases of a run: the loss and the training data of each.

A loss is called as `loss(networks, settings, batch, text, progress, generator)`, see steps.py. Data is called as
`data(state, teacher_data, first)` with the first step of the phase, and returns Buckets. To train a further
phase, pass a table with an entry for it to train_distillation.train().
"""

import hashlib
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
    """A phase of a run: the steps from `first` up to, but not including, `last`."""

    name: str
    first: int
    last: int
    seed: int  # of the order of its batches
    loss: Callable
    data: Callable

    def progress(self, step: int) -> float:
        """Return the position of a step in the phase, 0 to 1."""
        return (step - self.first) / (self.last - self.first)


def phases_to_train(run, table):
    """Return the phases of a run in order, with losses and data from `table`."""
    return [
        Phase(
            name,
            first,
            last,
            run.settings.seed + SEEDS_PER_PHASE * number,
            table[name].loss,
            table[name].data,
        )
        for number, (name, first, last) in enumerate(run.phases)
    ]


def make_velocity_data(state, teacher_data, first):
    """Return all states of the teacher's trajectories, and its states at real images."""
    return Buckets(
        [
            states + at_images if at_images else states
            for states, at_images in zip(teacher_data.training_states, teacher_data.image_states)
        ]
    )


def make_few_step_data(state, teacher_data, first):
    """Return the states of few-step solves, with a rollout of the averaged student at step `first`.

    The digest of that student is kept in the progress, so that a resumed run finds the same rollout in the cache.
    """
    few, progress = state.networks.few, state.progress
    with state.averaged() as student:
        if progress.rollout.get("first") != first:
            progress.rollout = {"first": first, "student": broadcast(hash_weights(student))}
        rollouts = teacher_data.roll_out(
            student, progress.rollout["student"], few, first, is_past=progress.step != first
        )
    return Buckets(
        [
            FewStepStates(states, few.levels, rollout)
            for states, rollout in zip(teacher_data.training_states, rollouts)
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
