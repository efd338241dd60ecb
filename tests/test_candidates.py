"""Which validated student is kept, and how a phase begins."""

from types import SimpleNamespace

from accelerate import Accelerator

from wanlite.training.state import Progress, TrainingState
from wanlite.training.validation import Validator


def kept_steps(*validations):
    """Return the steps of the students that are kept, of (phase, image error, is accepted) by step."""
    validator, progress, kept = Validator.__new__(Validator), Progress(), []
    validator.run = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=False))

    def keep(score, figures):
        kept.append(progress.step)
        progress.best = {"phase": progress.phase, "score": score}

    state = SimpleNamespace(progress=progress, keep_as_best=keep)
    for progress.step, (progress.phase, error, is_accepted) in enumerate(validations):
        validator.find_violations = lambda figures, accepted=is_accepted: [] if accepted else ["diversity"]
        validator.consider(state, {}, {4: {"image_error": error}})
    return kept


def test_the_closest_accepted_student_of_a_phase_is_kept():
    assert kept_steps(("few_step", 3, True), ("few_step", 2, True), ("few_step", 2.5, True)) == [0, 1]
    assert kept_steps(("few_step", 3, False), ("few_step", 4, True), ("few_step", 1, False)) == [1]


def test_the_first_accepted_student_of_a_later_phase_replaces_earlier_ones():
    later = [("matching", 1, False), ("matching", 5, True), ("matching", 6, True), ("matching", 4, True)]
    assert kept_steps(("few_step", 2, True), *later) == [0, 2, 4]


def test_a_phase_begins_with_its_own_accumulation():
    accelerator, state = Accelerator(cpu=True, gradient_accumulation_steps=3), SimpleNamespace()
    accelerator.step, state.progress, state.critic = 2, Progress(), None
    phase = SimpleNamespace(name="velocity", first=0, accumulation=4)
    TrainingState.begin(state, phase, accelerator)
    assert (accelerator.gradient_accumulation_steps, accelerator.step) == (4, 0)
