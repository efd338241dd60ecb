"""The noise schedule of a student: its scheduler's arguments, and the check that a saved one is that of the
training. No torch.
"""

import ast
from importlib.util import find_spec
from pathlib import Path

from .files.untrusted import read_json, shown

TIMESTEPS = 1000  # the teacher's unit of time; more steps than these repeat themselves
MAX_SHIFT = 1000  # at which all levels but the last are above 0.99
SCHEDULER = "UniPCMultistepScheduler"


def scheduler_arguments(shift, few_steps=()):
    """Return the arguments by which diffusers' UniPC is Wan's scheduler; all others keep their defaults.

    For a student of `few_steps`, numbers of steps, it takes plain Euler steps: order 1 alone would still
    correct them.
    """
    return {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "solver_order": 1 if few_steps else 2,
        "disable_corrector": list(range(max(few_steps, default=0))),
        "num_train_timesteps": TIMESTEPS,
    }


def recorded_schedule(run, source):
    """Return what run.json records of the schedule, {} where it records nothing; `source` names the file in
    errors.
    """
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


def read_schedule(folder, schedule):
    """Return the arguments of a saved student's scheduler; raises where any of them is not that of the
    training.

    `schedule` is what run.json records. Where it records nothing, any shift is taken, and that of either kind
    of student.
    """
    path, defaults = Path(folder) / "scheduler" / "scheduler_config.json", scheduler_defaults()
    config = read_json(path)
    if (name := config.get("_class_name")) != SCHEDULER:
        raise _unexpected(path, "_class_name", name, f"{SCHEDULER!r}, as the student was trained")
    config = {
        name: value for name, value in config.items() if not name.startswith("_")
    }  # the rest of these are versions
    found = defaults | config
    shift = schedule.get("flow_shift", found["flow_shift"])
    if not _is_shift(shift):
        raise _unexpected(path, "flow_shift", shift, f"a number above 0, at most {MAX_SHIFT}")
    counts = schedule["few_steps"] if "few_steps" in schedule else _counts_of(found)
    expected = defaults | scheduler_arguments(shift, counts or ())
    for name, value in expected.items():
        if not _is_same(found[name], value):
            raise _unexpected(path, name, found[name], f"{_short(value)}, as the student was trained")
    if unknown := sorted(config.keys() - defaults.keys()):
        raise _unexpected(
            path, shown(unknown[0]), config[unknown[0]], "no such setting (a newer diffusers may have it)"
        )
    return expected


def scheduler_defaults():
    """Return {argument: default} of diffusers' class.

    Its source is read: importing the class would import torch.
    """
    source = Path(find_spec("diffusers").origin).parent / "schedulers" / "scheduling_unipc_multistep.py"
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


def _counts_of(config):
    """Return the largest number of steps that a scheduler of few steps is set up for, none for one of stage
    1.
    """
    if config["solver_order"] != 1:
        return []
    return [len(config["disable_corrector"]) or 1] if isinstance(config["disable_corrector"], list) else [1]


def _is_shift(value):
    return type(value) in (int, float) and 0 < value <= MAX_SHIFT


def _is_same(found, expected):
    """Whether two values of JSON are equal; 3 is 3.0, but true is not 1."""
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_is_same, found, expected))
    return found == expected and isinstance(found, bool) == isinstance(expected, bool)


def _unexpected(path, name, found, expected):
    return ValueError(f"{path}: says {name} {_short(found)}, expected {expected}. Copy the folder again.")


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
