"""A History -> the sentences and tables of its page."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from ...phases import MIN_CAPTIONS, MIN_TRAJECTORIES, MIN_VALIDATED
from ..metrics import GUARDS
from .history import History
from .verdict import FAILED, GOOD, judge_run

EXPLAINED = {  # {measure: (title, sentence)}
    "image_error": (
        "Image error",
        "Squared distance to the teacher's image from the same noise. 0 is the same image, 1 is as far away as "
        "the average image.",
    ),
    "diversity": (
        "Diversity",
        "Difference between the images of one prompt, relative to the teacher's. 1 is as diverse as the teacher. "
        "A student below 0.6 is rejected.",
    ),
    "channel_drift": (
        "Colour drift",
        "Shift of the mean of the worst latent channel, in the teacher's standard deviations. A student above "
        "0.3 is rejected.",
    ),
    "saturation": (
        "Saturation",
        "Relative to the teacher's. A student below 0.75 or above 1.33 is rejected.",
    ),
    "frechet_distance": (
        "Frechet distance",
        "Distance between the distributions of the student's and the teacher's images. Lower is closer.",
    ),
}
MAX_REJECTED = 5  # validations that the warnings name
Table = list[tuple[str, str]]


class Cell(NamedTuple):
    """A value of the results, and whether it is within its limits."""

    text: str
    is_good: bool = True


class Result(NamedTuple):
    """A row of the results: a cell for each number of sampling steps, and an explanation."""

    title: str
    cells: list[Cell]
    note: str


# ---- the state of the run ----------------------------------------------------------------------------------


def describe_state(history: History) -> str:
    """Return one sentence on the state of a run."""
    if history.is_finished:
        verdict = judge_run(history)
        advice = f" To change: {verdict.advice}." if verdict.advice else ""
        return f"{verdict.word.capitalize()}: {verdict.reason or 'the student is saved'}.{advice}"
    done = f"Step {history.step:,} of {history.max_steps:,}"
    if history.kept:
        return f"{done}; the closest student so far is that of step {history.kept.step:,}."
    return f"{done}; no validation {'was accepted' if history.candidates else 'counts'} so far."


def describe_choice(history: History) -> str:
    """Return which step is kept, and why."""
    if history.is_finished:
        score = history.chosen.get(history.measure)
        value = "" if score is None else f" ({score:.3g})"
        why = str(history.chosen.get("why", "")).replace("_", " ")
        return f"The saved student is that of step {history.chosen.get('step')}: {why}{value}."
    if history.kept is None:
        return "The student is chosen at the end, among the accepted validations of the last phases."
    title, score = EXPLAINED[history.measure][0].lower(), history.kept.score(history.measure)
    return f"Step {history.kept.step:,} has the lowest {title} so far ({score:.3g})."


def rate_state(history: History) -> str:
    """Return the class of the state on the page: good, bad, or neither."""
    return {GOOD: "good", FAILED: "bad"}.get(judge_run(history).word, "") if history.is_finished else ""


def find_warnings(history: History) -> Iterator[str]:
    """Yield a sentence for each reason to doubt the result."""
    if skipped := history.last("skipped_steps"):
        yield f"{skipped:,} steps were skipped, because their gradients were not finite."
    if history.is_finished and not history.is_good:
        yield "No validation was accepted. The images may be unlike the teacher's."
    rejected = [each for each in history.candidates if each.violations]
    for each in rejected[-MAX_REJECTED:]:
        yield f"Step {each.step:,} was rejected, unlike the teacher {each.violations[0]}."
    if len(rejected) > MAX_REJECTED:
        yield f"{len(rejected) - MAX_REJECTED:,} earlier validations were rejected as well."
    counts = history.facts.get("counts", {})
    if counts.get("trajectories", MIN_TRAJECTORIES) < MIN_TRAJECTORIES:
        yield f"{counts['trajectories']:,} teacher images are few, and the student's images may stay noise."
    if counts.get("prompts", MIN_TRAJECTORIES) < MIN_TRAJECTORIES:
        yield f"{counts['prompts']:,} prompts are few. The student may draw other prompts badly."
    if counts.get("held_out", MIN_VALIDATED) < MIN_VALIDATED:
        yield f"{counts['held_out']:,} held-out prompts are few: validations also use training prompts."


# ---- results -----------------------------------------------------------------------------------------------


def list_counts(history: History) -> list[int]:
    """Return the numbers of sampling steps, in the order of the cells of a Result."""
    return sorted(history.kept.figures, reverse=True) if history.kept else []


def list_results(history: History) -> Iterator[Result]:
    """Yield the results of the kept student."""
    yield from _list_accuracies(history)
    for name, (title, note) in EXPLAINED.items():
        if history.kept and (name != "frechet_distance" or name == history.measure):
            values = [history.kept.figures[count][name] for count in list_counts(history)]
            yield Result(title, [Cell(f"{value:.2f}", is_within(name, value)) for value in values], note)


def _list_accuracies(history):
    results = history.run.get("results", {})
    if "student_by_steps" not in results:
        return
    by_steps = results["student_by_steps"]
    cells = [Cell(f"{by_steps[str(count)]['accuracy']:.1%}") for count in list_counts(history)]
    note = (
        f"Share of {results['captions']:,} held-out captions whose image has everything that the caption names. "
        f"The teacher reaches {results['teacher']['accuracy']:.1%}."
    )
    if results["captions"] < MIN_CAPTIONS:
        note += " The captions are too few to judge."
    yield Result("Captions drawn right", cells, note)


def is_within(name: str, value: float) -> bool:
    """Whether a measure is within its guard, if it has one."""
    lowest, highest = GUARDS.get(name, (-math.inf, math.inf))
    return lowest <= value <= highest


# ---- models, machine, costs --------------------------------------------------------------------------------


def list_models(history: History) -> Table:
    """Return the sizes of teacher, student and data."""
    teacher, shape = history.facts.get("teacher", {}), history.run.get("student", {})
    rows = []
    if experts := teacher.get("experts"):
        sizes = " + ".join(map(format_count, experts))
        rows.append(("Teacher", f"{teacher.get('folder')} ({teacher.get('layout')} layout)"))
        rows.append(("Its experts", f"{sizes} parameters"))
    if count := history.run.get("student_parameters"):
        rows.append(("Student", f"{format_count(count)} parameters"))
    if shape:
        width, depth, heads = (shape.get(name) for name in ("hidden_size", "depth", "num_heads"))
        rows.append(("Its shape", f"width {width}, {depth} blocks, {heads} heads"))
    for name, count in history.facts.get("counts", {}).items():
        rows.append((name.replace("_", " ").capitalize(), f"{count:,}"))
    return rows + _list_phases(history)


def _list_phases(history):
    """Return the steps of each phase at each size of images."""
    spans: dict[tuple, list[int]] = {}
    for phase in history.phases:
        spans.setdefault((phase["name"], *phase["size"]), []).extend([phase["first"], phase["last"]])
    return [
        (f"Phase {name}", f"steps {ends[0] + 1:,} to {ends[-1]:,}, images of {width} x {height}")
        for (name, width, height), ends in spans.items()
    ]


def list_small_parts(history: History) -> Table:
    """Return the sizes and the likeness of the small parts that were made after training."""
    figures = history.run.get("small", {}).get("figures", {})
    rows = []
    for name, key, measure in (
        ("Text encoder", "text_encoder", "cosine {cosine:.3f} to the large one"),
        ("Decoder", "decoder", "{psnr:.1f} dB to the large one"),
    ):
        if part := figures.get(key):
            sizes = " of ".join(format_count(part[size]) for size in ("parameters", "large_parameters"))
            rows.append((name, f"{sizes} parameters, {measure.format(**part)}"))
            rows.append(
                ("Its file", f"{part['megabytes']:,.1f} MB, the large one {part['large_megabytes']:,.1f} MB")
            )
    if accuracy := figures.get("accuracy"):
        drawn = f"{accuracy['small']:.1%}, with the large parts {accuracy['large']:.1%}"
        rows.append(("Captions drawn right", drawn))
    return rows


def list_machine(history: History) -> Table:
    """Return the machine and the versions."""
    machine = history.facts.get("machine", {})
    rows = [(name.capitalize(), str(value)) for name, value in machine.items() if name != "memory"]
    if memory := machine.get("memory"):
        rows.append(("Memory", f"{memory / 1e9:,.1f} GB"))
    return rows + [(name, str(value)) for name, value in history.run.get("versions", {}).items()]


def list_costs(history: History) -> Table:
    """Return the time and the memory of the run."""
    rows = []
    minutes = history.run.get("minutes")
    if seconds := 60 * minutes if minutes else history.last("seconds"):
        rows.append(("Time", f"{format_duration(seconds)}, {history.step:,} steps"))
    if generated := history.last("generated"):
        rate = format_rate(history.last("trajectories_per_second"))
        rows.append(("Teacher images", f"{generated:,}, {rate}"))
    if speed := history.last("images_per_second"):
        rows.append(("Training", f"{speed:,.3g} states a second"))
    if peak := max((record.get("memory_peak_gb", 0) for record in history.records), default=0):
        rows.append(("Memory", f"at most {peak:,.1f} GB"))
    return rows


def format_count(number: float) -> str:
    """Return a number of parameters in millions or billions."""
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.2f} million"


def format_duration(seconds: float) -> str:
    """Return a duration in the largest unit that it fills twice."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"


def format_rate(per_second: float) -> str:
    """Return a rate by the second, or by the hour if it is slow."""
    return f"{per_second:,.2g} a second" if per_second >= 1 else f"{3600 * per_second:,.3g} an hour"
