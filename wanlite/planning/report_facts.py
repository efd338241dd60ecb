"""A Run -> the facts that run.json keeps for report.html: the settings, the models, the machine and the next commands."""

import dataclasses
import os
import platform
from pathlib import Path

import psutil
import torch

from ..files.file_names import BASE
from .config_files import as_arguments, read_config
from .messages import command, drawing_command, tensorboard_command

TRAIN = "train_distillation.py"


def describe_for_report(run, arguments):
    """Return the facts of a Run whose command line has these `arguments`."""
    settings = run.settings
    return {
        "changed": find_changed(run.requested, arguments),
        "teacher": {
            "folder": settings.teacher,
            "layout": run.files.layout,
            "experts": [expert.num_parameters for expert in run.files.experts.values()],
        },
        "machine": describe_machine(run.device, settings.mixed_precision, run.accelerator.num_processes),
        "phases": [
            {**span._asdict(), "size": list(run.resolutions[span.resolution].size)} for span in run.phases
        ],
        "counts": {
            "prompts": len(run.training),
            "held_out": len(run.held_out),
            "trajectories": sum(run.num_generated),
            "states_per_step": run.states_per_step * run.accelerator.num_processes,
        },
        "directory": os.getcwd(),
        "commands": describe_commands(run, arguments),
    }


def find_changed(settings, arguments):
    """Return the settings that differ from their defaults; of those without a default, the ones that are given.

    They are given on the command line or in the file of --config.
    """
    if settings.config is not None:
        arguments = [*as_arguments(read_config(settings.config)), *arguments]
    typed = {argument.partition("=")[0] for argument in arguments}
    changed = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        flags = {f"--{field.name}", *field.metadata["aliases"]}
        if value != default and (default is not None or typed & flags):
            changed[field.name] = value
    return changed


def describe_machine(device, precision, num_processes):
    """Return the device, the memory of one such device in bytes, and the system."""
    is_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if is_gpu else None
    return {
        "device": properties.name if properties else f"{platform.machine()} {device.type}",
        "threads": torch.get_num_threads(),
        "memory": properties.total_memory if properties else psutil.virtual_memory().total,
        "processes": num_processes,
        "precision": "float32" if precision == "no" else f"{precision} mixed precision",
        "system": platform.platform(terse=True),
    }


def describe_commands(run, arguments):
    """Return the shell commands that a user may run next, by purpose."""
    settings = run.settings
    commands = {
        "draw": drawing_command(settings.output_dir),
        "resume": command(TRAIN, *resuming_arguments(settings, arguments)),
        "train further": command(TRAIN, *_further_arguments(run, arguments)),
    }
    if settings.report_to in ("tensorboard", "all"):
        commands["curves"] = tensorboard_command(settings)
    return commands


def resuming_arguments(settings, arguments):
    """Return the arguments that resume a run, without those that would start it again."""
    kept = _without_overwrite(settings, arguments)
    if settings.resume_from_checkpoint == "latest":
        return kept
    return [
        *without_flags(["resume_from_checkpoint"], kept),
        *_reverting(settings, "--resume_from_checkpoint", "latest"),
    ]


def _without_overwrite(settings, arguments):
    kept = [argument for argument in arguments if argument not in ("--overwrite", "--no-overwrite")]
    return [*kept, *(_reverting(settings, "--no-overwrite") if settings.overwrite else [])]


def _reverting(settings, *arguments):
    """Return the arguments if they have to revert a setting of the file of --config, else nothing."""
    return arguments if settings.config is not None else ()


def _further_arguments(run, arguments):
    """Return the arguments that train the student for as many steps again, from the end of its velocity phase."""
    settings, output = run.settings, Path(run.settings.output_dir)
    has_base = run.few_steps and run.phases[0].name == "velocity"
    further = {
        "student": output / BASE if has_base else output,
        "output_dir": output.with_name(f"{output.name}-further"),
        "cache_dir": settings.cache_dir,
    }
    if run.few_steps and not has_base:
        further["few_step_train_steps"] = settings.max_train_steps - settings.matching_steps
    added = [text for name, value in further.items() for text in (f"--{name}", str(value))]
    return [*_without_overwrite(settings, without_flags(further, arguments)), *added]


def without_flags(names, arguments):
    """Return the arguments without some flags and their values."""
    flags, kept, rest = {f"--{name}" for name in names}, [], iter(arguments)
    for argument in rest:
        if argument in flags:
            next(rest, None)
        elif argument.partition("=")[0] not in flags:
            kept.append(argument)
    return kept
