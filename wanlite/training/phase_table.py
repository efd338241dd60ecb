"""The phases that a run trains: the loss of each and the data that it learns from.

A loss is called as `loss(networks, settings, batch, text, progress, generator)`, see steps.py; data as
`data(state, teacher_data, first)`, with the first step of the phase, and returns Buckets. To train another
phase, pass a table with its entry to train_distillation.train().
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..data.trajectories import Buckets, FewStepStates
from ..runtime.ranks import broadcast
from .steps import few_step_regression, matching_step, velocity_step

SEEDS_A_PHASE = 1000  # by which the seeds of two phases' batches differ


@dataclass(frozen=True)
class PhaseParts:
    """What defines a phase, whenever it is trained."""

    loss: Callable
    data: Callable


@dataclass(frozen=True)
class Phase:
    """One phase of a run: steps `first` to `last`, of which the latter belongs to the next phase."""

    name: str
    first: int
    last: int
    seed: int  # of the order of its batches
    loss: Callable
    data: Callable

    def progress(self, step):
        """Return how far a step lies in the phase: 0 to 1."""
        return (step - self.first) / (self.last - self.first)


def phases_to_train(run, table):
    """Return the phases of a run in order, with the losses and the data of a table."""
    return [
        Phase(
            name, first, last, run.settings.seed + SEEDS_A_PHASE * number, table[name].loss, table[name].data
        )
        for number, (name, first, last) in enumerate(run.phases)
    ]


def velocity_states(state, teacher_data, first):
    """Return every state of the teacher's trajectories, and those at real images."""
    return Buckets(
        [
            states + at_images if at_images else states
            for states, at_images in zip(teacher_data.training_states, teacher_data.image_states)
        ]
    )


def few_step_states(state, teacher_data, first):
    """Return the states that few steps pass, with a rollout of the averaged student at step `first`.

    The student is that of the first step also where a run resumes later: its digest is in the progress.
    """
    few, progress = state.networks.few, state.progress
    with state.averaged() as student:
        if progress.rollout.get("first") != first:
            progress.rollout = {"first": first, "student": broadcast(weights_digest(student))}
        rollouts = teacher_data.roll_out(
            student, progress.rollout["student"], few, first, is_past=progress.step != first
        )
    return Buckets(
        [
            FewStepStates(states, few.levels, rollout)
            for states, rollout in zip(teacher_data.training_states, rollouts)
        ]
    )


def weights_digest(network):
    """Return the sha256 of a network's weights."""
    found = hashlib.sha256()
    for tensor in network.state_dict().values():
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


PHASES = {
    "velocity": PhaseParts(velocity_step, velocity_states),
    "few_step": PhaseParts(few_step_regression, few_step_states),
    "matching": PhaseParts(matching_step, few_step_states),
}  # by the names of phases.PHASE_NAMES
