"""Measure a training step: images per second and memory, from the cache and with the teacher evaluated in the step.

    python benchmarks/train_speed.py                     # the tiny teacher, minutes on two cores
    python benchmarks/train_speed.py --device cuda       # A14B's shapes with random weights, 512 and 1024 pixels, bfloat16
    python benchmarks/train_speed.py --quick --json speed.json

Prints one table. All ways train a student of one shape on the same states, in batches of one size and one precision:

baseline           a loop like diffusers' text-to-image example: stock DataLoader, text padded to 512 tokens, AdamW, EMA
wanlite            the loop of train_distillation.py from its cache, with AdamW and the loss on hidden states
wanlite, Muon      the same with Muon for the matrices of the blocks
wanlite, compiled  the same with AdamW and --compile
online             the same with AdamW, and the guided velocity of every state evaluated in the step. The row names the
                   residency of the teacher's experts. Batches alternate between both, the worst case of "one"

Figures are medians over steps. On the CPU the ways from the cache take turns, step by step; on a GPU each is freed
before the next. Batches are those that a run chooses on a GPU of 80 GB, and texts have the lengths of real captions.
Ways that would begin after --seconds are left out; the teacher in the step is measured at the first size alone.

"Peak" is the memory that a way adds, with its weights: on a GPU the memory allocated by torch, on the CPU that of all
live tensors. "Student" is the rate of the student's operations over the measured rate of matrix products, "teacher"
that of the guided teacher during its evaluation.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from train_distillation import Settings, WanLiteStudent
from wanlite.data.datasets import SeededBatches, Trajectories
from wanlite.data.prefetch import PREFETCHED_BATCHES, read_ahead
from wanlite.data.shards import SCALE, quantize, shard_path, write_shard
from wanlite.data.trajectories import count_compared, sample_tokens
from wanlite.network import pack_text, pass_operations, unpack_text
from wanlite.planning.defaults import choose_feature_width
from wanlite.planning.duration import measure_matrix_rate
from wanlite.planning.report import format_size
from wanlite.planning.resolve import EMA_DECAY
from wanlite.planning.simulation import MemoryMeter
from wanlite.runtime.devices import disable_cudnn_attention
from wanlite.student.shape import student_shape
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.expert_files import ExpertFiles, TeacherFiles
from wanlite.teacher.model import Teacher, make_expert
from wanlite.training.optimizers import make_optimizers
from wanlite.training.phase_table import PHASES
from wanlite.training.steps import Networks
from wanlite.training.teacher_data import feature_block

A14B = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
Batch = tuple[dict[str, Any], Any]  # states, TextTokens
Row = dict[str, Any]

PRINTED = {  # {way: its name in the table}
    "plain": "baseline",
    "ours": "wanlite",
    "muon": "wanlite, Muon",
    "compiled": "wanlite, compiled",
}
RESIDENCIES = {
    "cpu": (("both", False), ("one", False), ("streamed", False), ("disk", False), ("both", True)),
    "cuda": (("both", False), ("streamed", False), ("one", False)),
}
CUDA_SIZES = ((64, 32), (128, 8))  # side of the latents, batch
BUDGETS = (100, 60, 24)  # GB of common GPUs
LEVELS = (950.0, 500.0)  # timesteps of the high- and of the low-noise expert
TRAJECTORIES, STATES = 16, 20  # on disk, and read repeatedly
WORDS = (9, 22)  # tokens of a prompt, as of the captions of the tiny world, which have 14.8 on average
WARMING = 4  # untimed steps, in which a compiled student is given texts of different lengths


@dataclass
class World:
    """The student's shape, the teacher and the states that all ways share."""

    device: torch.device
    precision: str  # as in accelerate
    files: TeacherFiles
    shape: dict  # of the student
    side: int  # height and width of the latents
    batch: int
    states: Trajectories
    embeddings: list  # of each trajectory: (L, T)

    @property
    def tokens(self) -> int:
        return (self.side // 2) ** 2

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def student(self) -> WanLiteStudent:
        """Return a student, always with the same weights."""
        torch.manual_seed(0)
        return WanLiteStudent(self.shape).to(self.device)

    def feed(self, count: int = 10**6) -> Any:
        """Yield batches like the loop of train_distillation.py."""
        ahead = PREFETCHED_BATCHES if self.device.type == "cuda" else 0
        return read_ahead(
            self.read, SeededBatches(len(self.states), self.batch, 0, 0, count), self.device, ahead
        )

    def read(self, numbers: Sequence[int]) -> Batch:
        """Read a batch like the loop of train_distillation.py."""
        batch = self.states.__getitems__(numbers)
        return batch, pack_text([self.embeddings[number] for number in batch["prompt"].tolist()])


@dataclass
class RandomFiles(ExpertFiles):
    """An expert whose weights are random numbers, new at each read."""

    device: str = "cpu"

    def read(self, name: str, dtype: torch.dtype = torch.float32, *_: Any, **__: Any) -> torch.Tensor:
        return 0.02 * torch.randn(self.shape(name), device=self.device, dtype=dtype)


def random_teacher(config: dict[str, Any], device: str) -> TeacherFiles:
    """Return two experts of random weights with this config, without files."""
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in make_expert(ExpertFiles("high", Path(), config, {}), config["num_layers"])
            .state_dict()
            .items()
        }
    places: dict[str, Any] = {name: (Path(), name, shape) for name, shape in shapes.items()}
    experts: dict[str, ExpertFiles] = {
        name: RandomFiles(name, Path(), config, places, device=device) for name in ("high", "low")
    }
    return TeacherFiles(Path(), "diffusers", experts, 0.875)


