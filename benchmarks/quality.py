"""Compare training methods: prompt accuracy, diversity, and likeness of the student's images to the teacher's.

    python benchmarks/quality.py            # twelve students for each of three seeds, one per core: over an hour on two cores
    python benchmarks/quality.py --quick    # minutes: one seed, few steps and captions
    python benchmarks/quality.py --methods student matching --train_flags --hidden_size 48 --depth 2 --num_heads 3
    python benchmarks/quality.py --teacher emoji --folder outputs/quality_emoji     # true reduction; two smaller students

Prints one table, whose columns docs/results.md explains. Finished students of the same settings in --folder are
judged without training. Those of other settings are refused, with the names of the settings.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks import second_judge
from train_distillation import CHANGEABLE_ON_RESUME, Settings
from wanlite.data.autoencoder import decode_latents, to_images
from wanlite.flow import make_scheduler, sample, seeded_noise
from wanlite.generation.student import StudentPipeline
from wanlite.network import pack_text
from wanlite.phases import FEW_STEP_SHARE
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
from wanlite.world import emoji, shapes
from wanlite.world.record import read_world

Method = tuple[tuple[Any, ...], tuple[int, ...]]  # script and flags, judged numbers of steps

REFERENCE = "teacher, guided", 40  # every row is compared with it at the same noise
TRAIN, BASELINES = ROOT / "train_distillation.py", ROOT / "benchmarks" / "baselines.py"
MATCHING = 150  # steps of distribution matching; all methods have the same number of steps in total
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
)  # besides the figures of a world's judge
# world: width and depth of every method's student, then of smaller students
LADDER = {"emoji": ((128, 4), (96, 3), (64, 2))}
FOLDERS = {  # {method: folder of its student}, of those that have another than their name
    "without diversity gain": "minus-diversity-gain",
    "without features": "minus-features",
    "without on-policy states": "minus-own-path",
    "without stage 1": "minus-stage-1",
    "long few-step phase": "long-few-step",
    "matching without anchor": "matching-minus-anchor",
}
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


def methods(steps: int, rungs: Sequence[tuple[int, int]] = ()) -> dict[str, Method]:
    """Return {name: (script and flags, judged numbers of steps)}, each with `steps` optimizer steps.

    `rungs` are (width, depth): all methods train students of the first, and each other has one student.
    """
    matching: tuple[Any, ...] = ("--matching_steps", min(MATCHING, steps // 4))
    no_gain = ("--diversity_gain", 0)
    sizes: list[tuple[Any, ...]] = [("--hidden_size", width, "--depth", depth) for width, depth in rungs] or [
        ()
    ]
    shared = ("--feature_directions", rungs[0][0] // 4) if rungs else ()  # for the trajectories of the first
    smaller: dict[str, Method] = {
        f"student {width} x {depth}": ((TRAIN, *size, *shared), FEW)
        for (width, depth), size in zip(rungs[1:], sizes[1:])
    }
    chosen: dict[str, Method] = {
        "student": ((TRAIN,), FEW),
        "stage 1 alone": ((TRAIN, "--few_step_train_steps", 0), (20, *FEW)),
        "long few-step phase": ((TRAIN, "--few_step_train_steps", round(FEW_STEP_SHARE * steps)), FEW),
        "matching (K-DMD)": ((TRAIN, *matching), FEW),
        "TwinFlow": ((BASELINES, "twin_flow", *no_gain, *matching), FEW),  # as published, like the next
        "flow matching": (
            (
                BASELINES,
                "flow_matching",
                *no_gain,
                "--few_step_train_steps",
                steps - 1,
                "--rollout_states",
                0,
            ),
            (20, *FEW),
        ),
        "random start": ((TRAIN, "--projection", "none"), FEW),
        "without diversity gain": ((TRAIN, *no_gain), FEW),
        "without features": ((TRAIN, "--feature_weight", 0), FEW),
        "without on-policy states": ((TRAIN, "--rollout_states", 0), FEW),
        "without stage 1": ((TRAIN, "--few_step_train_steps", steps - 1), FEW),
        "matching without anchor": ((TRAIN, *matching, "--anchor_weight", 0), FEW),
    }
    return {name: ((*command, *sizes[0]), counts) for name, (command, counts) in chosen.items()} | smaller


# ---- training ----------------------------------------------------------------------------------------------


def train(folder: Path, command: Sequence[Any], flags: Sequence[Any], seed: int) -> Path:
    """Train one student, unless the folder holds a finished one; returns the folder.

    Raises SystemExit if the finished student has other settings.
    """
    arguments = [
        *map(str, command),
        *("--output_dir", str(folder)),
        *("--cache_dir", str(folder.parent.parent / "cache")),
        *("--seed", str(seed), "--report_to", "none"),
        *map(str, flags),
    ]
    if (run := read_run(folder)).get("finished"):
        check_settings(folder, run, arguments[2 if command[0] == BASELINES else 1 :])
    else:
        start_training(folder, arguments)
        print(f"trained {folder}", flush=True)
    return folder


def check_settings(folder: Path, run: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Raise SystemExit if a finished run has other settings than these arguments."""
    settings = make_parser(Settings, "").parse_args(arguments)
    expected = asdict(complete(Settings(**vars(settings))))
    changed = [
        name
        for name, value in expected.items()
        if name not in CHANGEABLE_ON_RESUME and run["settings"].get(name) != value
    ]
    if changed:
        raise SystemExit(
            f"{folder}: holds a student that was trained with another {', '.join(changed)}. Name another "
            "--folder, or delete it."
        )


