"""What a user is told: what will happen, and how it ended."""

import importlib.metadata
import math
import platform
from pathlib import Path

import torch


def announce(settings, files, student, device, num_trajectories, passes, parts, say):
    """Say what will happen before it happens; returns how many states the student learns from."""
    sizes = " + ".join(f"{expert.num_parameters / 1e6:,.2f} M" for expert in files.experts.values())
    batch = [settings.gradient_accumulation_steps, settings.train_batch_size]
    pictures = settings.max_train_steps * math.prod(batch)
    said = " x ".join(str(number) for number in batch if number > 1) or "1"
    config, steps = student.config, {}
    for part, first, last in parts:
        steps[part] = steps.get(part, 0) + last - first
    say(f"teacher  {settings.teacher} ({files.layout} layout, {len(files.experts)} expert(s): {sizes} parameters)\n"
        f"student  {config.hidden_size} x {config.depth}, {config.num_heads} heads: {student.num_parameters() / 1e6:,.2f} M "
        f"parameters, start: {settings.student or settings.projection}\n"
        f"device   {device}, {torch.get_num_threads()} threads, "
        f"{'float32' if settings.mixed_precision == 'no' else settings.mixed_precision + ' mixed precision'}\n"
        f"work     {num_trajectories:,} teacher pictures ({passes:,} teacher passes with all that is looked at), then "
        f"{settings.max_train_steps:,} steps "
        f"({pictures:,} states, {said} a step): {', '.join(f'{part} {count:,}' for part, count in steps.items())}\n"
        f"output   {Path(settings.output_dir).absolute()}")
    return pictures


def versions():
    names = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def conclude(settings, output, results, chosen, seconds, say):
    """Say how faithful the student is beside its teacher, which one was saved, and what to run next."""
    if "prompt_accuracy" in results:
        rows = {"teacher": results["teacher"]} | {f"student, {count} step{'s' * (count != '1')}": figures
                                                  for count, figures in reversed(results["student_by_steps"].items())}
        say(f"held-out captions drawn right ({results['captions']}):")
        for name, figures in rows.items():
            apart = [f"{said} {figures[key]:.1%}" for said, key in (("one object", "accuracy_one"), ("two", "accuracy_two"))
                     if figures[key] is not None]
            say(f"  {name:18} {figures['accuracy']:6.1%}  ({', '.join(apart)})")
    say(f"saved the student of step {chosen['step']}: {chosen['why']}; {seconds / 60:.1f} minutes in all\n"
        f"saved to {output}; pictures of teacher and student: {output / 'samples'}\n"
        f"next: python run_inference.py --model {settings.output_dir}")
