"""The noise schedule of a student: its scheduler's arguments, and a check of a saved one. No torch."""

import ast
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .files.file_names import SCHEDULER_CONFIG
from .files.json_files import read_json, shorten, shown

TIMESTEPS = 1000  # timestep = TIMESTEPS * noise level, in every Wan; a solve of more steps repeats some
MAX_SHIFT = 1000  # all levels but the last are above 0.99
SCHEDULER = "UniPCMultistepScheduler"
VIDEO_SHIFT, VIDEO_PIXELS = 5.0, 1280 * 720  # diffusers' documentation of Wan: 5.0 for 720p, 3.0 for 480p
MIN_STILL_SHIFT, MAX_STILL_SHIFT = 3.0, 5.0  # of the published settings for still images of Wan


def still_image_shift(width: int, height: int) -> float:
    """Return the default shift of the noise schedule for still images of a size in pixels: 3 up to about 550 x 550.

    It grows with the square root of the number of pixels, as in Stable Diffusion 3 (Esser et al. 2024, section
    5.3.2), through Wan's own value at 720p, and stays in the range of the settings that are published for still
    images. The shift of Wan2.2-T2V-A14B's own code, 12, is that of video: at 512 x 512 it puts 13 of 20 steps on
    the high-noise expert, and 1 step below a noise level of 0.5.
    """
    scaled = VIDEO_SHIFT * math.sqrt(width * height / VIDEO_PIXELS)
    return round(min(max(scaled, MIN_STILL_SHIFT), MAX_STILL_SHIFT), 2)


def scheduler_arguments(shift: float, few_steps: Sequence[int] = ()) -> dict[str, Any]:
    """Return the arguments that make diffusers' UniPC Wan's scheduler; all others keep their defaults.

    For a student trained for the numbers of steps in `few_steps` it takes plain Euler steps: order 1 alone
    leaves the corrector on.
    """
    return {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "solver_order": 1 if few_steps else 2,
        "disable_corrector": list(range(max(few_steps, default=0))),
        "num_train_timesteps": TIMESTEPS,
    }


def recorded_schedule(run: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Return the schedule in the content of run.json, {} if there is none; `source` names the file in errors."""
    schedule = run.get("schedule") or {}
    if not isinstance(schedule, dict):
        raise _unexpected(source, "schedule", schedule, "an object {...}")
    counts = schedule.get("few_steps") or []
    if not isinstance(counts, list) or any(
        type(count) is not int or not 0 < count <= TIMESTEPS for count in counts
    ):
        raise _unexpected(source, "few_steps", counts, f"whole numbers from 1 to {TIMESTEPS}")
    if "flow_shift" in schedule and not _is_shift(schedule["flow_shift"]):
        raise _unexpected(
            source, "flow_shift", schedule["flow_shift"], f"a number above 0, at most {MAX_SHIFT}"
        )
    return schedule


def first_step(num_steps: int, strength: Any, name: str = "strength") -> int:
    """Return the step, from 0, at which an image enters a solve of `num_steps` to be changed by `strength`.

    The steps from there are `strength` of all, rounded; at least one, and all of them at 1 only. `name` is the
    argument in errors. Raises ValueError for a strength that is not above 0 and at most 1, or without such a step.
    """
    if type(strength) not in (int, float) or not 0 < strength <= 1:
        raise ValueError(f"{name} is {shorten(strength)}, expected a number above 0, at most 1.")
    if strength == 1:
        return 0
    if num_steps == 1:
        raise ValueError(
            f"{name} {strength}: a single step starts from noise alone. Take more steps, or a strength of 1."
        )
    return num_steps - min(max(1, math.floor(num_steps * strength + 0.5)), num_steps - 1)


def read_schedule(folder: str | Path, schedule: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a saved student's scheduler; raises ValueError if they are not those of the training.

    `schedule` is that of run.json. If it is {}, any shift and either kind of student is accepted.
    """
    path, defaults = Path(folder) / "scheduler" / SCHEDULER_CONFIG, scheduler_defaults()
    config = read_json(path)
    if (name := config.get("_class_name")) != SCHEDULER:
        raise _unexpected(path, "_class_name", name, f"{SCHEDULER!r}, as the student was trained")
    config = {name: value for name, value in config.items() if not name.startswith("_")}  # versions have one
    found = defaults | config
    shift = schedule.get("flow_shift", found["flow_shift"])
    if not _is_shift(shift):
        raise _unexpected(path, "flow_shift", shift, f"a number above 0, at most {MAX_SHIFT}")
    counts = schedule["few_steps"] if "few_steps" in schedule else _counts_of(found)
    expected = defaults | scheduler_arguments(shift, counts or ())
    for name, value in expected.items():
        if not _is_same(found[name], value):
            raise _unexpected(path, name, found[name], f"{shorten(value)}, as the student was trained")
    if unknown := sorted(config.keys() - defaults.keys()):
        raise _unexpected(
            path, shown(unknown[0]), config[unknown[0]], "no such setting; a newer diffusers may have it"
        )
    return expected


def scheduler_defaults() -> dict[str, Any]:
    """Return {argument: default} of diffusers' class, from its source: importing the class would import torch."""
    spec = find_spec("diffusers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("diffusers is not installed. Run pip install -r requirements.txt.")
    source = Path(spec.origin).parent / "schedulers" / "scheduling_unipc_multistep.py"
    found = next(
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == SCHEDULER
    )
    init = next(
        node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ).args
    return {
        argument.arg: ast.literal_eval(default)
        for argument, default in zip(init.args[1:], init.defaults, strict=True)
    }


def _counts_of(config: dict[str, Any]) -> list[int]:
    """Return the largest number of steps of a few-step student's scheduler, [] for a student of stage 1."""
    if config["solver_order"] != 1:
        return []
    return [len(config["disable_corrector"]) or 1] if isinstance(config["disable_corrector"], list) else [1]


def _is_shift(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= MAX_SHIFT


def _is_same(found: Any, expected: Any) -> bool:
    """Whether two JSON values are equal; 3 equals 3.0, but true does not equal 1."""
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_is_same, found, expected))
    return found == expected and isinstance(found, bool) == isinstance(expected, bool)


def _unexpected(path: str | Path, name: str, found: Any, expected: str) -> ValueError:
    return ValueError(f"{path}: {name} is {shorten(found)}, expected {expected}. Copy the folder again.")
