"""Compare initializations after equal training: random, two published prunings, weights-only and calibrated projection.

    python benchmarks/projection.py --json projection.json    # the table of docs/results.md; over an hour on two cores
    python benchmarks/projection.py --quick                   # about a minute: one shape, one seed, a few steps

Prints one table. Every start is trained on the tiny teacher's guided velocity with identical batches, at its best
learning rate of Muon over all steps, which is found with a separate seed on the first shape of each width. Rows
already in --json FILE are not run again.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wanlite.student.shape import DEFAULT_EXPERT

STARTS = ("random", "selection", "importance", "weights_only", "calibrated")
# width x blocks x heads; the teacher has 128 x 4 x 4
SHAPES = ("64x4x2", "64x4x4", "48x2x2", "48x2x3", "24x2x1", "24x2x2")
RATES = (0.03, 0.1, 0.3)  # learning rates of Muon
TUNING_SEED = 100

Job = dict[str, Any]  # inputs of a run
Row = dict[str, Any]  # a job and its results


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="width x blocks x heads")
    parser.add_argument("--starts", nargs="+", default=STARTS, choices=STARTS)
    parser.add_argument(
        "--experts",
        nargs="+",
        default=[DEFAULT_EXPERT],
        choices=("low", "high", "best_per_block"),
        help="the projected experts",
    )
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="a single one is not tuned")
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs, with one thread each")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/projection"), help="cache of the teacher's trajectories"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds = 30, 1
        options.shapes, options.rates = options.shapes[:1], options.rates[1:2]
    return options


def main() -> None:
    """Generate the data, tune the learning rates, train every start, and print the table."""
    options = read_options()
    print(
        f"comparing {len(options.starts)} starts x {len(options.shapes)} shapes x {options.seeds} seeds over "
        f"{options.steps} steps; trajectories go to {options.folder}",
        flush=True,
    )
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    data = prepare(options.folder, 256 if options.quick else 4000)
    os.environ["TQDM_DISABLE"] = "1"  # parallel runs would overwrite each other's bars
    rows = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        rates = tune(pool, rows, options, data)
        jobs = [
            job(start, shape, seed, rates[start, width_of(shape)], expert, options, data)
            for seed in range(options.seeds)
            for shape in options.shapes
            for start in options.starts
            for expert in options.experts
            if is_compared(start, expert, options.experts)
        ]
        summarise(run_all(pool, rows, jobs, options))


def is_compared(start: str, expert: str, experts: Sequence[str]) -> bool:
    """Whether a start has a row for this expert: all have one for the first, and only projections for others."""
    return expert == experts[0] or start == "weights_only" or (start, expert) == ("calibrated", "high")


def job(
    start: str, shape: str, seed: int, rate: float, expert: str, options: argparse.Namespace, data: str
) -> Job:
    """Return the inputs of one run."""
    width, blocks, heads = map(int, shape.split("x"))
    return {
        "start": start,
        "student": {"hidden_size": width, "depth": blocks, "num_heads": heads},
        "expert": expert,
        "seed": seed,
        "rate": rate,
        "steps": options.steps,
        "batch": options.batch,
        "data": data,
    }


def run_all(pool: Executor, rows: list[Row], jobs: list[Job], options: argparse.Namespace) -> list[Row]:
    """Run the jobs without a row, and add their rows to `rows` and to the file; returns the rows of all jobs."""
    have = {key(row) for row in rows}
    missing = [job for job in jobs if key(job) not in have]
    for number, row in enumerate(pool.map(run, missing), 1):
        rows.append(row)
        print(f"[{number}/{len(missing)}] {describe(row)}", flush=True)
        if options.json:
            partial = options.json.with_suffix(".partial")
            partial.write_text(json.dumps(rows, indent=1) + "\n")
            os.replace(partial, options.json)
    return [row for row in rows if key(row) in {key(job) for job in jobs}]


def key(row: Row | Job) -> str:
    """Return the identity of a run."""
    return json.dumps(
        [row[name] for name in ("start", "student", "expert", "seed", "rate", "steps", "batch")]
    )


def describe(row: Row) -> str:
    """Return a row as a line of the log."""
    errors = "  ".join(f"{step}: {error:.3f}" for step, error in row["error_at"].items())
    shape = "x".join(map(str, row["student"].values()))
    return (
        f"{row['start']:>12} ({row['expert']}) {shape:>7} seed {row['seed']} rate {row['rate']:g}  "
        f"{errors}  accuracy {row['accuracy']:.3f}  {row['seconds']:.1f} s"
    )


def tune(
    pool: Executor, rows: list[Row], options: argparse.Namespace, data: str
) -> dict[tuple[str, int], float]:
    """Return {(start, width): learning rate with the lowest final error}, from a seed that the table does not use."""
    first = {width_of(shape): shape for shape in reversed(options.shapes)}
    jobs = [
        job(start, shape, TUNING_SEED, rate, DEFAULT_EXPERT, options, data)
        for shape in first.values()
        for start in options.starts
        for rate in options.rates
    ]
    if len(options.rates) > 1:
        found = run_all(pool, rows, jobs, options)
        found.sort(key=lambda row: -row["error_at"][str(options.steps)])
        rates = {
            (row["start"], row["student"]["hidden_size"]): row["rate"] for row in found
        }  # the last one is the best
    else:
        rates = {(job["start"], job["student"]["hidden_size"]): job["rate"] for job in jobs}
    print(
        "learning rates of Muon:",
        ", ".join(f"{start} at width {width} {rate:g}" for (start, width), rate in rates.items()),
        flush=True,
    )
    return rates


def width_of(shape: str) -> int:
    """Return the width of a shape such as "64x4x2"."""
    return int(shape.split("x")[0])


# ---- the data of all runs ----------------------------------------------------------------------------------


def prepare(folder: Path, num_trajectories: int) -> str:
    """Generate the teacher's trajectories once, like a training run; returns their folder."""
    import torch
    from accelerate import Accelerator

    import train_distillation as script
    from wanlite.data.text_encoder import encode_prompts, load_text_encoder
    from wanlite.data.trajectories import TrajectoryGenerator
    from wanlite.files.cache import cache_folder
    from wanlite.flow import make_scheduler
    from wanlite.network import pack_text
    from wanlite.planning.defaults import choose_prompts
    from wanlite.planning.resolve import complete
    from wanlite.teacher.checkpoint import open_teacher_files
    from wanlite.teacher.model import Teacher
    from wanlite.training.teacher_data import teacher_velocity

    settings = replace(complete(script.Settings()), num_trajectories=num_trajectories)
    files = open_teacher_files(settings.teacher)
    training, held_out = choose_prompts(settings)
    prompts = [*training, *held_out, ""]
    embeddings = dict(zip(prompts, encode_prompts(*load_text_encoder(settings.teacher), prompts)))
    guided = teacher_velocity(Teacher(files), settings, embeddings[""])
    trajectory_generator = TrajectoryGenerator(
        Accelerator(),
        lambda prompts, has_features: guided(pack_text([embeddings[p] for p in prompts]), has_features),
        make_scheduler(settings.flow_shift),
        settings.teacher_steps,
        basis=torch.eye(files.experts["low"].width)[:, :1],
    )
    cache = cache_folder(folder, "projection", teacher=files.fingerprint, prompts=[*training, *held_out])
    for part, prompts, first in (("training", training, 0), ("held_out", held_out[:64], -(10**6))):
        (cache / part).mkdir(exist_ok=True)
        trajectory_generator.generate(
            cache / part, [(n, prompt, first + n) for n, prompt in enumerate(prompts)], (16, 8, 8)
        )
    torch.save({"training": training, "held_out": held_out, "embeddings": embeddings}, cache / "prompts.pt")
    return str(cache)