def start_training(folder: Path, arguments: Sequence[str]) -> None:
    """Train on one core, with the output in a log beside the folder; raises RuntimeError if the run fails."""
    path = folder.with_suffix(".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as log:
        one_core = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run([sys.executable, *arguments], stdout=log, stderr=log, env=one_core).returncode
    if code:
        raise RuntimeError(f"{folder}: training ended with code {code}; see {path}")


def train_all(
    folder: Path, chosen: Mapping[str, Method], flags: Sequence[Any], seeds: Sequence[int], workers: int
) -> None:
    """Train every method for every seed, `workers` at a time; the first of a seed generates all trajectories."""

    def run(job):
        return train(place(folder, *job), chosen[job[0]][0], flags, job[1])

    first, *others = chosen
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, [(first, seed) for seed in seeds]))
        list(pool.map(run, [(name, seed) for seed in seeds for name in others]))


def place(folder: Path, name: str, seed: int) -> Path:
    """Return the folder of a method's student."""
    return folder / f"seed-{seed}" / FOLDERS.get(name, name.replace(" ", "-"))


# ---- judging -----------------------------------------------------------------------------------------------


@dataclass
class Generated:
    """The images of one way to generate, and the seconds of an image."""

    latents: torch.Tensor  # (B, C, H, W), of every caption
    images: np.ndarray  # (B, 64, 64, 3), of every caption
    by_seed: np.ndarray  # (captions, 8, 64, 64, 3), of a few captions and eight seeds
    seconds: float


