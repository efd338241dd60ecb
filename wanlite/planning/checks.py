"""Settings of a run -> ValueError with a remedy if they cannot work; torch is not imported."""

import os
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from ..files.json_files import shorten
from ..phases import share_few_steps
from .machines import planned_machine
from .part_settings import PART_SETTINGS


def check_all(checks: Iterable[Callable[[], object]], collect: bool = False) -> None:
    """Run checks in order and raise the first error, or with `collect` one error with a line for each."""
    errors = []
    for check in checks:
        try:
            check()
        except (OSError, ValueError) as error:
            if not collect:
                raise
            errors.append(" ".join(str(error).splitlines()))
    if errors:
        raise ValueError("\n".join(dict.fromkeys(errors)))


def check_combinations(settings: Any) -> None:
    """Raise ValueError for settings that contradict each other, empty prompts and unusable folders."""
    _check_data(settings)
    _check_folders(settings)
    _check_modes(settings)


def _check_data(settings):
    if settings.num_images is not None and settings.images is None:
        raise ValueError(
            f"--num_images is {settings.num_images}, which needs --images. Add --images, or leave it out."
        )
    if 0 < (settings.rollout_states or 0) < len(settings.aspect_ratios or ()):
        raise ValueError(
            f"--rollout_states is {settings.rollout_states}, expected 0, or at least one for each of the "
            f"{len(settings.aspect_ratios)} --aspect_ratios."
        )
    if settings.plan_for is not None:
        planned_machine(settings.plan_for)  # raises
        if not settings.dry_run:
            raise ValueError(
                f"--plan_for {settings.plan_for} plans for another machine. Add --dry_run, or leave it out."
            )
    _check_resolutions(settings)
    if any(not prompt.strip() for prompt in settings.validation_prompts or ()):
        raise ValueError("--validation_prompts has an empty prompt, expected text in each. Leave it out.")


def _check_resolutions(settings):
    sides = settings.resolutions or []
    text = " ".join(map(str, sides))
    if any(side >= larger for side, larger in zip(sides, sides[1:])):
        raise ValueError(f"--resolutions {text}: expected ever larger sizes, for example 256 512.")
    if sides and settings.resolution not in (None, sides[-1], [sides[-1]]):
        raise ValueError(
            f"--resolutions {text} end at {sides[-1]}, but --resolution is {settings.resolution}. Leave "
            "--resolution out."
        )


def _check_folders(settings):
    cache = settings.cache_dir
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        raise ValueError(f"--cache_dir {cache}: is a file, expected a folder. Choose another.")
    output = Path(settings.output_dir).absolute()
    if not Path(os.path.normpath(output / settings.logging_dir)).is_relative_to(output):
        raise ValueError(
            f"--logging_dir {settings.logging_dir}: is not inside --output_dir. Name a folder in it, for "
            "example logs."
        )


def _check_modes(settings):
    if settings.project_only and (settings.student is not None or settings.projection == "none"):
        raise ValueError(
            "--project_only saves a projected student, and --student or --projection none turns the projection "
            "off. Leave one of them out."
        )
    if settings.expert == "best_per_block" and settings.projection == "calibrated":
        raise ValueError(
            "--expert best_per_block requires --projection weights: a student is calibrated against one "
            "expert. Add --projection weights, or choose --expert low or high."
        )
    if settings.matching_steps and settings.mixed_precision == "fp16":
        raise ValueError(
            "--matching_steps requires --mixed_precision no or bf16: the critic's gradients are not scaled."
        )


