"""The phases of a run and the counts that follow from them; torch is not imported.

A run has up to three phases, in this order: `velocity` (stage 1), `few_step` (stage 2a), `matching` (stage 2b).
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


def plan_phases(settings):
    """Return the phases of a run in order, each as a Span; phases without steps are left out."""
    first_end = settings.max_train_steps - settings.few_step_train_steps - settings.matching_steps
    rounds = range(ROLLOUT_ROUNDS + 1)
    ends = [first_end + settings.few_step_train_steps * number // ROLLOUT_ROUNDS for number in rounds]
    ends.append(settings.max_train_steps)
    names = (PHASE_NAMES[0], *[PHASE_NAMES[1]] * ROLLOUT_ROUNDS, PHASE_NAMES[2])
    return [Span(name, first, last) for name, first, last in zip(names, [0, *ends], ends) if first < last]


def count_trajectories(settings, num_prompts):
    """Return the number of training trajectories: one per prompt; few prompts get several each."""
    return settings.num_trajectories or max(num_prompts, MIN_TRAJECTORIES)


def fill_validation_and_rollout(settings, is_large, num_trajectories, num_buckets=1):
    """Return --validation_trajectories and --rollout_states, with defaults if unset.

    The defaults are at most `num_trajectories`, or a share of them for a large teacher. Each bucket gets at
    least one rollout state.
    """
    num_validated, num_rollout = MAX_VALIDATION_TRAJECTORIES, num_trajectories
    if is_large:
        num_validated = num_trajectories // TRAJECTORIES_PER_VALIDATED
        num_rollout = num_trajectories // TRAJECTORIES_PER_ROLLOUT_STATE
    num_validated = max(MIN_VALIDATION_TRAJECTORIES, settings.validation_trajectories or num_validated)
    num_rollout = min(MAX_ROLLOUT_STATES, max(num_rollout, num_buckets))
    return {
        "validation_trajectories": min(MAX_VALIDATION_TRAJECTORIES, num_validated),
        "rollout_states": num_rollout if settings.rollout_states is None else settings.rollout_states,
    }


def choose_validated(training, held_out):
    """Return the prompts of validations: the held-out ones and, if these are few, training prompts after them.

    Training prompts get noise of their own. A validation on one prompt would measure only the differences
    between the teacher's images of it.
    """
    return list(dict.fromkeys([*held_out, *training]))[: max(len(held_out), MIN_VALIDATED)]


def count_validated(count, num_validated):
    """Return the numbers of validated trajectories, and of prompts in the grids with as many seeds each.

    `count` is --validation_trajectories, `num_validated` the number of choose_validated() prompts.
    """
    return max(min(num_validated, count), min(MIN_VALIDATED, count)), min(GRID_PROMPTS, math.isqrt(count))


def count_passes(settings, num_trajectories, num_validated, phases):
    """Return the number of teacher passes in a run, counted per image; a guided step has two."""
    num_held_out, num_seeds = count_validated(settings.validation_trajectories, num_validated)
    num_grid = min(num_seeds, num_validated)
    trajectories = num_trajectories + settings.validation_trajectories + num_held_out + num_grid * num_seeds
    steps = dict.fromkeys(PHASE_NAMES, 0)
    for name, first, last in phases:
        steps[name] += last - first
    num_references = len(settings.validation_prompts) if settings.validation_prompts else num_grid
    guided = trajectories * settings.teacher_steps + num_references * settings.reference_steps
    if steps["few_step"]:
        guided += ROLLOUT_ROUNDS * settings.rollout_states * settings.teacher_steps // 2
    # A quarter of the states of a batch is matched, with four passes each.
    matched = steps["matching"] * settings.train_batch_size * settings.gradient_accumulation_steps
    return 2 * guided + matched


def count_states(settings, num_trajectories, phases, num_buckets=1):
    """Return {phase: number of training states} for the smallest bucket; a batch is taken from one bucket."""
    num_trajectories = num_trajectories // num_buckets
    few_step_states = num_trajectories
    if max(settings.few_steps) > 1:
        few_step_states = 2 * num_trajectories + settings.rollout_states // num_buckets
    velocity_states = num_trajectories * settings.teacher_steps
    return {name: velocity_states if name == "velocity" else few_step_states for name, *_ in phases}