class Judge:
    """Generates images of held-out captions by any velocity, and compares them with the teacher's at the same noise."""

    def __init__(self, pipeline: StudentPipeline, captions: list[str], world: Any = shapes):
        self.pipeline, self.captions, self.world = pipeline, captions, world
        num_few = min(6, len(captions) // 2)  # of one object, and as many of two
        self.few = captions[:num_few] + captions[-num_few:]
        self.embeddings = dict(zip(captions, pipeline.embed(captions)))
        self.references: dict[int, Generated] = {}  # by seed

    @torch.no_grad()
    def draw(
        self,
        velocity_for: Callable,
        scheduler: Any,
        num_steps: int,
        captions: Sequence[str],
        seeds: Sequence[int],
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Return latents (B, C, H, W) and images (B, 64, 64, 3) of captions and seeds."""
        stride = self.pipeline.autoencoder.config.scale_factor_spatial
        shape = (self.pipeline.student.config.num_channels, *[self.world.IMAGE_SIZE // stride] * 2)
        chunks = []
        for start in range(0, len(captions), 64):
            text = pack_text([self.embeddings[caption] for caption in captions[start : start + 64]])
            noise = seeded_noise(shape, seeds[start : start + 64])
            chunks.append(sample(velocity_for(text), noise, scheduler, num_steps))
        images = [to_images(decode_latents(self.pipeline.autoencoder, chunk)) for chunk in chunks]
        return torch.cat(chunks), np.concatenate(images)

    def generate(self, velocity_for: Callable, scheduler: Any, num_steps: int, seed: int) -> Generated:
        """Return one image of every caption, and eight images of a few captions."""
        draw = partial(self.draw, velocity_for, scheduler, num_steps)
        first, began = seed * 10_000, time.perf_counter()
        latents, images = draw(self.captions, range(first, first + len(self.captions)))
        seconds = (time.perf_counter() - began) / len(self.captions)
        starts = range(first + 5000, first + 5000 + 8 * len(self.few), len(self.few))
        by_seed = [draw(self.few, range(start, start + len(self.few)))[1] for start in starts]
        return Generated(latents, images, np.stack(by_seed, axis=1), seconds)

    def row(
        self, model: str, velocity_for: Callable, scheduler: Any, num_steps: int, passes: int, seed: int
    ) -> dict[str, Any]:
        """Return the figures of one way to generate; the first row of a seed has to be that of REFERENCE."""
        found = self.generate(velocity_for, scheduler, num_steps, seed)
        if (model, num_steps) == REFERENCE:
            self.references[seed] = found
        teacher = self.references[seed]
        figures = prompt_accuracy(lambda _: found.images, self.captions, self.world)
        if judge_objects := find_second_judge(self.world):
            scenes = [self.world.read_caption(caption) for caption in self.captions]
            judged = judge_objects(found.images, scenes)
            figures |= {f"EfficientNet {name}": float(judged[name]) for name in ("top-1", "top-5")}
        return {
            "model": model,
            "steps": num_steps,
            "seed": seed,
            **figures,
            "evaluations": num_steps * passes,
            "variety": diversity(found.by_seed) / diversity(teacher.by_seed),
            "drift": channel_drift(found.latents, teacher.latents),
            "spread": channel_spread(found.latents, teacher.latents),
            "frechet": 1000 * frechet_distance(found.images, teacher.images),
            "seconds": found.seconds,
        }


@cache
def find_second_judge(world: Any) -> Callable | None:
    """Return EfficientNet's judgement of objects; None for another world, or without its package, which is printed."""
    if world is not emoji:
        return None
    try:
        second_judge.load_weights()
    except (OSError, ValueError) as error:
        print(f"quality.py: no columns of EfficientNet: {error}", file=sys.stderr)
        return None
    return second_judge.object_figures


def judge_all(
    folders: Mapping[tuple[str, int], Path],
    chosen: Mapping[str, Method],
    captions: list[str],
    seeds: Sequence[int],
    teacher_folder: str | Path,
) -> Iterator[dict[str, Any]]:
    """Yield a row for every method, number of steps and seed; the teacher's are first."""
    pipelines = {key: StudentPipeline(folder) for key, folder in folders.items()}
    pipeline = next(iter(pipelines.values()))
    settings = complete(Settings(teacher=str(teacher_folder)))
    judge = Judge(pipeline, captions, read_world(teacher_folder))
    teacher, empty = Teacher(open_teacher_files(settings.teacher)), pipeline.embed([""])[0]
    guided = teacher_velocity(teacher, settings, empty)
    unguided = teacher_velocity(teacher, replace(settings, guidance_scale=1.0, guidance_scale_2=1.0), empty)
    for model, velocity_for, passes, counts in (
        (REFERENCE[0], guided, 2, (REFERENCE[1], *FEW)),
        ("teacher, unguided", unguided, 1, (REFERENCE[1], 4)),
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


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each model and number of steps: means over seeds, with ranges of accuracy and diversity."""
    judged = [name for name in rows[0] if name not in OTHER_COLUMNS]
    columns = (
        *("model", "steps", "seeds", "evaluations"),
        *("drawn right (range)", "one object", "two", *judged),
        *("diversity (range)", "drift", "spread", "Frechet", "seconds per image"),
    )
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for model, steps in dict.fromkeys((row["model"], row["steps"]) for row in rows):
        found = [row for row in rows if (row["model"], row["steps"]) == (model, steps)]
        cells = [model, steps, len(found), *summarise(found, judged)]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def summarise(rows: Sequence[Mapping[str, Any]], judged: Sequence[str]) -> list[Any]:
    """Return the figures of one model and number of steps, over seeds."""
    mean = {name: np.mean([row[name] for row in rows]) for name in rows[0] if name != "model"}
    low, high = (
        {name: pick(row[name] for row in rows) for name in ("accuracy", "variety")} for pick in (min, max)
    )
    return [
        round(mean["evaluations"]),
        f"{mean['accuracy']:.3f} ({low['accuracy']:.3f} to {high['accuracy']:.3f})",
        *(f"{mean[name]:.3f}" for name in ("accuracy_one", "accuracy_two", *judged)),
        f"{mean['variety']:.2f} ({low['variety']:.2f} to {high['variety']:.2f})",
        f"{mean['drift']:.3f}",
        f"{mean['spread']:.2f}",
        f"{mean['frechet']:.3f}",
        f"{mean['seconds']:.4f}",
    ]


# ---- the script --------------------------------------------------------------------------------------------


def read_options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser and the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", help="a tiny teacher: tiny, emoji or a folder (default: tiny)")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/quality"), help="students are trained and kept here"
    )
    parser.add_argument(
        "--captions", type=int, default=500, help="held-out captions, half of them of two objects"
    )
    parser.add_argument("--seeds", type=int, default=3, help="training seeds; each is judged at other noise")
    parser.add_argument("--methods", nargs="+", help="some of the table's models, besides the student")
    parser.add_argument(
        "--judge_only", action="store_true", help="train nothing and judge the finished students in --folder"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="parallel trainings, each on one core"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument(
        "--train_flags", nargs=argparse.REMAINDER, default=[], help="flags of every training, to the end"
    )
    return parser, parser.parse_args()


def open_world(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[Any, Any]:
    """Return the folder of the teacher and its world; exits with code 2 for a teacher without a judge."""
    try:
        teacher = choose_teacher(options.teacher or "tiny")
        world = read_world(teacher)
    except (OSError, ValueError) as error:
        parser.exit(2, f"quality.py: {error}\n")
    if world is None:
        parser.exit(
            2,
            f"quality.py: --teacher {options.teacher}: expected a tiny teacher, because only its world has a "
            "judge.\n",
        )
    return teacher, world


def choose_methods(
    parser: argparse.ArgumentParser, options: argparse.Namespace, world: Any
) -> dict[str, Method]:
    """Return the student and the methods of --methods, by default all; exits with code 2 for an unknown name."""
    rungs = LADDER.get(world.__name__.rpartition(".")[2], ())
    known = methods(QUICK[1] if options.quick else TINY_STEPS, rungs)
    if unknown := set(options.methods or ()) - set(known):
        parser.exit(
            2, f"quality.py: --methods {', '.join(unknown)}: unknown, expected some of {', '.join(known)}.\n"
        )
    return {
        name: method
        for name, method in known.items()
        if name == "student" or name in (options.methods or known)
    }


def finished_students(
    folder: Path, chosen: Mapping[str, Method], seeds: Sequence[int]
) -> dict[tuple[str, int], Path]:
    """Return {(method, seed): folder} of the students that finished training."""
    folders = {(name, seed): place(folder, name, seed) for name in chosen for seed in seeds}
    return {job: path for job, path in folders.items() if read_run(path).get("finished")}


def main() -> None:
    """Train all students, judge them, and print the table."""
    parser, options = read_options()
    teacher, world = open_world(parser, options)
    chosen = choose_methods(parser, options, world)
    flags, seeds = ["--teacher", teacher, *options.train_flags], range(options.seeds)
    if options.quick:
        options.captions, seeds, flags = 8, range(1), [*QUICK, *flags]
    print(
        f"{'judging' if options.judge_only else 'training, then judging,'} {len(chosen)} students for "
        f"{len(seeds)} seeds in {options.folder.absolute()}: {options.captions} held-out captions per cell",
        flush=True,
    )
    if not options.judge_only:
        train_all(options.folder.absolute(), chosen, flags, seeds, options.workers)
    folders = finished_students(options.folder, chosen, seeds)
    if not folders:
        parser.exit(2, f"quality.py: {options.folder}: found no finished student. Leave --judge_only out.\n")
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
