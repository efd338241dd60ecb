"""run.json and the records of metrics.jsonl -> the validations of a run, and the student that is kept."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...files.file_names import METRICS
from ..metrics import find_guard_violations
from ..run_folder import read_records

MEASURES = ("image_error", "diversity", "channel_drift", "saturation", "frechet_distance")
COUNTED = re.compile(r"image_error_(\d+)")


@dataclass(frozen=True)
class Validation:
    """The figures of one validation."""

    step: int
    held_out_error: float
    figures: dict[int, dict[str, float]]  # {number of sampling steps: {measure: value}}
    is_candidate: bool  # to be the saved student

    @property
    def violations(self) -> list[str]:
        return [
            f"in {format_steps(count)}: {violation}"
            for count, each in self.figures.items()
            for violation in find_guard_violations(each)
        ]

    @property
    def is_accepted(self) -> bool:
        return self.is_candidate and bool(self.figures) and not self.violations

    def score(self, measure: str) -> float:
        """Return the mean of a measure over the numbers of sampling steps; lower is closer to the teacher."""
        return sum(each[measure] for each in self.figures.values()) / len(self.figures)


class History:
    """What a run has recorded so far; records without a step are left out."""

    def __init__(self, run: dict[str, Any], records: list[dict[str, Any]]):
        self.run = run
        self.facts: dict[str, Any] = run.get("report", {})  # {} in a run of an older version
        self.settings: dict[str, Any] = run.get("settings", {})
        self.records = [record for record in records if isinstance(record.get("step"), int)]
        self.validations = [
            self._read_validation(record) for record in self.records if "held_out_error" in record
        ]
        self.is_finished = bool(run.get("finished"))
        self.chosen: dict[str, Any] = run.get("chosen", {})
        self.measure = "frechet_distance" if self.settings.get("matching_steps") else "image_error"

    def _read_validation(self, record):
        counts = sorted(int(match[1]) for name in record if (match := COUNTED.fullmatch(name)))
        figures = {
            count: {name: record.get(f"{name}_{count}", math.nan) for name in MEASURES} for count in counts
        }
        step = record["step"]
        return Validation(step, record["held_out_error"], figures, self._is_candidate(step))

    def _is_candidate(self, step):
        """Whether a validation of a step is of the last resolution, and of phase velocity only without others."""
        if not self.phases:
            return True
        phase, last = self.phase_at(step), self.phases[-1]
        is_last_kind = phase["name"] != "velocity" or last["name"] == "velocity"
        return is_last_kind and phase["resolution"] == last["resolution"]

    @property
    def phases(self) -> list[dict[str, Any]]:
        return self.facts.get("phases", [])

    def phase_at(self, step: int) -> dict[str, Any]:
        """Return the phase that contains a step or ends with it, {} if run.json has no phases."""
        last = self.phases[-1] if self.phases else {}
        return next((phase for phase in self.phases if step <= phase["last"]), last)

    @property
    def step(self) -> int:
        return max((record["step"] for record in self.records), default=0)

    @property
    def max_steps(self) -> int:
        return max(self.settings.get("max_train_steps") or 0, self.step)

    def last(self, name: str) -> Any:
        """Return the newest value of a figure, None if there is none."""
        return next((record[name] for record in reversed(self.records) if name in record), None)

    @property
    def candidates(self) -> list[Validation]:
        return [each for each in self.validations if each.is_candidate]

    @cached_property
    def kept(self) -> Validation | None:
        """The validation of the saved student, or of the closest one so far."""
        if self.is_finished:
            step = self.chosen.get("step")
            return next((each for each in reversed(self.validations) if each.step == step), None)
        accepted = [each for each in self.candidates if each.is_accepted]
        return min(accepted, key=lambda each: each.score(self.measure), default=None)

    @property
    def is_good(self) -> bool:
        """Whether the saved student passed its validation; only then run.json has its score."""
        return self.is_finished and self.measure in self.chosen


def read_history(folder: Path, run: dict[str, Any]) -> History:
    """Return the History of a run with this content of run.json, and the metrics in its folder."""
    return History(run, [record for _, record in read_records(folder / METRICS)])


def format_steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"
