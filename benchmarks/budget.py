"""Compare budgets: students of more images of the teacher, or of more training steps, in one table.

    python benchmarks/budget.py            # five students for each of three seeds, one per core: over an hour on two cores
    python benchmarks/budget.py --quick    # a minute: one seed, small budgets
    python benchmarks/budget.py --train_flags --hidden_size 64 --depth 4

The student is 24 x 2 and the tiny teacher 128 x 4, about the ratio of 1024 x 16 to A14B. "Hours" are those of an H100_RATE
at 40 % of its peak rate, for the same budget of A14B and a student of 1024 x 16 at 512 pixels. Finished students of
the same settings in --folder are listed without training. Those of other settings are refused, with the names of the
settings.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.quality import TRAIN, train
from wanlite.planning.duration import EFFICIENCY, H100_RATE
from wanlite.training.run_folder import read_run

SMALL = ("--hidden_size", "24", "--depth", "2")
QUICK = (
    "--num_held_out",
    16,
    "--lr_warmup_steps",
    4,
    "--teacher_steps",
    8,
    "--validation_trajectories",
    16,
    "--rollout_states",
    16,
)
Budget = tuple[int, int]  # images of the teacher, steps
BUDGETS: tuple[Budget, ...] = ((1000, 1400), (1000, 5600), (4000, 1400), (4000, 5600), (4000, 22400))
RATE = EFFICIENCY * H100_RATE * 3600  # operations per hour
TOKENS, TEACHER, STUDENT, BATCH = 1024, 14.29e9, 0.282e9, 128  # of an image; parameters


def hours(images: int, steps: int, teacher_steps: int = 20) -> tuple[float, float]:
    """Return the hours of A14B's guided trajectories of `images`, and of the training of a student for `steps`."""
    return (
        2 * TOKENS * TEACHER * images * 2 * teacher_steps / RATE,
        6 * TOKENS * STUDENT * steps * BATCH / RATE,
    )


def print_table(runs: Mapping[Budget, Sequence[Mapping[str, Any]]]) -> None:
    """Print a line for each budget, {(images, steps): run.json of each seed}: means and ranges over seeds."""
    columns = (
        "images",
        "steps",
        "hours (teacher + student)",
        "seeds",
        "right in 4 steps (range)",
        "in 1 step",
        "image error in 4 steps (range)",
        "in 1 step",
        "diversity in 4 steps",
    )
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for (images, steps), found in runs.items():
        results = [run["results"] for run in found]
        right, right_in_one = (
            [each["student_by_steps"][count]["accuracy"] for each in results] for count in "41"
        )
        error, error_in_one, diversity = (
            [each[name] for each in results] for name in ("image_error_4", "image_error_1", "diversity_4")
        )
        spent = " + ".join(f"{each:.1f}" for each in hours(images, steps))
        print(
            f"| {images:,} | {steps:,} | {spent} | {len(found)} | "
            f"{mean(right):.3f} ({min(right):.3f} to {max(right):.3f}) | {mean(right_in_one):.3f} | "
            f"{mean(error):.3f} ({min(error):.3f} to {max(error):.3f}) | {mean(error_in_one):.3f} | "
            f"{mean(diversity):.2f} |"
        )


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/budget"), help="students are trained and kept here"
    )
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="parallel trainings, each on one core"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument(
        "--train_flags",
        nargs=argparse.REMAINDER,
        default=[*SMALL],
        help="flags of every training, to the end",
    )
    return parser.parse_args()


def train_all(
    folder: Path, budgets: Sequence[Budget], seeds: Sequence[int], flags: Sequence[Any], workers: int
) -> dict[Budget, list[dict[str, Any]]]:
    """Train a student for each budget and seed; returns {(images, steps): run.json of each seed}."""

    def run(job):
        (count, length), seed = job
        return train(
            folder / f"seed-{seed}" / f"{count}-pictures-{length}-steps",
            (TRAIN,),
            ("--num_trajectories", count, "--max_train_steps", length, *flags),
            seed,
        )

    # Students of one seed and number of images share the teacher's trajectories, which the first of them generates.
    with ThreadPoolExecutor(workers) as pool:
        for length in sorted({length for _, length in budgets}):
            jobs = [(budget, seed) for seed in seeds for budget in budgets if budget[1] == length]
            list(pool.map(run, jobs))
    return {budget: [read_run(run((budget, seed))) for seed in seeds] for budget in budgets}


def main() -> None:
    """Train all students and print the table."""
    options = read_options()
    budgets, flags, seeds = BUDGETS, options.train_flags, range(options.seeds)
    if options.quick:
        budgets, flags, seeds = ((64, 7), (64, 14), (128, 7), (128, 14)), [*QUICK, *flags], range(1)
    folder = options.folder.absolute()
    print(f"training {len(budgets)} students for {len(seeds)} seeds in {folder}", flush=True)
    runs = train_all(folder, budgets, seeds, flags, options.workers)
    print_table(runs)
    if options.json:
        rows = [
            {"pictures": count, "steps": length, "seed": seed, "chosen": run["chosen"], **run["results"]}
            for (count, length), found in runs.items()
            for seed, run in zip(seeds, found)
        ]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
