"""Train a student on few prompts, and print the share of these prompts that its images show correctly, by seed.

    python benchmarks/few_prompts.py            # thirty prompts and 200 steps, three seeds: minutes
    python benchmarks/few_prompts.py --quick    # one seed, few steps
    python benchmarks/few_prompts.py --prompts 10 --train_flags --num_trajectories 300

Prompts are captions of the tiny world, different for each seed. All other settings are defaults. Images of a prompt
start from noise that training does not use. Finished students of the same settings in --folder are judged without
training.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.quality import TRAIN, Judge, train
from wanlite.generation.student import StudentPipeline
from wanlite.training.metrics import prompt_accuracy
from wanlite.training.run_folder import read_run
from wanlite.training.steps import velocity_from
from wanlite.world import shapes

QUICK = (
    "--max_train_steps",
    7,
    "--teacher_steps",
    4,
    "--few_steps",
    1,
    4,
    "--reference_steps",
    4,
    "--lr_warmup_steps",
    2,
    "--num_trajectories",
    32,
)
COUNTS = (4, 1)  # steps of an image
NOISES = 4  # images of each prompt


def few_prompts(folder: Path, count: int, seed: int) -> tuple[Path, list[str]]:
    """Write a file of `count` captions of the tiny world; returns its path and the captions."""
    captions = shapes.captions(1000 + seed, count)
    path = folder / f"{count}-prompts-{seed}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(captions) + "\n", encoding="utf-8")
    return path, captions


def measure(folder: Path, count: int, flags: Sequence[Any], seed: int) -> dict[str, Any]:
    """Train on `count` prompts, unless a student is there; returns its row."""
    prompts, captions = few_prompts(folder, count, seed)
    student = train(folder / f"seed-{seed}" / "student", (TRAIN,), ("--prompts", prompts, *flags), seed)
    run, pipeline = read_run(student), StudentPipeline(student)
    trained = captions[:-1] * NOISES  # below 40 prompts, the last one is held out
    judge = Judge(pipeline, trained[: count - 1])
    right = {}
    for steps in COUNTS:
        drawn = judge.draw(
            partial(velocity_from, pipeline.student), pipeline.scheduler, steps, trained, range(len(trained))
        )[1]
        right[str(steps)] = prompt_accuracy(lambda _, images=drawn: images, trained)["accuracy"]
    return {"seed": seed, "prompts": count, "steps": run["steps"], "minutes": run["minutes"], "right": right}


def read_options() -> argparse.Namespace:
    """Return the options of the command line; exits with code 2 for too few or too many prompts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/few_prompts"), help="students are trained and kept here"
    )
    parser.add_argument(
        "--prompts", type=int, default=30, help="prompts in the file of a seed, including one held-out prompt"
    )
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument(
        "--train_flags", nargs=argparse.REMAINDER, default=[], help="flags of every training, to the end"
    )
    options = parser.parse_args()
    if not 2 <= options.prompts < 40:
        parser.exit(
            2,
            f"few_prompts.py: --prompts is {options.prompts}, expected 2 to 39, including one held-out prompt.\n",
        )
    return options


def main() -> None:
    """Train and judge a student for each seed, and print a row for each."""
    options = read_options()
    flags, seeds = ["--max_train_steps", 200, *options.train_flags], range(options.seeds)
    if options.quick:
        flags, seeds = [*QUICK, *options.train_flags], range(1)
    folder = options.folder.absolute()
    print(
        f"training a student for {len(seeds)} seeds on {options.prompts} prompts each in {folder}", flush=True
    )
    print(
        "| seed | prompts | steps | minutes | right in 4 steps | in 1 step |\n" + "|---" * 6 + "|", flush=True
    )
    rows = []
    for seed in seeds:
        rows.append(row := measure(folder, options.prompts, flags, seed))
        shares = " | ".join(f"{row['right'][str(steps)]:.0%}" for steps in COUNTS)
        print(f"| {seed} | {row['prompts']} | {row['steps']} | {row['minutes']:.1f} | {shares} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