# ---- one run -----------------------------------------------------------------------------------------------


def run(job: Job) -> Row:
    """Initialize a student, train it and judge it; returns the row."""
    import torch

    torch.set_num_threads(1)
    inputs = read_inputs(job)
    torch.manual_seed(job["seed"])
    student, seconds = make_student(job, inputs)
    errors = train_student(student, job, inputs)
    return {name: value for name, value in job.items() if name != "data"} | {
        "error_at": errors,
        "accuracy": judge(student, inputs),
        "seconds": round(seconds, 2),
        "parameters": student.num_parameters(),
    }


@dataclass
class Inputs:
    """The settings, the teacher and the data that the runs share."""

    settings: Any
    files: Any
    training: list[str]  # prompts
    held_out: list[str]
    embeddings: dict[str, Any]  # by prompt: (L, T)
    states: dict[str, Any]  # Trajectories of "training" and "held_out"


def read_inputs(job: Job) -> Inputs:
    """Read the prompts and trajectories of prepare(), and complete the settings of a run."""
    import torch

    from train_distillation import Settings
    from wanlite.data.datasets import Trajectories
    from wanlite.planning.resolve import complete
    from wanlite.teacher.checkpoint import open_teacher_files

    cache = Path(job["data"])
    saved = torch.load(cache / "prompts.pt", weights_only=True)
    states = {part: Trajectories(sorted((cache / part).glob("shard-*"))) for part in ("training", "held_out")}
    settings = replace(
        complete(Settings()),
        seed=job["seed"],
        learning_rate=2e-3,
        muon_learning_rate=job["rate"],
        max_train_steps=job["steps"],
        lr_warmup_steps=job["steps"] // 10,
    )
    return Inputs(settings, open_teacher_files(settings.teacher), **saved, states=states)


