"""What the cache of trajectories costs, and whether it keeps training fed.

    python benchmarks/cache.py                     # the tiny teacher, a minute on two cores
    python benchmarks/cache.py --quick --json cache.json

Filled: the tiny teacher generates guided trajectories, and they go to disk. Read: every state once, in random
batches, by the reader of train_distillation.py and by a plain torch DataLoader over the same shards, in
turns. Fed: the share of a training step that waits for its batch, with each reader in turn; the project's own
is to stay under 5 %.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

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
LIMIT = 0.05  # of a step, that may be waited


class States(Dataset):
    """The states of shards as a plain dataset: one an index."""

    def __init__(self, shards):
        self.shards, self.places = (
            shards,
            [
                (number, trajectory, state)
                for number, shard in enumerate(shards)
                for trajectory in range(len(shard["prompt"]))
                for state in range(STEPS)
            ],
        )

    def __len__(self):
        return len(self.places)

    def __getitem__(self, number):
        shard, trajectory, state = self.places[number]
        tensors = self.shards[shard]
        return {
            name: tensor[trajectory] if name == "prompt" else tensor[trajectory, state]
            for name, tensor in tensors.items()
        }


def stock_feed(world, workers):
    """Yield batches of one epoch from a plain DataLoader."""
    for batch in DataLoader(
        States(world.states.shards), batch_size=world.batch, shuffle=True, drop_last=True, num_workers=workers
    ):
        text = pack_text([world.embeddings[number] for number in batch["prompt"].tolist()])
        yield {name: tensor.to(world.device) for name, tensor in batch.items()}, text.to(world.device)


def readers(world):
    """Return {name: a way to begin an epoch of batches}."""
    count = len(world.states) // world.batch
    return {
        "ours": lambda: world.feed(count),
        "DataLoader": lambda: stock_feed(world, 0),
        "DataLoader, 2 workers": lambda: stock_feed(world, 2),
    }


def fill(folder, count, device):
    """Let the tiny teacher trajectory `count` trajectories; returns the states, their embeddings, and the seconds."""
    settings, prompts = Settings(), shapes.captions(0, count)
    accelerator = Accelerator(cpu=device.type == "cpu")
    for place in (folder, folder.with_name("text")):
        place.mkdir()
    words = encode_once(
        accelerator,
        lazy_encoder(TINY_TEACHER, device),
        list(dict.fromkeys([*prompts, ""])),
        folder.with_name("text"),
    )
    teacher = Teacher(open_teacher_files(TINY_TEACHER), device)
    guided, basis = (
        teacher_velocity(teacher, settings, words[""]),
        torch.eye(128, choose_feature_width(settings, 64), device=device),
    )
    jobs = [(number, prompt, number) for number, prompt in enumerate(prompts)]
    began = time.perf_counter()
    trajectory_generator = TrajectoryGenerator(
        accelerator,
        lambda said, has_features: guided(
            pack_text([words[prompt] for prompt in said]).to(device), has_features
        ),
        make_scheduler(3.0),
        STEPS,
        basis=basis,
    )
    states = trajectory_generator.generate(folder, jobs, (16, SIDE, SIDE))
    return states, [words[prompt] for prompt in prompts], time.perf_counter() - began


def measure_reading(world, repeats):
    """Return {reader: trajectories a second}, medians of epochs in turns."""
    rates = {name: [] for name in readers(world)}
    for _ in range(repeats):
        for name, begin in readers(world).items():
            began = time.perf_counter()
            states = sum(len(text.tokens) for _, text in begin())
            settle(world.device)
            rates[name].append(states / STEPS / (time.perf_counter() - began))
    return {name: statistics.median(each) for name, each in rates.items()}


def measure_waiting(world, repeats, steps):
    """Return {reader: share of the time of training steps that waits for a batch}, medians of runs in turns."""
    shares = {name: [] for name in readers(world)}
    for _ in range(repeats):
        for name, begin in readers(world).items():
            pace = Pace(world.device, 1.0)
            training = ours(world, muon_rate=0.09, feed=pace.deal(iter(begin())))
            next(training)  # the first makes the optimizers' memory, and starts workers
            pace.restart()
            for _ in range(steps):
                next(training)
            shares[name].append(pace.figures()["data_wait_share"])
    return {name: statistics.median(each) for name, each in shares.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--trajectories", type=int, default=256, help="that are generated")
    parser.add_argument("--repeats", type=int, default=5, help="epochs, and runs of steps, of each reader")
    parser.add_argument("--quick", action="store_true", help="64 trajectories, one epoch each")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.trajectories < 64:
        parser.error("--repeats is at least 1, --trajectories at least 64.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU.")
    count, repeats, steps, batch = (
        (64, 1, 4, 32) if arguments.quick else (arguments.trajectories, arguments.repeats, 8, 128)
    )
    device, files = torch.device(arguments.device), open_teacher_files(TINY_TEACHER)
    print(f"generating {count} trajectories on {device}, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory(prefix="cache-") as folder:
        folder = Path(folder) / "trajectories"
        states, embeddings, seconds = fill(folder, count, device)
        each = sum(path.stat().st_size for path in folder.iterdir()) / count
        world = World(device, "no", files, student_shape(files.config), SIDE, batch, states, embeddings)
        reading, waiting = measure_reading(world, repeats), measure_waiting(world, repeats, steps)
    figures = {
        "trajectories": count,
        "filled_per_second": count / seconds,
        "bytes_per_prompt": each,
        "read_per_second": reading,
        "waiting_share": waiting,
        "is_fed": waiting["ours"] < LIMIT,
    }
    print(
        f"\nfilled: {count / seconds:.1f} trajectories a second, {each / 1e3:,.0f} kB a prompt\n\n"
        "| reader | trajectories read a second | share of a step that waits |\n|---|---|---|"
    )
    for name in reading:
        print(f"| {name} | {reading[name]:,.0f} | {waiting[name]:.1%} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
