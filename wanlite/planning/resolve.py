"""Settings from the command line -> settings completed from folders and files; torch is not imported."""

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
from ..schedule import still_image_shift
from ..teacher.components import find_components
from ..teacher.folder import check_holds_experts, find_teacher, neighbours
from ..training.run_folder import image_size, read_run
from ..training.trackers import check_tracker
from ..world.record import DETERMINED
from .budgets import apply_budget
from .checks import check_all, check_combinations, check_compiler, check_parts, check_student, complete_steps
from .hub import download_teacher
from .settings import check_bounds
from .teacher_folder import read_teacher_folder

ROOT = Path(__file__).resolve().parents[2]
TINY_TEACHER = ROOT / "tiny_teacher"
EMOJI_TEACHER = ROOT / "emoji_teacher"
NAMED_TEACHERS = {"tiny": TINY_TEACHER, "emoji": EMOJI_TEACHER}  # names that --teacher accepts
REAL_TEACHERS = ("Wan2.2-T2V-A14B", "Wan2.2-T2V-A14B-Diffusers")  # defaults, if in the current directory
TINY_STEPS = 1400  # default of --max_train_steps
REAL_STEPS = 5600  # a real teacher's student is far narrower than its teacher, and a step far quicker
REAL_RESOLUTION = 512
VALIDATION_STEPS = 350  # default of --validation_steps
MAX_VALIDATIONS = 40  # of a long run, by default
EMA_DECAY = 0.998  # default of --ema_decay: an average over about 500 steps
EMA_SHARE = 25  # a long run averages over one step in this many
MAX_NEIGHBOURS = 3  # that an error names


def complete(settings):
    """Return the settings, checked, with paths, sizes and numbers filled in from the teacher's folder.

    Raises OSError or ValueError for the first problem; a dry run raises one error with a line per problem.
    """
    check_parts(settings)
    if not settings.dry_run:
        check_bounds(settings)  # before a download of hours
        download_teacher(settings.teacher)
    teacher = choose_teacher(settings.teacher)
    _suggest_neighbours(check_holds_experts, teacher)  # without experts, every other check fails as well
    settings = _complete_typed(settings, teacher)
    check_all(_list_checks(settings, teacher), collect=settings.dry_run)
    few_steps, few_step_train_steps = complete_steps(settings)
    if read_teacher_folder(teacher).record.get("world") not in DETERMINED:
        # The number of images limits it; see resolve_run().
        few_step_train_steps = settings.few_step_train_steps
    resolution = _complete_resolution(teacher, settings)
    settings = replace(
        settings,
        teacher=str(teacher),
        resolution=resolution,
        flow_shift=settings.flow_shift or still_image_shift(*image_size(resolution)),
        few_steps=few_steps,
        few_step_train_steps=few_step_train_steps,
        reference_steps=settings.reference_steps or 2 * settings.teacher_steps,
        cache_dir=settings.cache_dir or str(Path(settings.output_dir) / "cache"),
    )
    return settings if settings.student is None else _complete_student(settings)


def is_tiny(teacher):
    """Whether a folder is a tiny teacher, of a world of this project."""
    return bool(read_teacher_folder(teacher).record)