def make_student(job: Job, inputs: Inputs) -> tuple[Any, float]:
    """Return a student with the weights of its start, and the seconds of the latter."""
    from train_distillation import WanLiteStudent
    from wanlite.student.shape import student_shape

    student = WanLiteStudent(student_shape(inputs.files.config, **job["student"]))
    prompts = [inputs.embeddings[prompt] for prompt in inputs.training[:1024]]
    began = time.perf_counter()
    STARTERS[job["start"]](student, inputs.files, job["expert"], prompts, job["seed"])
    return student, time.perf_counter() - began


def train_student(student: Any, job: Job, inputs: Inputs) -> dict[str, float]:
    """Train a student on the guided velocity and leave its EMA weights in place; returns {step: held-out error}."""
    import torch
    from diffusers.training_utils import EMAModel

    from wanlite.data.datasets import SeededBatches
    from wanlite.network import pack_text
    from wanlite.training.losses import velocity_loss
    from wanlite.training.optimizers import make_lr_schedulers, make_optimizers
    from wanlite.training.steps import velocity_from

    optimizers = make_optimizers(inputs.settings, student)
    lr_schedulers = make_lr_schedulers(inputs.settings, optimizers)
    ema, states = EMAModel(student.parameters(), decay=0.995), inputs.states["training"]
    errors = {"0": held_out_error(student, ema, inputs)}
    batches = SeededBatches(len(states), job["batch"], job["seed"], 0, job["steps"])
    for step, numbers in enumerate(batches, 1):
        batch = states.__getitems__(numbers)
        text = pack_text([inputs.embeddings[inputs.training[number]] for number in batch["prompt"].tolist()])
        velocity = velocity_from(student, text)(batch["latents"].float(), batch["timestep"])
        velocity_loss(velocity, batch["velocity"]).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), inputs.settings.max_grad_norm)
        for optimizer, lr_scheduler in zip(optimizers, lr_schedulers):
            optimizer.step()
            optimizer.zero_grad()
            lr_scheduler.step()
        ema.step(student.parameters())
        if step in (200, 400, 500, job["steps"]):
            errors[str(step)] = held_out_error(student, ema, inputs)
    ema.copy_to(student.parameters())
    return errors


def held_out_error(student: Any, ema: Any, inputs: Inputs) -> float:
    """Return the velocity error of the averaged student on held-out trajectories."""
    from wanlite.training.state import averaged_weights
    from wanlite.training.validation import relative_error

    with averaged_weights(ema, student):
        error = relative_error(
            student, inputs.states["held_out"], inputs.embeddings, inputs.held_out, "cpu", lambda: None
        )
    return round(error, 5)


