"""The History of a finished run -> whether its student is good, why, and the settings to change."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...phases import MIN_CAPTIONS, MIN_TRAJECTORIES
from ..metrics import GUARDS
from .history import History, format_steps

GOOD, NOT_YET, FAILED = "good", "not there yet", "failed"
# In the tiny world, image errors of 0.27, 0.84 and 1.0 come with 99, 68 and 41 % of the captions drawn right.
GOOD_ERROR, FAILED_ERROR = 0.5, 1.0
GOOD_ACCURACY, FAILED_ACCURACY = 0.9, 0.2  # relative to the teacher's
MAX_DIVERSITY = (
    1.5  # images of a prompt that differ more from each other than the teacher's ignore the prompt
)
FALL = 0.03  # a score still falls, or rises, if it changes by this share


class Verdict(NamedTuple):
    """One word about a student, with the reason, and the settings to change, which may be empty."""

    word: str
    reason: str
    advice: str

    @property
    def is_good(self) -> bool:
        return self.word == GOOD


def judge_run(history: History) -> Verdict:
    """Return the verdict on the saved student of a finished run, from its results and validations."""
    results = history.run.get("results", {})
    likeness = Likeness(history, results)
    word = NOT_YET
    if not history.is_good or likeness.is_failure:
        word = FAILED
    elif likeness.is_good:
        word = GOOD
    advice = "; ".join(find_advice(history, likeness, word))
    return Verdict(word, "; ".join(likeness.describe()), advice)


class Likeness:
    """How close a student is to its teacher, by the judge of a tiny world if there is one, else by image error."""

    def __init__(self, history: History, results: dict[str, Any]):
        self.history = history
        self.accuracy: float | None = None
        self.teacher_accuracy = 0.0
        if results.get("captions", 0) >= MIN_CAPTIONS:
            by_steps = results["student_by_steps"]
            self.count = max(map(int, by_steps))
            self.accuracy = by_steps[str(self.count)]["accuracy"]
            self.teacher_accuracy = results["teacher"]["accuracy"]
        self.error = mean_of(results, "image_error")
        self.diversity = mean_of(results, "diversity")

    @property
    def relative_accuracy(self) -> float | None:
        """The student's accuracy over the teacher's, None without a judge."""
        return None if self.accuracy is None else self.accuracy / max(self.teacher_accuracy, 1e-6)

    @property
    def is_far(self) -> bool:
        """Whether the image error, by which the student was chosen, is that of an average image."""
        return self.history.measure == "image_error" and not self.error < FAILED_ERROR

    @property
    def is_failure(self) -> bool:
        if self.relative_accuracy is not None:
            return self.relative_accuracy < FAILED_ACCURACY
        return self.is_far

    @property
    def is_good(self) -> bool:
        if self.relative_accuracy is not None:
            return self.relative_accuracy >= GOOD_ACCURACY
        is_close = self.history.measure != "image_error" or self.error <= GOOD_ERROR
        return is_close and self.diversity <= MAX_DIVERSITY

    def describe(self) -> Iterator[str]:
        """Yield the reasons of a verdict."""
        rejected = [each for each in self.history.candidates if each.violations]
        if not self.history.is_good:
            last = f", the last one {rejected[-1].violations[0]}" if rejected else ""
            yield f"no validation was accepted{last}"
        if self.accuracy is not None:
            yield (
                f"{self.accuracy:.1%} of the held-out captions are drawn right in {format_steps(self.count)}, "
                f"{self.teacher_accuracy:.1%} by the teacher"
            )
        if math.isfinite(self.error):
            yield f"image error {self.error:.2f} (0 is the teacher's image, 1 an average image)"
        if self.diversity > MAX_DIVERSITY:
            yield f"images of one prompt differ {self.diversity:.1f} times as much as the teacher's"
        elif math.isfinite(self.diversity):
            yield f"diversity {self.diversity:.2f} of the teacher's"


def find_advice(history: History, likeness: Likeness, word: str) -> Iterator[str]:
    """Yield a setting to change, with the reason."""
    steps = history.settings.get("max_train_steps") or history.step
    trajectories = history.facts.get("counts", {}).get("trajectories", MIN_TRAJECTORIES)
    fall = find_fall(history)
    if word == GOOD:
        if fall > FALL:
            yield f"nothing is necessary; the error still falls, and --max_train_steps {2 * steps} may lower it"
        return
    if trajectories < MIN_TRAJECTORIES:
        yield f"--num_trajectories {MIN_TRAJECTORIES}: {trajectories} images of the teacher are few"
    if likeness.diversity < GUARDS["diversity"][0]:
        gain = 2 * history.settings.get("diversity_gain", 0.3)
        yield f"--diversity_gain {gain:g}: the images of a prompt are too similar"
    if math.isnan(fall):
        yield f"--max_train_steps {4 * steps}: too few validations to see whether the error falls"
    elif fall > FALL:
        yield f"--max_train_steps {2 * steps}: the error still falls"
    elif (useful := count_useful_steps(history)) is not None:
        yield (
            f"--few_step_train_steps {useful} or --num_trajectories {2 * trajectories}: the error has risen since, "
            "because the few-step phase learns its images by heart"
        )
    elif trajectories >= MIN_TRAJECTORIES:
        yield (
            f"--num_trajectories {2 * trajectories} or a larger --hidden_size: the error does not fall any more"
        )


def find_fall(history: History) -> float:
    """Return by which share the last validation of the kept kind lowered the score, nan with fewer than two."""
    scores = [each.score(history.measure) for each in history.candidates if each.figures]
    if len(scores) < 2 or not scores[-2] > 0:
        return math.nan
    return 1 - scores[-1] / scores[-2]


def count_useful_steps(history: History) -> int | None:
    """Return the few-step steps before the saved student, if the error has risen by FALL since; else None."""
    kept, validations = history.kept, [each for each in history.candidates if each.figures]
    firsts = [phase["first"] for phase in history.phases if phase["name"] == "few_step"]
    if kept is None or not kept.figures or not firsts or kept.step <= firsts[0]:
        return None
    has_risen = validations[-1].score(history.measure) > (1 + FALL) * kept.score(history.measure)
    return kept.step - firsts[0] if has_risen else None


def mean_of(results: dict[str, Any], measure: str) -> float:
    """Return the mean of a measure over the numbers of sampling steps, nan without one."""
    values = [
        value
        for name, value in results.items()
        if name.removeprefix(f"{measure}_").isdigit() and isinstance(value, int | float)
    ]
    return sum(values) / len(values) if values else math.nan
