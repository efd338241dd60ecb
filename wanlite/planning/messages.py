"""A Run and its results -> the lines that are printed: the plan, the result, the next command."""

import importlib.metadata
import platform
import shlex
from pathlib import Path

import torch

from ..files.file_names import REPORT, SAMPLES
from ..flow import make_scheduler, set_steps
from ..phases import MIN_CAPTIONS, MIN_TRAJECTORIES, MIN_VALIDATED
from ..runtime.terminal import labelled, one_line
from ..schedule import TIMESTEPS
from ..training.report.tables import format_count, format_duration
from ..training.run_folder import image_size
from .budgets import expected_quality
from .duration import describe_part_hours
from .hardware import is_large

ROOT = Path(__file__).resolve().parents[2]  # the folder of the scripts
MAX_NAMED = 32  # characters of a negative prompt, which may be twice as wide
PROJECTED_ONLY = "the teacher's weights are projected into the student, which is saved untrained"


def announce(run, log):
    """Log the plan of a Run before anything is computed."""
    settings, student = run.settings, run.estimator.student
    is_full = settings.mixed_precision == "no"
    precision = "float32" if is_full else f"{settings.mixed_precision} mixed precision"
    lines = [
        ("teacher", settings.teacher),
        ("", f"{run.files.layout} layout, {describe_experts(run.files)}"),
        (
            "student",
            f"{format_count(student.num_parameters())} parameters: width {settings.hidden_size}, "
            f"{settings.depth} blocks, {settings.num_heads} heads",
        ),
        ("start", settings.student or f"projection {settings.projection}"),
        ("device", f"{describe_device(run)}, {precision}"),
        *([("work", PROJECTED_ONLY)] if settings.project_only else describe_work(run)),
        *describe_parts(run),
        ("output", Path(settings.output_dir).absolute()),
    ]
    log("\n".join(labelled(*line) for line in lines))
    if not settings.project_only:
        announce_few(sum(run.num_generated), len(run.training), len(run.held_out), log)


def describe_experts(files):
    """Return the number of experts and their parameters."""
    sizes = [format_count(expert.num_parameters) for expert in files.experts.values()]
    if len(sizes) == 1:
        return f"one expert of {sizes[0]} parameters"
    return f"{len(sizes)} experts of {' and '.join(dict.fromkeys(sizes))} parameters"


def describe_device(run):
    """Return the device of a run, or the machine that a dry run plans for."""
    if run.settings.plan_for is not None:
        return f"a machine of --plan_for {run.settings.plan_for}"
    count = torch.get_num_threads()
    return f"{run.device}, {count} thread{'s' * (count != 1)}"


def describe_work(run):
    """Return the lines, (label, text), of the teacher's images, the steps by phase and the noise schedule."""
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
    colon = ":" * (len(sizes) > 1)
    return [
        ("work", f"{images} ({sum(run.num_passes):,} teacher passes with validation)"),
        (
            "steps",
            f"{settings.max_train_steps:,} of {batch} states, {run.num_states:,} in all: "
            f"{', '.join(f'{phase}{colon} {count:,}' for phase, count in steps.items())}",
        ),
        ("noise", describe_noise(settings, run.files.boundary)),
        *describe_expectation(run),
    ]


def describe_parts(run):
    """Return the lines of the small parts that are made after training, none without any."""
    work = run.part_work()
    if work is None:
        return []
    lines = work.plan.describe(work.student)
    if is_large(run.files):
        lines.append(describe_part_hours(work))
    return list(zip(["small", *("" for _ in lines)], lines))


def describe_expectation(run):
    """Return the lines of the settings that stay in the student and of its quality, if the teacher is large."""
    if not is_large(run.files):
        return []
    settings, hours = run.settings, run.workload().h100_hours
    guidance = " and ".join(f"{scale:g}" for scale in (settings.guidance_scale, settings.guidance_scale_2))
    negative = f'"{one_line(settings.negative_prompt, MAX_NAMED)}"' if settings.negative_prompt else "empty"
    return [
        ("fixed", f"guidance {guidance} and the negative prompt become part of the student"),
        ("", f"negative prompt: {negative}"),
        ("expect", expected_quality(hours)),
        (
            "",
            f"an estimate for {hours:,.1f} H100-hours and {run.num_states / 1e6:,.1f} M states; see "
            "docs/budgets.md",
        ),
    ]


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
            labelled(
                "WARNING",
                f"{num_trajectories} trajectories are few, and images may stay noise; the default is at least "
                f"{MIN_TRAJECTORIES}",
            )
        )
    elif num_prompts < MIN_TRAJECTORIES:
        times = round(num_trajectories / num_prompts)
        text = (
            f"each is drawn about {times} times, from different noise (--num_trajectories {num_trajectories})"
        )
        log(labelled("prompts", f"{num_prompts}: {text}"))
    if num_held_out < MIN_VALIDATED:
        text = "validations also use training prompts, from noise of their own"
        log(labelled("held out", f"{num_held_out}: {text}"))


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


def describe_kept(step, is_close):
    """Return which step was kept and why, as a clause."""
    if is_close:
        return f"kept step {step}, the closest to the teacher"
    return f"kept the last step, {step}: no validation came close enough to the teacher"


def conclude(run, settings, seconds, log):
    """Log the accuracy of teacher and student, the saved step, the verdict and the next command.

    `run` is the content of run.json.
    """
    results, verdict, output = run["results"], run["verdict"], Path(settings.output_dir)
    if "prompt_accuracy" in results:
        rows = {"teacher": results["teacher"]} | {
            f"student, {count} step{'s' * (count != '1')}": figures
            for count, figures in reversed(results["student_by_steps"].items())
        }
        log(f"held-out captions drawn right ({results['captions']}):")
        for name, figures in rows.items():
            log(f"  {name:18} {describe_accuracy(figures, results['captions'])}")
    log(f"finished in {format_duration(seconds)}; {run['chosen']['kept']}")
    log(labelled("verdict", f"{verdict['word']}: {verdict['reason']}"))
    if verdict["advice"]:
        log(labelled("change", verdict["advice"]))
    log(f"saved to {output}; images of teacher and student: {output / SAMPLES}\nreport   {output / REPORT}")
    if settings.report_to in ("tensorboard", "all"):
        log(f"curves   {tensorboard_command(settings)}")
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
