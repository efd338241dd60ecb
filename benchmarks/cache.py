"""Measure the cache of trajectories: its speed and size, and the share of a training step spent waiting for it.

    python benchmarks/cache.py                     # the tiny teacher, a minute on two cores
    python benchmarks/cache.py --quick --json cache.json

Prints the trajectories per second that the tiny teacher generates and writes, and the bytes per prompt. Then one
table of readers, in turns: the reader of train_distillation.py and torch DataLoaders over the same shards, with the
trajectories per second of one epoch in random batches, and the share of a training step spent waiting for its batch.
That of train_distillation.py should be below 5 %.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from benchmarks.train_speed import World, ours, settle
from train_distillation import Settings
from wanlite.data.text_encoder import encode_once, lazy_encoder
from wanlite.data.trajectories import TrajectoryGenerator
from wanlite.flow import make_scheduler
from wanlite.network import pack_text
from wanlite.planning.defaults import choose_feature_width
from wanlite.student.shape import student_shape
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.model import Teacher
from wanlite.training.teacher_data import teacher_velocity
from wanlite.training.throughput import Pace
from wanlite.world import shapes

TINY_TEACHER = ROOT / "tiny_teacher"
STEPS = 20  # of a trajectory
SIDE = 8  # of the latents
LIMIT = 0.05  # share of a step spent waiting
PRINTED = {"ours": "wanlite"}  # {reader: its name in the table}


class States(Dataset):
    """The states of shards as a map-style dataset, with one state per index."""

    def __init__(self, shards: list[dict[str, Any]]):
        self.shards = shards
        self.places = [
            (number, trajectory, state)
            for number, shard in enumerate(shards)
            for trajectory in range(len(shard["prompt"]))
            for state in range(STEPS)
        ]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, number):
        shard, trajectory, state = self.places[number]
        tensors = self.shards[shard]
        return {
            name: tensor[trajectory] if name == "prompt" else tensor[trajectory, state]
            for name, tensor in tensors.items()
        }


def stock_feed(world: World, workers: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield the batches of one epoch from a DataLoader."""
    for batch in DataLoader(
        States(world.states.shards), batch_size=world.batch, shuffle=True, drop_last=True, num_workers=workers
    ):
        text = pack_text([world.embeddings[number] for number in batch["prompt"].tolist()])
        yield {name: tensor.to(world.device) for name, tensor in batch.items()}, text.to(world.device)


def readers(world: World) -> dict[str, Callable[[], Any]]:
    """Return {name: function that begins an epoch of batches}."""
    count = len(world.states) // world.batch
    return {
        "ours": lambda: world.feed(count),
        "DataLoader": lambda: stock_feed(world, 0),
        "DataLoader, 2 workers": lambda: stock_feed(world, 2),
    }


def fill(folder: Path, count: int, device: torch.device) -> tuple[Any, list[Any], float]:
    """Generate `count` trajectories of the tiny teacher; returns their states, prompt embeddings, and the seconds."""
    settings, prompts = Settings(), shapes.captions(0, count)
    accelerator = Accelerator(cpu=device.type == "cpu")
    for place in (folder, folder.with_name("text")):
        place.mkdir()
    embeddings = encode_once(
        accelerator,
        lazy_encoder(TINY_TEACHER, device),
        list(dict.fromkeys([*prompts, ""])),
        folder.with_name("text"),
    )
    teacher = Teacher(open_teacher_files(TINY_TEACHER), device)
    guided = teacher_velocity(teacher, settings, embeddings[""])
    basis = torch.eye(128, choose_feature_width(settings, 64), device=device)
    jobs = [(number, prompt, number) for number, prompt in enumerate(prompts)]
    began = time.perf_counter()
    trajectory_generator = TrajectoryGenerator(
        accelerator,
        lambda prompts, has_features: guided(
            pack_text([embeddings[prompt] for prompt in prompts]).to(device), has_features
        ),
        make_scheduler(3.0),
        STEPS,
        basis=basis,
    )
    states = trajectory_generator.generate(folder, jobs, (16, SIDE, SIDE))
    return states, [embeddings[prompt] for prompt in prompts], time.perf_counter() - began


def measure_reading(world: World, repeats: int) -> dict[str, float]:
    """Return {reader: trajectories per second}, medians of epochs in turns."""
    rates: dict[str, list[float]] = {name: [] for name in readers(world)}
    for _ in range(repeats):
        for name, begin in readers(world).items():
            began = time.perf_counter()
            states = sum(len(text.tokens) for _, text in begin())
            settle(world.device)
            rates[name].append(states / STEPS / (time.perf_counter() - began))
    return {name: statistics.median(each) for name, each in rates.items()}


def measure_waiting(world: World, repeats: int, steps: int) -> dict[str, float]:
    """Return {reader: share of training steps spent waiting for a batch}, medians of runs in turns."""
    shares: dict[str, list[float]] = {name: [] for name in readers(world)}
    for _ in range(repeats):
        for name, begin in readers(world).items():
            pace = Pace(world.device, 1.0)
            training = ours(world, muon_rate=0.09, feed=pace.count_batches(iter(begin())))
            next(training)  # the first step allocates the optimizers' memory and starts workers
            pace.restart()
            for _ in range(steps):
                next(training)
            shares[name].append(pace.figures()["data_wait_share"])
    return {name: statistics.median(each) for name, each in shares.items()}


def measure(device: torch.device, count: int, repeats: int, steps: int, batch: int) -> dict[str, Any]:
    """Generate and read `count` trajectories, and train on them; returns the figures."""
    files = open_teacher_files(TINY_TEACHER)
    with tempfile.TemporaryDirectory(prefix="cache-") as temporary:
        folder = Path(temporary) / "trajectories"
        states, embeddings, seconds = fill(folder, count, device)
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        world = World(device, "no", files, student_shape(files.config), SIDE, batch, states, embeddings)
        reading, waiting = measure_reading(world, repeats), measure_waiting(world, repeats, steps)
    return {
        "trajectories": count,
        "filled_per_second": count / seconds,
        "bytes_per_prompt": num_bytes / count,
        "read_per_second": reading,
        "waiting_share": waiting,
        "is_fed": waiting["ours"] < LIMIT,
    }


def print_table(figures: dict[str, Any]) -> None:
    """Print the speed of generation, and a line for each reader."""
    print(
        f"\nwritten: {figures['filled_per_second']:.1f} trajectories per second, "
        f"{figures['bytes_per_prompt'] / 1e3:,.0f} kB per prompt\n\n"
        "| reader | trajectories read per second | share of a step spent waiting |\n|---|---|---|"
    )
    for name, rate in figures["read_per_second"].items():
        print(f"| {PRINTED.get(name, name)} | {rate:,.0f} | {figures['waiting_share'][name]:.1%} |")


def read_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--trajectories", type=int, default=256, help="number of trajectories")
    parser.add_argument("--repeats", type=int, default=5, help="epochs, and runs of steps, of each reader")
    parser.add_argument("--quick", action="store_true", help="64 trajectories, one epoch each")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.trajectories < 64:
        parser.error("expected --repeats of at least 1 and --trajectories of at least 64.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch found no GPU.")
    return arguments


def main() -> int:
    """Measure the cache and print the figures."""
    arguments = read_arguments()
    count, repeats, steps, batch = (
        (64, 1, 4, 32) if arguments.quick else (arguments.trajectories, arguments.repeats, 8, 128)
    )
    device = torch.device(arguments.device)
    print(f"generating {count} trajectories on {device}, {torch.get_num_threads()} threads", flush=True)
    figures = measure(device, count, repeats, steps, batch)
    print_table(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
