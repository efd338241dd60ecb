"""How faithful pictures are to held-out captions: teacher, student, and a random-start student of the same budget.

    python benchmarks/quality.py --model outputs/wan_t2i            # trains the twin first, once, beside the model
    python benchmarks/quality.py --model outputs/wan_t2i --quick    # about a minute: few captions, a twin of few steps
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from run_inference import Painter
from train_distillation import Settings, draw_pictures, student_velocity, teacher_velocity
from wanlite import shapes
from wanlite.flow import make_scheduler
from wanlite.measure import prompt_accuracy, variety
from wanlite.run_folder import read_run, write_json
from wanlite.teacher import Teacher, open_teacher_files

COLUMNS = ("model", "steps", "guidance", "seed", "train_steps", "accuracy", "accuracy_one", "accuracy_two",
           *shapes.ATTRIBUTES, "variety", "seconds")
QUICK_STEPS = 40


def train_twin(folder, run, quick):
    """Train the random-start twin under the run's own settings; returns its folder. A finished one is used again."""
    twin = folder.parent / f"{folder.name}-random-start{'-quick' if quick else ''}"
    if not read_run(twin).get("finished"):
        settings = run["settings"] | {"output_dir": str(twin), "projection": "none", "validation_prompts": None}
        if quick:
            settings |= {"max_train_steps": QUICK_STEPS, "num_trajectories": 256, "validation_steps": QUICK_STEPS,
                         "num_held_out": 40}
        flags = [word for name, value in settings.items() if value is not None and not isinstance(value, bool)
                 for word in (f"--{name}", str(value))]
        switches = [f"--{'' if value else 'no-'}{name}" for name, value in settings.items() if isinstance(value, bool)]
        subprocess.run([sys.executable, str(ROOT / "train_distillation.py"), *flags, *switches], check=True)
    return twin


def painters(folder, twin, run):
    """Yield (model, steps, guidance, training steps, draw), where draw(captions, seeds) returns pictures."""
    settings = Settings(**run["settings"])
    student = Painter(folder)
    teacher = Teacher(open_teacher_files(settings.teacher))
    guided = teacher_velocity(teacher, settings, student.embed([settings.negative_prompt])[0])
    size = settings.resolution // student.autoencoder.config.scale_factor_spatial

    def draw_with(velocity_for):
        def draw(captions, seeds, num_steps):
            return draw_pictures(velocity_for, student.autoencoder, student.embed(captions), seeds,
                                 make_scheduler(settings.flow_shift), num_steps, (teacher.config["in_channels"], size, size))
        return draw

    guidance = f"{settings.guidance_scale:g}/{settings.guidance_scale_2:g}"
    for steps in (40, settings.teacher_steps, settings.num_inference_steps):
        yield "teacher", steps, guidance, None, draw_with(guided)
    trained = run["settings"]["max_train_steps"]
    for name, painter, budget in (("student", student, trained),
                                  ("random_start", Painter(twin), read_run(twin)["settings"]["max_train_steps"])):
        for steps in (settings.teacher_steps, settings.num_inference_steps):
            yield name, steps, "1", budget, draw_with(student_velocity(painter.student))


def summarise(rows):
    """Print mean and range over seeds for each model and number of steps; returns {(model, steps): mean accuracy}."""
    means = {}
    for model, steps in dict.fromkeys((row["model"], row["steps"]) for row in rows):
        found = [row for row in rows if (row["model"], row["steps"]) == (model, steps)]
        accuracy, one, two, seconds = (np.mean([row[name] for row in found])
                                       for name in ("accuracy", "accuracy_one", "accuracy_two", "seconds"))
        lowest, highest = (pick(row["accuracy"] for row in found) for pick in (min, max))
        print(f"{model} in {steps} steps: {accuracy:.3f} ({lowest:.3f} to {highest:.3f}), one object {one:.3f}, two {two:.3f}, "
              f"variety {found[0]['variety']}, {seconds:.3f} s a picture")
        means[model, steps] = float(accuracy)
    return means


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("outputs/wan_t2i"), help="a finished run")
    parser.add_argument("--captions", type=int, default=500, help="held-out captions, half of them of two objects")
    parser.add_argument("--seeds", type=int, default=3, help="noise seeds, a row each")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    run = read_run(options.model)
    if not run.get("finished"):
        parser.exit(2, f"quality.py: {options.model} holds no finished run. Run train_distillation.py first.\n")
    if options.quick:
        options.captions, options.seeds = 40, 1
    print(f"judging {options.captions} held-out captions x {options.seeds} seeds for teacher, student and random start; "
          "a table follows", flush=True)
    captions = [caption for count in (1, 2)
                for caption in shapes.captions(1000, options.captions // 2, held_out=True, num_objects=count)]
    twin = train_twin(options.model, run, options.quick)
    rows = []
    print("  ".join(f"{name:>12}" for name in COLUMNS))
    with torch.no_grad():
        for model, steps, guidance, budget, draw in painters(options.model, twin, run):
            few = captions[:4] + captions[-4:]
            spread = variety(np.stack([draw(few, [900 + seed] * 8, steps) for seed in range(8)], axis=1))
            for seed in range(options.seeds):
                seeds = list(range(seed * 10_000, seed * 10_000 + len(captions)))
                figures = prompt_accuracy(lambda said: draw(said, seeds, steps), captions)
                rows.append({"model": model, "steps": steps, "guidance": guidance, "seed": seed, "train_steps": budget,
                             "variety": round(spread, 2), **figures})
                print("  ".join(f"{rows[-1][name]!s:>12}" for name in COLUMNS), flush=True)
    means = summarise(rows)
    if not options.quick:
        run["results"]["prompt_accuracy"]["random_start"] = means["random_start", run["num_inference_steps"]]
        write_json(options.model / "run.json", run)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
