"""How much a student learns from few prompts: the share of the training prompts that it draws right, seed by
seed.

    python benchmarks/few_prompts.py            # thirty prompts and 200 steps, three seeds: minutes
    python benchmarks/few_prompts.py --quick    # one seed, few steps
    python benchmarks/few_prompts.py --prompts 10 --train_flags --num_trajectories 300

Prompts are captions of the tiny world, other ones for each seed, all other settings are defaults. Each prompt
is drawn from noise that no trajectory of training starts from. Students that lie in --folder, finished under
the same settings, are judged as they are.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.quality import TRAIN, Judge, train
from run_inference import StudentPipeline
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
COUNTS = (4, 1)  # steps in which a student draws
NOISES = 4  # images of each prompt


def few_prompts(folder, count, seed):
    """Write a file of `count` captions of the tiny world; returns its path and the captions."""
    captions = shapes.captions(1000 + seed, count)
    path = folder / f"{count}-prompts-{seed}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(captions) + "\n", encoding="utf-8")
    return path, captions


def measure(folder, count, flags, seed):
    """Train on `count` prompts, unless that was done; returns the run's figures and the share of training
    prompts drawn right.
    """
    prompts, captions = few_prompts(folder, count, seed)
    student = train(folder / f"seed-{seed}" / "student", (TRAIN,), ("--prompts", prompts, *flags), seed)
    run, pipeline = read_run(student), StudentPipeline(student)
    trained = captions[:-1] * NOISES  # the last of so few is held out
    judge = Judge(pipeline, trained[: count - 1])
    right = {}
    for steps in COUNTS:
        drawn = judge.draw(
            partial(velocity_from, pipeline.student), pipeline.scheduler, steps, trained, range(len(trained))
        )[1]
        right[str(steps)] = prompt_accuracy(lambda _, pictures=drawn: pictures, trained)["accuracy"]
    return {"seed": seed, "prompts": count, "steps": run["steps"], "minutes": run["minutes"], "right": right}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/few_prompts"), help="where students are trained and kept"
    )
    parser.add_argument(
        "--prompts", type=int, default=30, help="prompts in the file of a seed, one of which is held out"
    )
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument(
        "--train_flags", nargs=argparse.REMAINDER, default=[], help="flags for every training, to the end"
    )
    options = parser.parse_args()
    if not 2 <= options.prompts < 40:
        parser.exit(
            2,
            f"few_prompts.py: --prompts is {options.prompts}, expected 2 to 39, of which one is held out.\n",
        )
    flags, seeds = ["--max_train_steps", 200, *options.train_flags], range(options.seeds)
    if options.quick:
        flags, seeds = [*QUICK, *options.train_flags], range(1)
    print(
        f"training a student for {len(seeds)} seeds on {options.prompts} prompts each in "
        f"{options.folder.absolute()}",
        flush=True,
    )
    print(
        "| seed | prompts | steps | minutes | right in 4 steps | in 1 step |\n" + "|---" * 6 + "|", flush=True
    )
    rows = []
    for seed in seeds:
        rows.append(row := measure(options.folder.absolute(), options.prompts, flags, seed))
        print(
            f"| {seed} | {row['prompts']} | {row['steps']} | {row['minutes']:.1f} | {row['right']['4']:.0%} "
            f"| "
            f"{row['right']['1']:.0%} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
