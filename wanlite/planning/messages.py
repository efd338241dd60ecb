"""A Run and its results -> the lines a user reads: the plan, the result, the next command."""

import importlib.metadata
import platform
import shlex
from pathlib import Path

import torch

from ..phases import MIN_TRAJECTORIES, MIN_VALIDATED

ROOT = Path(__file__).resolve().parents[2]  # where the scripts are
PROJECTING = (
    "the teacher's weights are projected into the student, which is saved as it is; nothing is trained"
)
MIN_CAPTIONS = 20  # of which a share drawn right means something


def announce(run, log):
    """Print what a Run will do, before it does anything."""
    settings, student, files = run.settings, run.estimator.student, run.files
    sizes = " + ".join(f"{expert.num_parameters / 1e6:,.2f} M" for expert in files.experts.values())
    is_full = settings.mixed_precision == "no"
    log(
        f"teacher  {settings.teacher} ({files.layout} layout, {len(files.experts)} expert(s): {sizes} "
        f"parameters)\n"
        f"student  {settings.hidden_size} x {settings.depth}, {settings.num_heads} heads: "
        f"{student.num_parameters() / 1e6:,.2f} M "
        f"parameters, start: {settings.student or settings.projection}\n"
        f"device   {run.device}, {torch.get_num_threads()} threads, "
        f"{'float32' if is_full else settings.mixed_precision + ' mixed precision'}\n"
        f"work     {PROJECTING if settings.project_only else describe_work(run)}\n"
        f"output   {Path(settings.output_dir).absolute()}"
    )
    if not settings.project_only:
        announce_few(run.num_generated, len(run.training), len(run.held_out), log)


def describe_work(run):
    """Return in words what the teacher draws and what the student is trained for."""
    settings = run.settings
    steps: dict[str, int] = {}
    factors = [settings.gradient_accumulation_steps, settings.train_batch_size]
    batch = " x ".join(str(number) for number in factors if number > 1) or "1"
    for phase, first, last in run.phases:
        steps[phase] = steps.get(phase, 0) + last - first
    return (
        f"{run.num_generated:,} teacher images ({run.num_passes:,} teacher passes with validation), "
        f"then {settings.max_train_steps:,} steps ({run.num_states:,} states, {batch} a step): "
        f"{', '.join(f'{phase} {count:,}' for phase, count in steps.items())}"
    )


def announce_few(num_trajectories, num_prompts, num_held_out, log):
    """Log a line if trajectories, prompts or held-out prompts are few."""
    if num_trajectories < MIN_TRAJECTORIES:
        log(
            f"WARNING  {num_trajectories} trajectories are few, and images may stay noise; the default is at "
            f"least {MIN_TRAJECTORIES}"
        )
    elif num_prompts < MIN_TRAJECTORIES:
        log(
            f"prompts  {num_prompts} are few: each is drawn about {round(num_trajectories / num_prompts)} "
            f"times, from different "
            f"noise (--num_trajectories {num_trajectories})"
        )
    if num_held_out < MIN_VALIDATED:
        log(
            f"held out {num_held_out}, which are few: validations use training prompts as well, from noise "
            f"of their own"
        )


def versions():
    names = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def command(script, *words):
    """Return a command for a shell, whatever characters its words have; `script` is one of ours."""
    return shlex.join(["python", script if Path.cwd() == ROOT else str(ROOT / script), *words])


def drawing_command(folder):
    """Return the command that draws with the student in a folder."""
    return command("run_inference.py", "--model", folder)


def verdict(chosen_step, is_close):
    """Return in a sentence which student was kept, and how good it is."""
    if is_close:
        return f"kept step {chosen_step}, the closest to the teacher"
    return (
        "no validation came close enough to the teacher; kept the last step. Try more --max_train_steps or "
        "--num_trajectories"
    )


def conclude(settings, output, results, ending, is_close, seconds, log):
    """Log the accuracy of teacher and student, the saved step, and the next command."""
    if "prompt_accuracy" in results:
        rows = {"teacher": results["teacher"]} | {
            f"student, {count} step{'s' * (count != '1')}": figures
            for count, figures in reversed(results["student_by_steps"].items())
        }
        log(f"held-out captions drawn right ({results['captions']}):")
        for name, figures in rows.items():
            log(f"  {name:18} {share_right(figures, results['captions'])}")
    took = f"finished in {seconds / 60:.1f} minutes"
    log(f"{took}; {ending}" if is_close else f"{took}\nWARNING   {ending}")
    log(
        f"saved to {output}; images of teacher and student: {output / 'samples'}\n"
        f"next: {drawing_command(settings.output_dir)}"
    )


def share_right(figures, captions):
    """Return in words what share of the captions was drawn right; of few captions, how many."""
    if captions < MIN_CAPTIONS:
        return f"{round(figures['accuracy'] * captions)} of {captions}, too few to judge"
    apart = [
        f"{name} {figures[key]:.1%}"
        for name, key in (("one object", "accuracy_one"), ("two", "accuracy_two"))
        if figures[key] is not None
    ]
    return f"{figures['accuracy']:6.1%}  ({', '.join(apart)})"
