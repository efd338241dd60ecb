"""The phases of a run and the counts that follow from them, all before torch is imported.

A run has up to three, one after the other: `velocity` (stage 1), `few_step` (stage 2a), `matching` (stage
2b).
"""

import math
from typing import NamedTuple

PHASE_NAMES = ("velocity", "few_step", "matching")
ROLLOUT_ROUNDS = 2  # rollouts in stage 2a
FEW_STEP_SHARE = 5 / 7  # of all steps; the default of --few_step_train_steps
MAX_VALIDATION_TRAJECTORIES = 64  # of each kind in a validation
MIN_VALIDATION_TRAJECTORIES = 4
GRID_PROMPTS = 8  # prompts in the grids; diversity is measured on as many prompts with as many seeds each
MIN_VALIDATED = 16  # prompts of a validation, if there are enough
TRAJECTORIES_PER_VALIDATED = 20  # of a large teacher; the default of --validation_trajectories
# The default of --num_trajectories is at least this: with few prompts, each has several, from different noise.
# benchmarks/few_prompts.py: 30 trajectories train nothing in 200 steps, 300 reach 9 of 10, 500 hardly more.
MIN_TRAJECTORIES = 300
MAX_ROLLOUT_STATES = 512  # the default of --rollout_states is at most this
TRAJECTORIES_PER_ROLLOUT_STATE = 8  # of a large teacher


class Span(NamedTuple):
    """The steps of a phase: from `first` on, before `last`."""

    name: str
    first: int
    last: int


def phases_of(settings):
    """Return the phases of a run in order, each as a Span; those of no step are left out."""
    ends = [settings.max_train_steps - settings.few_step_train_steps - settings.matching_steps]
    ends += [
        ends[0] + settings.few_step_train_steps * number // ROLLOUT_ROUNDS
        for number in range(1, ROLLOUT_ROUNDS + 1)
    ]
    ends += [settings.max_train_steps]
    names = (PHASE_NAMES[0], *[PHASE_NAMES[1]] * ROLLOUT_ROUNDS, PHASE_NAMES[2])
    return [Span(name, first, last) for name, first, last in zip(names, [0, *ends], ends) if first < last]


def count_trajectories(settings, num_prompts):
    """Return how many trajectories a run learns from: one a prompt or, of few prompts, several from different
    noise.
    """
    return settings.num_trajectories or max(num_prompts, MIN_TRAJECTORIES)


def bound_validation_and_rollout(settings, is_large, num_trajectories, num_buckets=1):
    """Return what --validation_trajectories and --rollout_states are where they are left open: at most the
    trajectories and, if the teacher is large, a share of them; at least one state of the own path for each
    bucket."""
    count, own = (
        num_trajectories // TRAJECTORIES_PER_VALIDATED if is_large else MAX_VALIDATION_TRAJECTORIES,
        num_trajectories // (TRAJECTORIES_PER_ROLLOUT_STATE if is_large else 1),
    )
    return {
        "validation_trajectories": min(
            MAX_VALIDATION_TRAJECTORIES,
            max(MIN_VALIDATION_TRAJECTORIES, settings.validation_trajectories or count),
        ),
        "rollout_states": min(MAX_ROLLOUT_STATES, max(own, num_buckets))
        if settings.rollout_states is None
        else settings.rollout_states,
    }


def choose_validated(training, held_out):
    """Return the prompts of validations: those held out and, where these are few, training prompts after
    them. Noise is never that of training, and one prompt alone would measure what nobody wants: how the
    teacher's images of it differ."""
    return list(dict.fromkeys([*held_out, *training]))[: max(len(held_out), MIN_VALIDATED)]


def count_validated(count, num_validated):
    """Return (count of validated prompts, n): a validation is held against these, and against n prompts from
    n seeds each.
    """
    return max(min(num_validated, count), min(MIN_VALIDATED, count)), min(GRID_PROMPTS, math.isqrt(count))


def count_passes(settings, num_trajectories, num_validated, phases):
    """Return how many times a image goes through the teacher in a run; guidance takes two of these a step."""
    validated, several = count_validated(settings.validation_trajectories, num_validated)
    count = (
        num_trajectories
        + settings.validation_trajectories
        + validated
        + min(several, num_validated) * several
    )
    steps = {
        phase: sum(last - first for name, first, last in phases if name == phase) for phase in PHASE_NAMES
    }
    shown = len(settings.validation_prompts or range(min(several, num_validated)))
    own = ROLLOUT_ROUNDS * settings.rollout_states * settings.teacher_steps // 2 * (steps["few_step"] > 0)
    matched = (
        steps["matching"] * settings.train_batch_size * settings.gradient_accumulation_steps
    )  # a quarter, four times
    return 2 * (count * settings.teacher_steps + shown * settings.reference_steps + own) + matched


def count_states(settings, num_trajectories, phases, num_buckets=1):
    """Return {phase: states that it learns from}, in the bucket that has fewest: a batch is of one bucket."""
    count, own = num_trajectories // num_buckets, settings.rollout_states // num_buckets
    later = 2 * count + own if max(settings.few_steps) > 1 else count
    return {phase: count * settings.teacher_steps if phase == "velocity" else later for phase, *_ in phases}