def make_world(
    folder: Path,
    files: TeacherFiles,
    shape: dict[str, Any],
    side: int,
    batch: int,
    device: str,
    precision: str,
) -> World:
    """Write TRAJECTORIES trajectories of random states in the shapes and dtypes of real ones."""
    generator = torch.Generator().manual_seed(0)
    noise = partial(torch.randn, generator=generator, dtype=torch.float32)
    channels, tokens = shape["num_channels"], count_compared((side // 2) ** 2)
    width = choose_feature_width(Settings(), shape["hidden_size"])
    sizes = {
        "latents": (channels, side, side),
        "velocity": (channels, side, side),
        "features": (tokens, width),
    }
    folder.mkdir(parents=True)
    paths = [shard_path(folder, index) for index in range(TRAJECTORIES // 4)]
    for index in range(len(paths)):
        shard = {
            "first_token": torch.zeros(4, STATES, dtype=torch.long),
            "timestep": torch.full((4, STATES), 500.0),
            "noise_level": torch.full((4, STATES), 0.5),
            "prompt": torch.arange(4 * index, 4 * index + 4),
        }
        for name, size in sizes.items():
            shard[name], shard[name + SCALE] = quantize(noise(4, STATES, *size))
        write_shard(paths[index], shard)
    lengths = torch.randint(*WORDS, (TRAJECTORIES,), generator=generator).tolist()
    return World(
        torch.device(device),
        precision,
        files,
        shape,
        side,
        batch,
        Trajectories(paths),
        [noise(length, shape["text_dim"]) for length in lengths],
    )


# ---- ways to train: generators that take one step per next() -----------------------------------------------


class PaddedStates(torch.utils.data.Dataset):
    """States as a map-style dataset, with text padded like that of a stock pipeline."""

    def __init__(self, world: World):
        text = unpack_text(pack_text(world.embeddings))
        self.states, self.text = world.states, text

    def __len__(self):
        return len(self.states)

    def __getitem__(self, number):
        shard, place = divmod(number, 4 * STATES)
        trajectory, state = divmod(place, STATES)
        tensors = self.states.shards[shard]
        return {name: tensors[name][trajectory, state] for name in ("latents", "velocity", "timestep")} | {
            "text": self.text[tensors["prompt"][trajectory]]
        }


def plain(world: World) -> Iterator[None]:
    """Train with a loop like diffusers' text-to-image example, on the same states."""
    accelerator = Accelerator(mixed_precision=world.precision, cpu=world.device.type == "cpu")
    student = world.student()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
    ema = EMAModel(student.parameters(), decay=0.998)
    loader = torch.utils.data.DataLoader(
        PaddedStates(world), shuffle=True, batch_size=world.batch, drop_last=True
    )
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    while True:
        for batch in loader:
            with accelerator.accumulate(student):
                velocity = student(
                    batch["latents"].float(), batch["timestep"], batch["text"], return_dict=False
                )[0]
                loss = nn.functional.mse_loss(velocity.float(), batch["velocity"].float())
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                ema.step(student.parameters())
            loss.detach().item()
            yield


def ours(
    world: World,
    muon_rate: float = 0.0,
    is_compiled: bool = False,
    predict: Callable | None = None,
    feed: Iterable[Batch] | None = None,
) -> Iterator[None]:
    """Train with the steps of the velocity phase; `predict(batch, text)` replaces the teacher's cached predictions."""
    settings, on_gpu = Settings(muon_learning_rate=muon_rate), world.device.type == "cuda"
    accelerator = Accelerator(mixed_precision=world.precision, cpu=not on_gpu)
    student, width = world.student(), world.shape["hidden_size"]
    head = nn.Linear(width, choose_feature_width(settings, width)).to(world.device)
    optimizers = make_optimizers(settings, student, head, is_fused=on_gpu)
    ema = EMAModel(student.parameters(), decay=EMA_DECAY, foreach=on_gpu)
    wrapped, wrapped_head, *optimizers = accelerator.prepare(student, head, *optimizers)
    if is_compiled:
        student.compile_repeated_blocks()
    networks = Networks(wrapped, wrapped_head, feature_block(world.shape["depth"]), None, None, None)
    for batch, text in feed or world.feed():
        if predict is not None:
            batch["velocity"], batch["features"] = predict(batch, text)
        with accelerator.autocast():
            loss, _ = PHASES["velocity"].loss(networks, settings, batch, text, 0.5, None)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(
            [*wrapped.parameters(), *wrapped_head.parameters()], settings.max_grad_norm
        )
        torch.stack([loss.detach(), norm]).tolist()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.step(student.parameters())
        yield


class Online:
    """The guided teacher's velocities and hidden states of a batch; `seconds` are those of each evaluation."""

    def __init__(self, world: World, residency: str, is_fp8: bool):
        self.world = world
        self.seconds: list[float] = []
        self.teacher = Teacher(world.files, world.device, world.dtype, residency, is_fp8)
        self.block = feature_block(world.files.config["num_layers"])
        self.unwanted = pack_text([world.embeddings[0]] * world.batch).to(world.device)
        torch.manual_seed(0)
        width = world.files.config["num_attention_heads"] * world.files.config["attention_head_dim"]
        self.basis = torch.linalg.qr(
            torch.randn(width, choose_feature_width(Settings(), world.shape["hidden_size"]))
        ).Q.to(world.device)

    def __call__(self, batch: dict[str, Any], text: Any) -> tuple[torch.Tensor, torch.Tensor]:
        timestep = torch.full_like(batch["timestep"], LEVELS[len(self.seconds) % 2])
        settle(self.world.device)
        began = time.perf_counter()
        velocity, (hidden_states,) = self.teacher.velocity(
            batch["latents"].float(), timestep, text, self.unwanted, 4.0, 3.0, (self.block,)
        )
        features = sample_tokens(hidden_states, batch["first_token"]).float() @ self.basis
        settle(self.world.device)
        self.seconds.append(time.perf_counter() - began)
        return velocity, features


# ---- measuring ---------------------------------------------------------------------------------------------


def settle(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that `work()` adds to memory at its peak."""
    if device.type == "cpu":
        with MemoryMeter() as meter:
            work()
        return meter.peak_bytes
    settle(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    settle(device)
    return torch.cuda.max_memory_allocated(device) - before


def timed(way: Iterator[None], device: torch.device) -> float:
    """Return the seconds of a step."""
    settle(device)
    began = time.perf_counter()
    next(way)
    settle(device)
    return time.perf_counter() - began


def warm(ways: dict[str, Iterator[None]], device: torch.device) -> dict[str, int]:
    """Take the first steps of each way; returns {name: bytes at its peak}."""
    return {
        name: peak_of(lambda way=way: [next(way) for _ in range(WARMING)], device)
        for name, way in ways.items()
    }


def student_operations(world: World) -> float:
    """Return the operations of a step: the forward pass, and twice as many of the backward pass."""
    words = sum(map(len, world.embeddings)) / len(world.embeddings)
    config = WanLiteStudent(world.shape | {"depth": 1, "text_dim": 1}).config | {
        "num_layers": world.shape["depth"],
        "text_dim": world.shape["text_dim"],
    }
    return 3 * pass_operations(config, world.batch, world.tokens, words)


def measure(world: World, repeats: int, is_compiled: bool, residencies: Sequence, end: float) -> list[Row]:
    """Return a row for each way that begins before `end`, in seconds of time.monotonic()."""
    rate = measure_matrix_rate(world.device, world.dtype)
    rows: list[Row] = []
    for names in way_groups(world.device, is_compiled):
        rows += measure_from_cache(world, repeats, names, rate) if time.monotonic() < end else []
    for place in residencies:
        rows += [measure_online(world, repeats, rate, *place)] if time.monotonic() < end else []
    for each in rows:
        each["over_plain"] = each.get("images_per_second", 0) / rows[0]["images_per_second"]
    return rows


def way_groups(device: torch.device, is_compiled: bool) -> list[list[str]]:
    """Return the names of the ways whose students live at the same time."""
    names = [name for name in PRINTED if is_compiled or name != "compiled"]
    return [[name] for name in names] if device.type == "cuda" else [names]


def measure_from_cache(world: World, repeats: int, names: Sequence[str], rate: float) -> list[Row]:
    """Return the rows of the ways that take turns; their students are freed at its return."""
    options: dict[str, Any] = {"ours": {}, "muon": {"muon_rate": 0.09}, "compiled": {"is_compiled": True}}
    ways = {name: ours(world, **options[name]) if name in options else plain(world) for name in names}
    peaks = warm(ways, world.device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(timed(way, world.device))
    return [row(world, name, peaks[name], seconds[name], rate) for name in ways]


def measure_online(world: World, repeats: int, rate: float, residency: str, is_fp8: bool) -> Row:
    """Return the row of evaluating the teacher in the step, for one residency of its experts."""
    name, online = f"online, {residency}{', fp8' * is_fp8}", Online(world, residency, is_fp8)
    way = ours(world, predict=online)
    try:
        peak = warm({name: way}, world.device)[name]
        seconds = [timed(way, world.device) for _ in range(max(2, repeats // 4))]
        return row(world, name, peak, seconds, rate, online.seconds[WARMING:])
    except torch.OutOfMemoryError:
        return {"way": name, "pixels": 8 * world.side, "failed": "out of memory"}
    finally:
        online.teacher.unload()


def row(
    world: World,
    name: str,
    peak: int,
    seconds: Sequence[float],
    rate: float,
    teacher_seconds: Sequence[float] = (),
) -> Row:
    """Return the figures of a way from the seconds of its steps, and of the teacher's evaluations in them."""
    step = statistics.median(seconds)
    words = sum(map(len, world.embeddings)) / len(world.embeddings)
    found = {
        "way": name,
        "pixels": 8 * world.side,
        "batch": world.batch,
        "images_per_second": world.batch / step,
        "seconds": step,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "peak_bytes": peak,
        "fits_gb": [gb for gb in BUDGETS if peak < gb * 1e9],
        "student_share": student_operations(world) / (step * rate),
        "matrix_rate": rate,
    }
    if teacher_seconds:
        guided = pass_operations(world.files.config, 2 * world.batch, world.tokens, words)
        found["teacher_share"] = guided / (statistics.median(teacher_seconds) * rate)
    return found


def print_table(rows: Sequence[Row]) -> None:
    """Print a line for each row."""
    columns = ("pixels", "way", "images/s", "over baseline", "ms per step (range)", "peak", "fits in")
    print("\n| " + " | ".join((*columns, "student", "teacher")) + " |\n" + "|---" * 9 + "|")
    for each in rows:
        way = PRINTED.get(each["way"], each["way"])
        if "failed" in each:
            print(f"| {each['pixels']} | {way} | {each['failed']} |" + " |" * 6)
            continue
        teacher = f"{each['teacher_share']:.1%}" if "teacher_share" in each else ""
        print(
            f"| {each['pixels']} | {way} | {each['images_per_second']:.1f} | "
            f"{each['over_plain']:.2f} | "
            f"{1e3 * each['seconds']:.0f} ({1e3 * each['fastest']:.0f} to {1e3 * each['slowest']:.0f}) | "
            f"{format_size(each['peak_bytes'])} | {', '.join(map(str, each['fits_gb']))} GB | "
            f"{each['student_share']:.1%} | {teacher} |"
        )


def read_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: the real shapes")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps of each way")
    parser.add_argument("--seconds", type=float, default=480, help="start no further way after these")
    parser.add_argument("--no_compile", action="store_true", help="skip the compiled way")
    parser.add_argument("--quick", action="store_true", help="a few steps of small batches, nothing compiled")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}, expected at least 1.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: torch found no GPU. Without the flag, the tiny teacher is measured on the CPU."
        )
    return arguments


def main() -> int:
    """Measure all ways at each size, and print the table."""
    arguments = read_arguments()
    on_gpu, repeats = arguments.device == "cuda", 3 if arguments.quick else arguments.repeats
    disable_cudnn_attention()
    files = random_teacher(A14B, "cuda") if on_gpu else open_teacher_files(ROOT / "tiny_teacher")
    end = time.monotonic() + arguments.seconds
    sizes = CUDA_SIZES if on_gpu else ((8, 8 if arguments.quick else 128),)
    shape, rows = student_shape(files.config), []
    print(
        f"student {shape['hidden_size']} x {shape['depth']} on {arguments.device}, {torch.get_num_threads()} "
        f"threads; {repeats} steps of each way, in turns",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="train-speed-") as folder:
        for side, batch in sizes:
            world = make_world(
                Path(folder) / str(side),
                files,
                shape,
                side,
                batch,
                arguments.device,
                "bf16" if on_gpu else "no",
            )
            is_compiled = not (arguments.quick or arguments.no_compile)
            residencies = RESIDENCIES[arguments.device] if side == sizes[0][0] else ()
            rows += measure(world, repeats, is_compiled, residencies, end)
        print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