def judge(student: Any, inputs: Inputs) -> Any:
    """Return the share of 200 held-out captions that the judge finds right."""
    from wanlite.data.autoencoder import load_autoencoder
    from wanlite.flow import make_scheduler
    from wanlite.training.metrics import prompt_accuracy
    from wanlite.training.steps import velocity_from
    from wanlite.training.validation import ImageSampler, generate_images

    settings = inputs.settings
    autoencoder, scheduler = load_autoencoder(settings.teacher), make_scheduler(settings.flow_shift)
    sampler = ImageSampler(autoencoder, scheduler, (16, 8, 8))
    figures = prompt_accuracy(
        lambda prompts: generate_images(
            partial(velocity_from, student),
            [inputs.embeddings[prompt] for prompt in prompts],
            list(range(len(prompts))),
            settings.teacher_steps,
            sampler,
        ),
        inputs.held_out[:200],
    )
    return figures["accuracy"]


# ---- the starts --------------------------------------------------------------------------------------------


def random_start(student: Any, files: Any, expert: str, embeddings: list, seed: int) -> None:
    """Leave the random weights of a new student."""


def weights_only(student: Any, files: Any, expert: str, embeddings: list, seed: int) -> None:
    """Project the teacher's weights without calibration."""
    import torch

    from wanlite.student.projection import choose_experts, project

    project(student, choose_experts(files, expert), torch.cat(embeddings))


def calibrated(student: Any, files: Any, expert: str, embeddings: list, seed: int) -> None:
    """Project the teacher's weights and calibrate them on its hidden states, the default."""
    import torch

    from wanlite.network import pack_text
    from wanlite.student.calibration import calibrate, choose_channels, make_frames
    from wanlite.student.projection import choose_experts, project

    (chosen,) = choose_experts(files, expert)
    frames = make_frames(chosen, pack_text(embeddings), (8, 8), seed=seed)
    channels = choose_channels(chosen, frames, student.config.hidden_size)
    report = project(student, [chosen], torch.cat(embeddings), channels)
    calibrate(student, chosen, report, frames)


def selection(student: Any, files: Any, expert: str, embeddings: list, seed: int) -> None:
    """Slice evenly spaced rows and columns of evenly spaced blocks.

    Source: weight selection (Xu et al., ICLR 2024).
    """
    slice_into(student, files.experts[expert], lambda name, dimension, count, size: evenly(count, size))


def importance(student: Any, files: Any, expert: str, embeddings: list, seed: int) -> None:
    """Slice the most active channels, heads or their rotary pairs, and neurons of evenly spaced blocks.

    Source: Minitron (Muralidharan et al. 2024), with activations over calibration frames.
    """
    files = files.experts[expert]
    activity = measure_activity(files, embeddings, seed)
    slice_into(student, files, ImportanceChoice(student.config, files, activity))


def measure_activity(files: Any, embeddings: list, seed: int) -> dict[str, Any]:
    """Return mean absolute inputs of each block's queries ("0.channels"), outputs of attention, and second FFN layer."""
    import torch

    from wanlite.network import one_frame_velocity, pack_text
    from wanlite.student.calibration import make_frames
    from wanlite.teacher.model import load_expert

    activity: dict[str, Any] = {}
    network = load_expert(files)

    def observe(name, module):
        def add(module, inputs, output):
            activity[name] = activity.get(name, 0) + inputs[0].detach().flatten(0, -2).abs().mean(0)

        module.register_forward_hook(add)

    for index, block in enumerate(network.blocks):
        observe(f"{index}.channels", block.attn1.to_q)
        for name in ("attn1", "attn2"):
            observe(f"{index}.{name}", getattr(block, name).to_out[0])
        observe(f"{index}.ffn", block.ffn.net[2])
    frames = make_frames(files, pack_text(embeddings[:256]), (8, 8), seed=seed)
    with torch.no_grad():
        one_frame_velocity(network, frames.latents, frames.timestep, *frames.text)
    return activity


