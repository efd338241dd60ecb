"""How faithful, how varied, and how like the teacher's the pictures of every way to train a student are: one
table.

    python benchmarks/quality.py            # eleven students for each of three seeds, one a core: over an hour on two cores
    python benchmarks/quality.py --quick    # minutes: one seed, few steps and captions
    python benchmarks/quality.py --methods student matching --train_flags --hidden_size 48 --depth 2 --num_heads 3
    python benchmarks/quality.py --teacher emoji --folder outputs/quality_emoji     # at the true reduction, and two larger students

Students that lie in --folder, finished under the same settings, are judged as they are; under others, they
are refused by name.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from run_inference import StudentPipeline
from train_distillation import CHANGEABLE_ON_RESUME, Settings
from wanlite.data.autoencoder import decode_latents, to_images
from wanlite.flow import make_scheduler, sample, seeded_noise
from wanlite.network import pack_text
from wanlite.planning.resolve import TINY_STEPS, choose_teacher, complete
from wanlite.planning.settings import make_parser
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.model import Teacher
from wanlite.training.metrics import (
    channel_drift,
    channel_spread,
    diversity,
    frechet_distance,
    prompt_accuracy,
)
from wanlite.training.run_folder import read_run
from wanlite.training.steps import velocity_from
from wanlite.training.teacher_data import teacher_velocity
from wanlite.world import shapes
from wanlite.world.record import read_world

REFERENCE = "teacher, guided", 40  # what every row is held against, at its own noise
TRAIN, BASELINES = ROOT / "train_distillation.py", ROOT / "benchmarks" / "baselines.py"
MATCHING = 150  # steps of distribution matching, out of as many in all
FEW = (4, 2, 1)
OTHER_COLUMNS = (
    "model",
    "steps",
    "seed",
    "accuracy",
    "accuracy_one",
    "accuracy_two",
    "evaluations",
    "variety",
    "drift",
    "spread",
    "frechet",
    "seconds",
)  # beside those that a world's judge gives
LADDER = {
    "emoji": ((64, 2), (96, 3), (128, 4))
}  # world: width and depth of every method's student, then of larger ones
QUICK = (
    "--max_train_steps",
    20,
    "--num_trajectories",
    64,
    "--num_held_out",
    16,
    "--lr_warmup_steps",
    4,
    "--teacher_steps",
    8,
    "--validation_trajectories",
    16,
)


def methods(steps, rungs=()):
    """Return {name: (script and flags, numbers of steps that are judged)}, every one of `steps` optimizer
    steps.

    `rungs` are widths and depths: of the first are all methods, and of each other there is a student.
    """
    matching, plain = ("--matching_steps", min(MATCHING, steps // 4)), ("--diversity_gain", 0)
    sizes = [("--hidden_size", width, "--depth", depth) for width, depth in rungs] or [()]
    larger = {
        f"student {width} x {depth}": ((TRAIN, *size), FEW)
        for (width, depth), size in zip(rungs[1:], sizes[1:])
    }
    chosen = {
        "student": ((TRAIN,), FEW),
        "stage 1 alone": ((TRAIN, "--few_step_train_steps", 0), (20, *FEW)),
        "matching (K-DMD)": ((TRAIN, *matching), FEW),
        "TwinFlow": ((BASELINES, "twin_flow", *plain, *matching), FEW),  # as published, and so is the next
        "flow matching": (
            (BASELINES, "flow_matching", *plain, "--few_step_train_steps", steps - 1, "--rollout_states", 0),
            (20, *FEW),
        ),
        "random start": ((TRAIN, "--projection", "none"), FEW),
        "minus diversity gain": ((TRAIN, *plain), FEW),
        "minus features": ((TRAIN, "--feature_weight", 0), FEW),
        "minus own path": ((TRAIN, "--rollout_states", 0), FEW),
        "minus stage 1": ((TRAIN, "--few_step_train_steps", steps - 1), FEW),
        "matching minus anchor": ((TRAIN, *matching, "--anchor_weight", 0), FEW),
    }
    return {name: ((*command, *sizes[0]), counts) for name, (command, counts) in chosen.items()} | larger


# ---- training ----------------------------------------------------------------------------------------------


def train(folder, command, flags, seed):
    """Train one student, unless it is there; returns its folder.

    Ends where there is one of other settings.
    """
    words = (
        *command,
        "--output_dir",
        folder,
        "--cache_dir",
        folder.parent.parent / "cache",
        "--seed",
        seed,
        "--report_to",
        "none",
        *flags,
    )
    if (run := read_run(folder)).get("finished"):
        asked = make_parser(Settings, "").parse_args(
            [str(word) for word in words[2 if command[0] == BASELINES else 1 :]]
        )
        asked = asdict(complete(Settings(**vars(asked))))
        if changed := [
            name
            for name, value in asked.items()
            if name not in CHANGEABLE_ON_RESUME and run["settings"].get(name) != value
        ]:
            raise SystemExit(
                f"{folder}: holds a student that was trained with another {', '.join(changed)}. Name another "
                "--folder, or delete it."
            )
    else:
        log = folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as said:
            one_core = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.run(
                [sys.executable, *map(str, words)], stdout=said, stderr=said, env=one_core
            ).returncode
        if code:
            raise RuntimeError(f"{folder}: training ended with code {code}; see {log}")
        print(f"trained {folder}", flush=True)
    return folder


def train_all(folder, chosen, flags, seeds, workers):
    """Train every method for every seed, `workers` at a time; the first of a seed generates trajectories for the
    others.
    """

    def run(job):
        return train(place(folder, *job), chosen[job[0]][0], flags, job[1])

    first, *others = chosen
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, [(first, seed) for seed in seeds]))
        list(pool.map(run, [(name, seed) for seed in seeds for name in others]))


def place(folder, name, seed):
    return folder / f"seed-{seed}" / name.replace(" ", "-")


# ---- judging -----------------------------------------------------------------------------------------------


class Judge:
    """Draws held-out captions by any velocity, and holds the pictures against the teacher's from the same
    noise.
    """

    def __init__(self, pipeline, captions, world=shapes):
        self.pipeline, self.captions, self.few, self.world = (
            pipeline,
            captions,
            captions[:6] + captions[-6:],
            world,
        )
        self.words = dict(zip(captions, pipeline.embed(captions)))
        self.references = {}

    @torch.no_grad()
    def draw(self, velocity_for, scheduler, num_steps, captions, seeds):
        """Return latents (B, C, H, W) and pictures (B, 64, 64, 3) of captions and seeds."""
        stride = self.pipeline.autoencoder.config.scale_factor_spatial
        shape = (self.pipeline.student.config.num_channels, *[self.world.IMAGE_SIZE // stride] * 2)
        latents = torch.cat(
            [
                sample(
                    velocity_for(
                        pack_text([self.words[caption] for caption in captions[start : start + 64]])
                    ),
                    seeded_noise(shape, seeds[start : start + 64]),
                    scheduler,
                    num_steps,
                )
                for start in range(0, len(captions), 64)
            ]
        )
        pictures = [to_images(decode_latents(self.pipeline.autoencoder, part)) for part in latents.split(64)]
        return latents, np.concatenate(pictures)

    def look(self, velocity_for, scheduler, num_steps, seed):
        """Return what a way to draw gives for every caption, and for a few captions and eight seeds; and
        seconds a picture.
        """
        first, began = seed * 10_000, time.perf_counter()
        drawn = self.draw(
            velocity_for, scheduler, num_steps, self.captions, range(first, first + len(self.captions))
        )
        seconds = (time.perf_counter() - began) / len(self.captions)
        starts = range(first + 5000, first + 5000 + 8 * len(self.few), len(self.few))
        by_seed = [
            self.draw(velocity_for, scheduler, num_steps, self.few, range(start, start + len(self.few)))[1]
            for start in starts
        ]
        return *drawn, np.stack(by_seed, axis=1), seconds

    def row(self, model, velocity_for, scheduler, num_steps, passes, seed):
        """Return the figures of a way to draw; that of REFERENCE has to come first."""
        latents, pictures, by_seed, seconds = looked = self.look(velocity_for, scheduler, num_steps, seed)
        if (model, num_steps) == REFERENCE:
            self.references[seed] = looked
        teacher_latents, teacher_images, teacher_by_seed, _ = self.references[seed]
        figures = prompt_accuracy(lambda _: pictures, self.captions, self.world)
        return {
            "model": model,
            "steps": num_steps,
            "seed": seed,
            **figures,
            "evaluations": num_steps * passes,
            "variety": diversity(by_seed) / diversity(teacher_by_seed),
            "drift": channel_drift(latents, teacher_latents),
            "spread": channel_spread(latents, teacher_latents),
            "frechet": 1000 * frechet_distance(pictures, teacher_images),
            "seconds": seconds,
        }


def judge_all(folders, chosen, captions, seeds, teacher_folder):
    """Yield a row for every method, number of steps and seed; the teacher's come first."""
    pipelines = {key: StudentPipeline(folder) for key, folder in folders.items()}
    pipeline = next(iter(pipelines.values()))
    settings = complete(Settings(teacher=str(teacher_folder)))
    judge = Judge(pipeline, captions, read_world(teacher_folder))
    teacher, empty = Teacher(open_teacher_files(settings.teacher)), pipeline.embed([""])[0]
    guided = teacher_velocity(teacher, settings, empty)
    plain = teacher_velocity(teacher, replace(settings, guidance_scale=1.0, guidance_scale_2=1.0), empty)
    for model, velocity_for, passes, counts in (
        (REFERENCE[0], guided, 2, (REFERENCE[1], *FEW)),
        ("teacher, unguided", plain, 1, (4,)),
    ):
        for num_steps in counts:
            for seed in seeds:
                yield judge.row(
                    model, velocity_for, make_scheduler(settings.flow_shift), num_steps, passes, seed
                )
    for (name, seed), pipeline in pipelines.items():
        for num_steps in chosen[name][1]:
            yield judge.row(
                name, partial(velocity_from, pipeline.student), pipeline.scheduler, num_steps, 1, seed
            )