def _complete_typed(settings, teacher):
    """Return the settings with the values that the checks need."""
    if is_tiny(teacher) and settings.budget is not None:
        raise ValueError(
            f"--budget {settings.budget} is for Wan2.2 itself, and {teacher} is a tiny teacher, whose student "
            "trains in minutes. Leave it out."
        )
    settings = apply_budget(settings)
    steps, output_dir = settings.max_train_steps, settings.output_dir
    if steps is None:
        steps = TINY_STEPS if is_tiny(teacher) else REAL_STEPS
    if output_dir.startswith("-"):  # printed commands would take it for a flag
        output_dir = f"./{output_dir}"
    return replace(
        settings,
        max_train_steps=steps,
        validation_steps=settings.validation_steps or max(VALIDATION_STEPS, steps // MAX_VALIDATIONS),
        ema_decay=max(EMA_DECAY, 1 - EMA_SHARE / max(1, steps))
        if settings.ema_decay is None
        else settings.ema_decay,
        mixed_precision=launched_precision(settings.mixed_precision),
        output_dir=output_dir,
    )


def _list_checks(settings, teacher):
    """Return the checks of the settings, in order, as functions that raise."""
    checks: list[Callable[[], object]] = [
        partial(check_bounds, settings),
        partial(_suggest_neighbours, _find_components, teacher),
        partial(_complete_resolution, teacher, settings),
        partial(check_combinations, settings),
        partial(check_launch, settings),
        partial(complete_steps, settings),
        partial(check_tracker, settings.report_to),
    ]
    if settings.compile:
        checks.append(check_compiler)
    if settings.prompts is not None:
        checks.insert(0, partial(read_prompts, settings.prompts, count=1))
    if settings.vocabulary is not None:
        checks.insert(0, partial(read_prompts, settings.vocabulary, count=1))
    if settings.images is not None:
        checks.insert(0, partial(list_images, settings.images))
    if settings.dry_run:  # imports torch, which a run imports later in any case
        checks.append(partial(_check_headers, teacher))
    return checks


def _complete_student(settings):
    """Return the settings with the absolute folder of --student; raises an error if it cannot be trained further."""
    student = Path(settings.student).absolute()
    if not student.is_dir():
        raise OSError(
            f"--student {settings.student}: no such folder. Expected the folder of a finished "
            "train_distillation.py run."
        )
    check_student(read_run(student), settings, student)
    return replace(settings, student=str(student))


def _suggest_neighbours(check, folder):
    """Return `check(folder)`; an OSError names complete teachers above or below the folder, if there are any."""
    try:
        return check(folder)
    except OSError:
        suggestions = []
        for neighbour in neighbours(Path(folder).absolute()):
            with suppress(OSError, ValueError):
                check_holds_experts(neighbour)
                find_components(neighbour)
                suggestions.append(f"--teacher {shlex.quote(str(neighbour))}")
        if not suggestions:
            raise
        raise OSError(
            f"--teacher {folder}: not a complete teacher. Did you mean "
            f"{' or '.join(suggestions[:MAX_NEIGHBOURS])}?"
        ) from None


def choose_teacher(teacher, log=print):
    """Return the folder of a --teacher name or path; None is a real teacher in this directory, else the tiny one."""
    if teacher in NAMED_TEACHERS:
        return _find_named(teacher, log)
    real = (Path(name) for name in REAL_TEACHERS if Path(name).is_dir())
    return _suggest_neighbours(find_teacher, teacher or next(real, TINY_TEACHER))


def _find_named(name, log):
    """Return the folder of a teacher of this repository, even if the current directory has a folder `name`."""
    folder = NAMED_TEACHERS[name]
    if Path(name).exists() and is_first():
        log(
            f"--teacher {name} is the teacher in {folder}; write ./{name} for the folder {name} in this "
            "directory"
        )
    if not (folder / "model_index.json").is_file():
        raise OSError(
            f"--teacher {name}: found no teacher in {folder}, expected a finished one. Train it, which takes "
            f"hours: python tools/train_tiny_teacher.py --world {name}"
        )
    return folder


def _find_components(teacher):
    return read_teacher_folder(teacher).components


def _check_headers(teacher):
    read_teacher_folder(teacher).files  # noqa: B018  (reading them is the check)


def _complete_resolution(teacher, settings):
    """Return --resolution; if unset, the last of --resolutions, that of a tiny teacher's record, or REAL_RESOLUTION."""
    folder = read_teacher_folder(teacher)
    resolution = settings.resolution
    for side in settings.resolutions or ():
        complete_resolution(side, folder.pixels_per_token)  # raises
        bucket_sizes((side, side), settings.aspect_ratios, folder.pixels_per_token)  # raises
    if resolution is None and settings.resolutions:
        resolution = settings.resolutions[-1]
    if resolution is None:
        resolution = folder.record.get("resolution", REAL_RESOLUTION)
    resolution = complete_resolution(resolution, folder.pixels_per_token)
    bucket_sizes(image_size(resolution), settings.aspect_ratios, folder.pixels_per_token)  # raises
    return resolution


def image_sizes(settings):
    """Return, for each resolution, the sizes (width, height) of validated images and of each training bucket."""
    unit = read_teacher_folder(settings.teacher).pixels_per_token
    sizes = [image_size(resolution) for resolution in settings.resolutions or [settings.resolution]]
    return [[size, *bucket_sizes(size, settings.aspect_ratios, unit)] for size in sizes]