def check_parts(settings: Any) -> None:
    """Raise ValueError for settings of small parts that contradict each other, or leave nothing to make."""
    small = [f"--{name} small" for name in ("text_encoder", "decoder") if getattr(settings, name) == "small"]
    if small and settings.max_train_steps == 0:
        model = settings.student or "DIR"
        raise ValueError(
            f"--max_train_steps is 0, and {small[0]} follows a training. Small parts of a trained student: "
            f"{shlex.join(['python', '-m', 'wanlite.small', '--model', model])}"
        )
    if small and settings.project_only:
        raise ValueError(
            f"--project_only saves a student that is not trained, and {small[0]} is made for a trained one. Leave "
            "one of them out."
        )
    for part, names in PART_SETTINGS.items():
        given = [name for name in names if getattr(settings, name) is not None]
        if given and getattr(settings, part) != "small":
            raise ValueError(
                f"--{given[0]} is {getattr(settings, given[0])}, which needs --{part} small. Add it, or leave "
                f"--{given[0]} out."
            )


def _compilers() -> list[str]:
    return [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++", "cl") if name]


def has_compiler() -> bool:
    """Whether a C++ compiler is installed."""
    return any(map(shutil.which, _compilers()))


def check_compiler() -> None:
    """Raise ValueError if no C++ compiler is installed; torch requires one for --compile."""
    if not has_compiler():
        raise ValueError(
            f"--compile needs a C++ compiler, and none of {', '.join(_compilers())} is found. Install one (apt "
            "install g++), or leave --compile out."
        )


def complete_steps(settings: Any) -> tuple[list[int], int]:
    """Return few_steps in ascending order, and few_step_train_steps without the limit by the number of images.

    Raises ValueError if the phases are longer than --max_train_steps, or a number of sampling steps cannot be
    trained.
    """
    few_steps = sorted(set(settings.few_steps))
    few_step_train_steps = settings.few_step_train_steps
    if few_step_train_steps is None:
        few_step_train_steps = share_few_steps(settings)
    _check_phases(settings, few_step_train_steps)
    if few_step_train_steps or settings.matching_steps:
        _check_few_steps(settings, few_steps)
    return few_steps, few_step_train_steps


def _check_phases(settings, few_step_train_steps):
    """Raise ValueError if the phases are longer than the run, or a phase lacks the student it starts from."""
    velocity_steps = settings.max_train_steps - few_step_train_steps - settings.matching_steps
    if velocity_steps < 0:
        raise ValueError(
            f"--few_step_train_steps {few_step_train_steps} and --matching_steps {settings.matching_steps} "
            f"are more than --max_train_steps {settings.max_train_steps}, which includes them. Raise "
            "--max_train_steps, or lower the others."
        )
    if settings.matching_steps and not few_step_train_steps and settings.student is None:
        raise ValueError(
            "--matching_steps without --few_step_train_steps: distribution matching starts from a student "
            "that samples in few steps. Raise --few_step_train_steps, or name such a student with --student DIR."
        )
    if velocity_steps < len(settings.resolutions or ()):
        raise ValueError(
            f"--resolutions {' '.join(map(str, settings.resolutions))} share the {velocity_steps} steps of the "
            "velocity phase, expected at least one for each. Raise --max_train_steps."
        )
    if velocity_steps == 0 and settings.student is None:
        raise ValueError(
            f"--few_step_train_steps {few_step_train_steps} leaves no step of stage 1, and few-step training "
            "starts from a student of stage 1. Lower it, or name such a student with --student DIR."
        )


def _check_few_steps(settings, few_steps):
    """Raise ValueError for numbers of steps that do not divide the teacher's or are not trained."""
    for count in few_steps:
        if count < 1 or settings.teacher_steps % count:
            raise ValueError(
                f"--few_steps {count} does not divide --teacher_steps {settings.teacher_steps}: the noise "
                "levels of a student are among the teacher's. Choose divisors, for example 1 2 4."
            )
    if settings.num_inference_steps not in few_steps:
        raise ValueError(
            f"--num_inference_steps {settings.num_inference_steps} is not one of --few_steps "
            f"{' '.join(map(str, few_steps))}, which the student is trained for. Choose one of them."
        )


def check_batch(settings: Any, states: dict[str, int], ranks: int) -> None:
    """Raise ValueError for a batch of all ranks that is larger than the states of a phase; see count_states()."""
    batch_size = settings.train_batch_size * ranks
    for phase, count in states.items():
        if count < batch_size:
            lower = f"lower --train_batch_size to {count // ranks}, or " if count >= ranks else ""
            ratios = ", or name fewer --aspect_ratios" if settings.aspect_ratios else ""
            raise ValueError(
                f"the phase {phase} has {count} training states, fewer than one batch of {batch_size}: "
                f"{lower}raise --num_trajectories or --rollout_states{ratios}."
            )


def check_student(run: dict[str, Any], settings: Any, folder: Path) -> None:
    """Raise ValueError if this run cannot train a saved student further; `run` is run.json in its `folder`."""
    _check_finished(run, folder)
    _check_large_parts(run, folder)
    _check_record(run, folder)
    _check_previous_phases(run["schedule"]["phases"], settings, folder)
    _check_same_settings(run, settings, folder)


def _refuse_student(folder: Path, problem: str) -> NoReturn:
    raise ValueError(f"--student {folder}: {problem}")


def _check_finished(run, folder):
    if run.get("projected_only"):
        _refuse_student(
            folder,
            "holds a projected initialization that was not trained. Leave --student out: a run with the same "
            "--cache_dir or --output_dir starts from it.",
        )
    if not run.get("finished"):
        _refuse_student(folder, "holds no finished run. Finish it with the command that started it.")


def _check_large_parts(run, folder):
    if "parts" in run:
        _refuse_student(
            folder,
            "has small parts, and training needs the teacher's. Name the folder of the student with large ones.",
        )


def _check_record(run, folder):
    """Raise ValueError if an entry of run.json is missing or has another type."""
    if "schedule" not in run:
        _refuse_student(
            folder,
            "was saved by an older version, which did not record the training schedule. Train it again, or "
            "leave --student out to start from the teacher's weights.",
        )
    kinds = {"teacher": str, "student": dict, "settings": dict, "schedule": dict}
    if bad := [name for name, kind in kinds.items() if not run.get(name) or not isinstance(run[name], kind)]:
        _refuse_student(folder, f"its run.json has no valid {', '.join(bad)}. Copy the folder again.")
    phases = run["schedule"].get("phases")
    if not isinstance(phases, dict) or any(type(count) is not int for count in phases.values()):
        _refuse_student(folder, "its run.json has no valid phases in its schedule. Copy the folder again.")


def _check_previous_phases(phases, settings, folder):
    """Raise ValueError if this run leaves out a phase that the student was not trained in before."""
    _, few_step_train_steps = complete_steps(settings)
    if settings.max_train_steps > few_step_train_steps + settings.matching_steps:
        return
    if not phases.get("velocity"):
        _refuse_student(
            folder,
            f"was not trained in stage 1 (its phases are {shorten(phases)}). Lower --few_step_train_steps, so that "
            "steps of stage 1 remain, or name another student.",
        )
    if not few_step_train_steps and not phases.get("few_step"):
        _refuse_student(
            folder,
            f"was not trained to sample in few steps (its phases are {shorten(phases)}), which distribution matching "
            "requires. Raise --few_step_train_steps, or name another student.",
        )


def _check_same_settings(run, settings, folder):
    """Raise ValueError if the student was trained with other settings or has another shape."""
    trained, shape, current = run["settings"], run["student"], vars(settings)
    for name in ("guidance_scale", "guidance_scale_2", "negative_prompt", "flow_shift", "resolution"):
        if trained.get(name) != current[name]:
            _refuse_student(
                folder,
                f"was trained with {name} {shorten(trained.get(name))}, and this run has "
                f"{shorten(current[name])}. Use the "
                "same, or leave --student out.",
            )
    for name in ("hidden_size", "depth", "num_heads", "ffn_dim"):
        if current[name] is not None and current[name] != shape.get(name):
            _refuse_student(
                folder,
                f"has {name} {shorten(shape.get(name))}, and --{name} is {current[name]}. Leave the flag out.",
            )
