"""A Run and its results -> the lines that are printed: the plan, the result, the next command."""

import importlib.metadata
import platform
import shlex
from pathlib import Path

import torch

from ..files.file_names import REPORT, SAMPLES
from ..flow import make_scheduler, set_steps
from ..phases import MIN_CAPTIONS, MIN_TRAJECTORIES, MIN_VALIDATED
from ..schedule import TIMESTEPS
from ..training.run_folder import image_size
from .budgets import expected_quality
from .hardware import is_large

ROOT = Path(__file__).resolve().parents[2]  # the folder of the scripts
PROJECTED_ONLY = "the teacher's weights are projected into the student, which is saved untrained"


def announce(run, log):
    """Log the plan of a Run before anything is computed."""
    settings, student, files = run.settings, run.estimator.student, run.files
    sizes = " + ".join(f"{expert.num_parameters / 1e6:,.2f} M" for expert in files.experts.values())
    is_full = settings.mixed_precision == "no"
    precision = "float32" if is_full else f"{settings.mixed_precision} mixed precision"
    log(
        f"teacher  {settings.teacher} ({files.layout} layout, {len(files.experts)} expert(s): {sizes} "
        f"parameters)\n"
        f"student  {settings.hidden_size} x {settings.depth}, {settings.num_heads} heads: "
        f"{student.num_parameters() / 1e6:,.2f} M parameters, start: "
        f"{settings.student or settings.projection}\n"
        f"device   {describe_device(run)}, {precision}\n"
        f"work     {PROJECTED_ONLY if settings.project_only else describe_work(run)}\n"
        f"output   {Path(settings.output_dir).absolute()}"
    )
    if not settings.project_only:
        announce_few(sum(run.num_generated), len(run.training), len(run.held_out), log)


def describe_device(run):
    """Return the device of a run, or the machine that a dry run plans for."""
    if run.settings.plan_for is not None:
        return f"a machine of --plan_for {run.settings.plan_for}"
    return f"{run.device}, {torch.get_num_threads()} threads"


def describe_work(run):
    """Return the images of the teacher and the training steps by phase, and below them the noise schedule."""
    settings = run.settings
    factors = [settings.gradient_accumulation_steps, settings.train_batch_size]
    batch = " x ".join(str(number) for number in factors if number > 1) or "1"
    sizes = [" x ".join(map(str, resolution.size)) for resolution in run.resolutions]
    if len(sizes) > 1:
        first, *others = (f"{count:,} of {size}" for count, size in zip(run.num_generated, sizes))
        images = " and ".join([first.replace(" of ", " teacher images of "), *others])
    else:
        images = f"{run.num_generated[0]:,} teacher images"
    steps: dict[str, int] = {}
    for span in run.phases:
        phase = f"{span.name} {sizes[span.resolution]}" if len(sizes) > 1 else span.name
        steps[phase] = steps.get(phase, 0) + span.last - span.first
    return (
        f"{images} ({sum(run.num_passes):,} teacher passes with validation), "
        f"then {settings.max_train_steps:,} steps ({run.num_states:,} states, {batch} a step): "
        f"{', '.join(f'{phase}: {count:,}' if len(sizes) > 1 else f'{phase} {count:,}' for phase, count in steps.items())}\n"
        f"noise    {describe_noise(settings, run.files.boundary)}"
        f"{describe_expectation(run)}"
    )


def describe_expectation(run):
    """Return the permanent settings of the student and its expected quality, if the teacher is large; else ""."""
    if not is_large(run.files):
        return ""
    settings, hours = run.settings, run.workload().h100_hours
    guidance = " and ".join(f"{scale:g}" for scale in (settings.guidance_scale, settings.guidance_scale_2))
    negative = f'"{settings.negative_prompt}"' if settings.negative_prompt else "empty"
    return (
        f"\nfor good guidance {guidance} and the negative prompt ({negative}) become part of the student"
        f"\nexpect   {expected_quality(hours)}"
        f"\n         an estimate for {hours:,.1f} H100-hours and {run.num_states / 1e6:,.1f} M states; see "
        "docs/budgets.md"
    )


def describe_noise(settings, boundary):
    """Return the shift of the noise schedule, and the teacher's steps by expert, as one sentence."""
    width, height = image_size(settings.resolution)
    text = f"shift {settings.flow_shift:g} for {width} x {height} pixels"
    if boundary is None:
        return text
    levels = set_steps(make_scheduler(settings.flow_shift), settings.teacher_steps, "cpu")
    num_high = sum(timestep >= TIMESTEPS * boundary for timestep, _ in levels)
    num_low = settings.teacher_steps - num_high
    return f"{text}: {num_high} teacher steps with the high-noise expert, {num_low} with the low-noise expert"


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
            f"times, from different noise (--num_trajectories {num_trajectories})"
        )
    if num_held_out < MIN_VALIDATED:
        log(
            f"held out {num_held_out}, which are few: validations also use training prompts, from noise of "
            "their own"
        )


def versions():
    """Return the versions of Python and of the main libraries."""
    names = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def command(script, *arguments):
    """Return a shell command that runs a script of this repository; arguments are quoted."""
    return shlex.join(["python", script if Path.cwd() == ROOT else str(ROOT / script), *arguments])


def drawing_command(folder):
    """Return the command that samples images with the student in a folder."""
    return command("run_inference.py", "--model", folder)


def verdict(chosen_step, is_close):
    """Return which step was kept and why, as one sentence."""
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
            log(f"  {name:18} {describe_accuracy(figures, results['captions'])}")
    finished = f"finished in {seconds / 60:.1f} minutes"
    log(f"{finished}; {ending}" if is_close else f"{finished}\nWARNING   {ending}")
    log(f"saved to {output}; images of teacher and student: {output / SAMPLES}\nreport    {output / REPORT}")
    if settings.report_to in ("tensorboard", "all"):
        log(f"curves    {tensorboard_command(settings)}")
    log(f"next: {drawing_command(settings.output_dir)}")


def tensorboard_command(settings):
    """Return the command that shows the curves of a run in a browser."""
    return shlex.join(["tensorboard", "--logdir", str(Path(settings.output_dir) / settings.logging_dir)])


def describe_accuracy(figures, num_captions):
    """Return the share of captions drawn right in percent, or their number if there are few."""
    if num_captions < MIN_CAPTIONS:
        return f"{round(figures['accuracy'] * num_captions)} of {num_captions}, too few to judge"
    by_objects = [
        f"{name} {figures[key]:.1%}"
        for name, key in (("one object", "accuracy_one"), ("two", "accuracy_two"))
        if figures[key] is not None
    ]
    return f"{figures['accuracy']:6.1%}  ({', '.join(by_objects)})"
