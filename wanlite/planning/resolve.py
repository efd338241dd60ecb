"""Settings from the command line -> settings completed from folders and files. No torch: errors come at once."""

import json
import math
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..data.buckets import bucket_sizes, complete_resolution
from ..data.image_sources import list_images
from ..data.prompts import read_prompts
from ..runtime.launch import check_launch, is_first, launched_precision
from ..teacher.components import find_components, has_two_experts
from ..teacher.folder import check_holds_experts, find_teacher, neighbours
from ..training.run_folder import image_size, read_run
from ..training.trackers import check_tracker
from .checks import check_all, check_compiler, check_student, check_together, complete_steps
from .settings import check_bounds
from .teacher_folder import read_teacher_folder

TINY_TEACHER, EMOJI_TEACHER = (
    Path(__file__).resolve().parents[2] / name for name in ("tiny_teacher", "emoji_teacher")
)
NAMED_TEACHERS = {"tiny": TINY_TEACHER, "emoji": EMOJI_TEACHER}  # what --teacher takes beside folders
REAL_TEACHERS = ("Wan2.2-T2V-A14B", "Wan2.2-T2V-A14B-Diffusers")  # looked for where the command is typed
TINY_STEPS, REAL_STEPS = (
    1400,
    5600,
)  # where --max_train_steps is open: a real teacher's student is far narrower, and far quicker
OFFICIAL_SHIFTS = {True: 12.0, False: 5.0}  # of two experts and of one, where no scheduler says it


def complete(settings):
    """Check paths, sizes and numbers, and fill in what the teacher's folder says.

    Raises OSError and ValueError for the first thing that is wrong, on a dry run for all of them, a line
    each.
    """
    teacher = choose_teacher(settings.teacher)
    _or_beside(check_holds_experts, teacher)  # without experts every further check fails as well
    steps = (
        (TINY_STEPS if read_teacher_folder(teacher).record else REAL_STEPS)
        if settings.max_train_steps is None
        else settings.max_train_steps
    )
    output_dir = (
        f"./{settings.output_dir}" if settings.output_dir.startswith("-") else settings.output_dir
    )  # no flag, as typed
    settings = replace(
        settings,
        max_train_steps=steps,
        mixed_precision=launched_precision(settings.mixed_precision),
        output_dir=output_dir,
    )
    check_all(_checks(settings, teacher), together=settings.dry_run)
    few_steps, few_step_train_steps = complete_steps(settings)
    settings = replace(
        settings,
        teacher=str(teacher),
        resolution=_complete_resolution(teacher, settings),
        flow_shift=_complete_shift(teacher, settings),
        few_steps=few_steps,
        few_step_train_steps=few_step_train_steps,
        reference_steps=settings.reference_steps or 2 * settings.teacher_steps,
        cache_dir=settings.cache_dir or str(Path(settings.output_dir) / "cache"),
    )
    return settings if settings.student is None else _with_student(settings)


def _checks(settings, teacher):
    """Return what is checked of the settings, as functions that raise, in order."""
    checks: list[Callable[[], object]] = [
        partial(check_bounds, settings),
        partial(_or_beside, _components_of, teacher),
        partial(_complete_resolution, teacher, settings),
        partial(_complete_shift, teacher, settings),
        partial(check_together, settings),
        partial(check_launch, settings),
        partial(complete_steps, settings),
        partial(check_tracker, settings.report_to),
    ]
    if settings.compile:
        checks.append(check_compiler)
    if settings.prompts is not None:
        checks.insert(0, partial(read_prompts, settings.prompts, count=1))
    if settings.images is not None:
        checks.insert(0, partial(list_images, settings.images))
    if settings.dry_run:  # takes the time of an import, and no run waits for it
        checks.append(partial(_check_headers, teacher))
    return checks


def _with_student(settings):
    """Return the settings with the absolute folder of --student; refuses one that this run cannot continue."""
    student = Path(settings.student).absolute()
    if not student.is_dir():
        raise OSError(
            f"--student {settings.student}: no such folder. Expected one that train_distillation.py finished."
        )
    check_student(read_run(student), settings, student)
    return replace(settings, student=str(student))


def _or_beside(check, folder):
    """Return a check's result; where it raises OSError and whole teachers lie above or below the folder, the
    error names them.
    """
    try:
        return check(folder)
    except OSError:
        path, whole = Path(folder).absolute(), []
        for other in neighbours(path):
            with suppress(OSError, ValueError):
                check_holds_experts(other)
                find_components(other)
                whole.append(f"--teacher {shlex.quote(str(other))}")
        if not whole:
            raise
        raise OSError(
            f"--teacher {folder}: no whole teacher. Did you mean {' or '.join(whole[:3])}?"
        ) from None


def choose_teacher(asked, say=print):
    """Return the folder of --teacher, a name or a path; where it is None that of a real teacher here, else of
    the tiny one.
    """
    if asked in NAMED_TEACHERS:
        return _find_named(asked, say)
    here = (Path(name) for name in REAL_TEACHERS if Path(name).is_dir())
    return _or_beside(find_teacher, asked or next(here, TINY_TEACHER))


def _find_named(name, say):
    """Return the folder of a teacher of this repository; a folder of that name in the current directory does
    not count.
    """
    teacher = NAMED_TEACHERS[name]
    if Path(name).exists() and is_first():
        say(
            f"--teacher {name} is the teacher in {teacher}; for the folder {name} in this directory write "
            f"./{name}"
        )
    if not (teacher / "model_index.json").is_file():
        raise OSError(
            f"--teacher {name}: found no teacher in {teacher}, expected a finished one. Make it: python "
            f"tools/train_tiny_teacher.py --world {name}, which takes hours."
        )
    return teacher


def _components_of(teacher):
    return read_teacher_folder(teacher).components


def _check_headers(teacher):
    read_teacher_folder(teacher).files  # noqa: B018  (reading them is the check)


def _complete_shift(teacher, settings):
    """Return --flow_shift, or where it is open that of the schedule that the teacher was made for."""
    record = read_teacher_folder(teacher).record
    path = teacher / "scheduler" / "scheduler_config.json"
    if settings.flow_shift is not None:
        return settings.flow_shift
    if "shift" in record or not path.is_file():
        return float(record.get("shift", OFFICIAL_SHIFTS[has_two_experts(teacher)]))
    try:
        shift = json.loads(path.read_text(encoding="utf-8"))["flow_shift"]
        if not 0 < shift < math.inf:
            raise ValueError(f"{shift} is not above 0")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: has no flow_shift ({error}). Download it again, or add --flow_shift."
        ) from None
    return float(shift)


def _complete_resolution(teacher, settings):
    resolution = (
        read_teacher_folder(teacher).record.get("resolution", 512)
        if settings.resolution is None
        else settings.resolution
    )
    unit = read_teacher_folder(teacher).pixels_per_token
    resolution = complete_resolution(resolution, unit)
    bucket_sizes(image_size(resolution), settings.aspect_ratios, unit)
    return resolution


def image_sizes(settings):
    """Return --resolution as (width, height), and after it the sizes of what is trained on, one a bucket."""
    size = image_size(settings.resolution)
    unit = read_teacher_folder(settings.teacher).pixels_per_token
    return [size, *bucket_sizes(size, settings.aspect_ratios, unit)]
