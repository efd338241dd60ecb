"""The phases of a run and the counts that follow from them; torch is not imported.

A run has up to three phases, in this order: `velocity` (stage 1), `few_step` (stage 2a), `matching` (stage 2b).
With --resolutions, `velocity` trains on each size of images in turn, and the others on the last.
"""

import math
from typing import NamedTuple

PHASE_NAMES = ("velocity", "few_step", "matching")
ROLLOUT_ROUNDS = 2  # rollouts in stage 2a
# The default of --few_step_train_steps is a share of all steps, limited to a number of passes over the images: a longer
# phase overfits them, unless captions determine images (docs/results.md).
FEW_STEP_SHARE = 5 / 7
FEW_STEP_PASSES = 16
MIN_FEW_STEPS = 300  # however few images there are: a shorter phase trains little
MAX_VALIDATION_TRAJECTORIES = 64  # of each kind in a validation
MIN_VALIDATION_TRAJECTORIES = 4
GRID_PROMPTS = 8  # prompts in the grids; diversity is measured on as many prompts with as many seeds each
MIN_VALIDATED = 16  # prompts of a validation, if there are enough
MIN_CAPTIONS = 20  # for an accuracy in percent
TRAJECTORIES_PER_VALIDATED = 20  # of a large teacher; the default of --validation_trajectories
# The default of --num_trajectories is at least this: with few prompts, each has several, from different noise.
# benchmarks/few_prompts.py: 30 trajectories train nothing in 200 steps, 300 reach 9 of 10, 500 hardly more.
MIN_TRAJECTORIES = 300
MAX_ROLLOUT_STATES = 512  # the default of --rollout_states is at most this
TRAJECTORIES_PER_ROLLOUT_STATE = 8  # of a large teacher


class Span(NamedTuple):
    """The steps of a phase: from `first` on, before `last`, at one of the resolutions of the run."""

    name: str
    first: int
    last: int
    resolution: int = 0  # its number, the smallest first


def plan_phases(settings):
    """Return the phases of a run in order, each as a Span; phases without steps are left out.

    The steps of `velocity` are divided over the resolutions in proportion to 1 / side, so most are quick ones at
    the smallest; HDM, a model of about the same size, spent 74 % of its samples there.
    """
    first_end = settings.max_train_steps - settings.few_step_train_steps - settings.matching_steps
    shares = [1 / side for side in settings.resolutions or [1]]
    last_resolution = len(shares) - 1
    ends = [
        ("velocity", round(first_end * sum(shares[: number + 1]) / sum(shares)), number)
        for number in range(len(shares))
    ]
    ends += [
        ("few_step", first_end + settings.few_step_train_steps * number // ROLLOUT_ROUNDS, last_resolution)
        for number in range(1, ROLLOUT_ROUNDS + 1)
    ]
    ends.append(("matching", settings.max_train_steps, last_resolution))
    firsts = [0, *(end for _, end, _ in ends)]
    return [Span(name, first, end, number) for first, (name, end, number) in zip(firsts, ends) if first < end]


def share_few_steps(settings):
    """Return the steps of the few-step phase without a limit by images."""
    return round(FEW_STEP_SHARE * max(0, settings.max_train_steps - settings.matching_steps))


def limit_few_steps(settings, num_images, states_per_step):
    """Return the steps of the few-step phase on `num_images`."""
    passes = FEW_STEP_PASSES * num_images // states_per_step
    return min(share_few_steps(settings), max(MIN_FEW_STEPS, passes))


def count_trajectories(settings, num_prompts):
    """Return the number of training trajectories: one per prompt; few prompts get several each."""
    return settings.num_trajectories or max(num_prompts, MIN_TRAJECTORIES)


def split_trajectories(settings, count):
    """Return the number of training trajectories at each resolution, of `count` at the smallest.

    The teacher takes about the same time for each resolution, unless that leaves fewer than MIN_TRAJECTORIES.
    """
    smallest, *larger = settings.resolutions or [1]
    return [count, *(min(count, max(MIN_TRAJECTORIES, count * smallest**2 // side**2)) for side in larger)]


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
    """Return the number of teacher passes at each resolution, counted per image; a guided step has two.

    `num_trajectories` is a list with one entry per resolution.
    """
    num_held_out, num_seeds = count_validated(settings.validation_trajectories, num_validated)
    num_grid = min(num_seeds, num_validated)
    num_references = len(settings.validation_prompts) if settings.validation_prompts else num_grid
    num_others = num_held_out + num_grid * num_seeds
    guided = [
        (count + num_others) * settings.teacher_steps + num_references * settings.reference_steps
        for count in num_trajectories
    ]
    guided[0] += settings.validation_trajectories * settings.teacher_steps  # for the basis of hidden states
    steps = count_steps(phases)
    if steps["few_step"]:
        guided[-1] += ROLLOUT_ROUNDS * settings.rollout_states * settings.teacher_steps // 2
    # A quarter of the states of a batch is matched, with four passes each.
    matched = steps["matching"] * settings.train_batch_size * settings.gradient_accumulation_steps
    return [*(2 * count for count in guided[:-1]), 2 * guided[-1] + matched]


def describe_phase(phase, phases, num_later=0):
    """Return the number of a phase among the kinds of phases of a run, and its name.

    `num_later` phases make small parts after those of training.
    """
    names = list(dict.fromkeys(span.name for span in phases))
    return f"phase {names.index(phase.name) + 1} of {len(names) + num_later}, {phase.name}"


def list_part_phases(has_small_text, has_small_decoder):
    """Return the names of the phases that make small parts, in their order."""
    return ["decoder"] * has_small_decoder + ["reading", "text_velocity"] * has_small_text


def count_steps(phases):
    """Return {phase: number of its steps}, 0 for a phase that a run leaves out."""
    steps = dict.fromkeys(PHASE_NAMES, 0)
    for span in phases:
        steps[span.name] += span.last - span.first
    return steps


def count_states(settings, num_trajectories, phases, num_buckets=1):
    """Return {phase: number of training states} for the smallest bucket; a batch is taken from one bucket.

    `num_trajectories` is that of the last resolution, which has the fewest.
    """
    num_trajectories = num_trajectories // num_buckets
    few_step_states = num_trajectories
    if max(settings.few_steps) > 1:
        few_step_states = 2 * num_trajectories + settings.rollout_states // num_buckets
    velocity_states = num_trajectories * settings.teacher_steps
    return {span.name: velocity_states if span.name == "velocity" else few_step_states for span in phases}