class ImportanceChoice:
    """Chooses the most active indices of each dimension of an expert's tensors."""

    def __init__(self, config: Any, files: Any, activity: dict[str, Any]):
        from wanlite.student.pruning import top_indices

        self.config, self.files, self.activity = config, files, activity
        scores = [score for name, score in activity.items() if name.endswith("channels")]
        self.channels = top_indices(sum(scores), config.hidden_size)

    def __call__(self, name: str, dimension: int, count: int, size: int) -> Any:
        """Return `count` of the `size` indices of a tensor's dimension."""
        import torch

        from wanlite.student.pruning import top_indices

        part = name.split(".")
        if count == size:
            return torch.arange(size)
        is_attention = part[0] == "blocks" and part[2] in ("attn1", "attn2")
        if is_attention and (part[3].startswith("norm") or (part[3] == "to_out") == (dimension == 1)):
            return self.head_rows(part[1], part[2])
        if part[0] == "blocks" and part[2] == "ffn" and (dimension == 0) == (part[4] == "0"):
            return top_indices(self.activity[f"{part[1]}.ffn"], count)
        if "time_proj" in name and dimension == 0:
            return (torch.arange(6)[:, None] * self.files.width + self.channels).flatten()
        return self.channels

    def head_rows(self, block: str, attention: str) -> Any:
        """Return the rows of the most active heads, whole or reduced to rotary pairs."""
        import torch

        from wanlite.student.pruning import _rotary_rows, top_indices

        head_dim = self.files.config["attention_head_dim"]
        size = self.config.hidden_size // self.config.num_heads
        power = self.activity[f"{block}.{attention}"].unflatten(0, (-1, head_dim)).square().sum(1)
        layers = {
            kind: tuple(
                self.files.read(f"blocks.{block}.{attention}.to_{kind}.{name}") for name in ("weight", "bias")
            )
            for kind in "qk"
        }
        heads = top_indices(power, self.config.num_heads).tolist()
        places = [head * head_dim + torch.arange(head_dim) for head in heads]
        return torch.cat([rows[_rotary_rows(layers, rows, size, attention == "attn1")] for rows in places])


def slice_into(student: Any, files: Any, choose: Callable[[str, int, int, int], Any]) -> None:
    """Fill a student with slices of the tensors of evenly spaced blocks.

    `choose(name, dimension, count, size)` returns the indices that are kept.
    """
    import torch

    blocks = evenly(student.config.depth, files.config["num_layers"]).tolist()
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            part = name.split(".")
            if part[0] == "blocks":
                part[1] = str(blocks[int(part[1])])
            teacher_name = ".".join(part)
            found = files.read(teacher_name)
            for dimension, (count, size) in enumerate(zip(tensor.shape, found.shape)):
                kept = choose(teacher_name, dimension, count, size)
                found = found.index_select(dimension, kept) if count != size else found
            tensor.copy_(found)


def evenly(count: int, size: int) -> Any:
    """Return `count` evenly spaced indices below `size`."""
    import torch

    return torch.linspace(0, size - 1, count).round().long()


STARTERS = {
    "random": random_start,
    "selection": selection,
    "importance": importance,
    "weights_only": weights_only,
    "calibrated": calibrated,
}


# ---- the table ---------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Row]) -> None:
    """Print the table: means over seeds, with ranges of the last error and of the accuracy."""
    marks = list(rows[0]["error_at"])
    print(
        f"\n| student | start | {' | '.join(f'error at {mark}' for mark in marks)} | captions right | "
        f"seconds to project |\n"
        f"|{'---|' * (len(marks) + 4)}"
    )
    cells = dict.fromkeys((tuple(row["student"].values()), row["start"], row["expert"]) for row in rows)
    for shape, start, expert in sorted(
        cells, key=lambda cell: (-cell[0][0], -cell[0][1], cell[0][2], STARTS.index(cell[1]))
    ):
        found = [
            row
            for row in rows
            if (tuple(row["student"].values()), row["start"], row["expert"]) == (shape, start, expert)
        ]
        errors = [[row["error_at"][mark] for row in found] for mark in marks]
        shares = [row["accuracy"] for row in found]
        name = start.replace("_", " ") + ("" if expert == DEFAULT_EXPERT else f", {expert}")
        print(
            f"| {shape[0]} x {shape[1]}, {shape[2]} heads | {name} | "
            + " | ".join(f"{sum(each) / len(each):.3f}" for each in errors[:-1])
            + f" | {sum(errors[-1]) / len(found):.3f} ({min(errors[-1]):.3f} to {max(errors[-1]):.3f})"
            f" | {sum(shares) / len(found):.2f} ({min(shares):.2f} to {max(shares):.2f})"
            f" | {sum(row['seconds'] for row in found) / len(found):.1f} |"
        )


if __name__ == "__main__":
    main()