def print_table(rows):
    """Print a line for each model and number of steps: means over seeds, and the range where it tells
    something.
    """
    judged = [name for name in rows[0] if name not in OTHER_COLUMNS]
    columns = (
        "model",
        "steps",
        "seeds",
        "evaluations",
        "whole caption (range)",
        "one",
        "two",
        *judged,
        "diversity (range)",
        "drift",
        "spread",
        "Frechet",
        "s a picture",
    )
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for model, steps in dict.fromkeys((row["model"], row["steps"]) for row in rows):
        found = [row for row in rows if (row["model"], row["steps"]) == (model, steps)]
        mean = {name: np.mean([row[name] for row in found]) for name in found[0] if name != "model"}
        low, high = (
            {name: pick(row[name] for row in found) for name in ("accuracy", "variety")}
            for pick in (min, max)
        )
        cells = [
            model,
            steps,
            len(found),
            round(mean["evaluations"]),
            f"{mean['accuracy']:.3f} ({low['accuracy']:.3f} to {high['accuracy']:.3f})",
            *(f"{mean[name]:.3f}" for name in ("accuracy_one", "accuracy_two", *judged)),
            f"{mean['variety']:.2f} ({low['variety']:.2f} to {high['variety']:.2f})",
            f"{mean['drift']:.3f}",
            f"{mean['spread']:.2f}",
            f"{mean['frechet']:.3f}",
            f"{mean['seconds']:.4f}",
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", help="a tiny teacher: tiny, emoji or a folder; None = tiny")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/quality"), help="where students are trained and kept"
    )
    parser.add_argument(
        "--captions", type=int, default=500, help="held-out captions, half of them of two objects"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="training seeds; each is judged at noise of its own"
    )
    parser.add_argument(
        "--methods", nargs="+", help="some of the table's models; the student itself is always there"
    )
    parser.add_argument(
        "--judge_only", action="store_true", help="train nothing: judge what lies finished in --folder"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="trained at a time, each on one core"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument(
        "--train_flags", nargs=argparse.REMAINDER, default=[], help="flags for every training, to the end"
    )
    options = parser.parse_args()
    try:
        teacher = choose_teacher(options.teacher or "tiny")
        world = read_world(teacher)
    except (OSError, ValueError) as error:
        parser.exit(2, f"quality.py: {error}\n")
    if world is None:
        parser.exit(
            2,
            f"quality.py: --teacher {options.teacher}: expected a tiny teacher, for its world alone has a "
            f"judge.\n",
        )
    rungs = LADDER.get(world.__name__.rpartition(".")[2], ())
    known = methods(TINY_STEPS, rungs)
    if unknown := set(options.methods or ()) - set(known):
        parser.exit(
            2, f"quality.py: --methods {', '.join(unknown)}: unknown, expected some of {', '.join(known)}.\n"
        )
    flags, seeds = ["--teacher", teacher, *options.train_flags], range(options.seeds)
    if options.quick:
        options.captions, seeds, known, flags = 24, range(1), methods(QUICK[1], rungs), [*QUICK, *flags]
    chosen = {
        name: method
        for name, method in known.items()
        if name == "student" or name in (options.methods or known)
    }
    work = "judging" if options.judge_only else "training, then judging,"
    print(
        f"{work} {len(chosen)} students for {len(seeds)} seeds in {options.folder.absolute()}: "
        f"{options.captions} held-out "
        "captions a cell",
        flush=True,
    )
    if not options.judge_only:
        train_all(options.folder.absolute(), chosen, flags, seeds, options.workers)
    folders = {(name, seed): place(options.folder, name, seed) for name in chosen for seed in seeds}
    folders = {job: folder for job, folder in folders.items() if read_run(folder).get("finished")}
    if not folders:
        parser.exit(2, f"quality.py: {options.folder} holds no finished student. Leave --judge_only out.\n")
    captions = [
        caption
        for count in (1, 2)
        for caption in world.captions(1000, options.captions // 2, held_out=True, num_objects=count)
    ]
    rows = []
    for row in judge_all(folders, chosen, captions, seeds, teacher):
        rows.append(row)
        print(".", end="", flush=True)
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
