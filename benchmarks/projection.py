"""The starts of a student after equal training: random, two published prunings, weights-only and calibrated
projection.

    python benchmarks/projection.py --json projection.json    # the README's table, three seeds; over an hour on two cores
    python benchmarks/projection.py --quick                   # about a minute: one shape, one seed, a few steps

Every start is trained on the tiny teacher's guided velocity with identical batches, at its best learning rate of
Muon over the whole horizon (on the first shape of each width, by a seed of its own). Rows
already in --json FILE are not run again.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wanlite.student.shape import DEFAULT_EXPERT

STARTS = ("random", "selection", "importance", "weights_only", "calibrated")
SHAPES = (
    "64x4x2",
    "64x4x4",
    "48x2x2",
    "48x2x3",
    "24x2x1",
    "24x2x2",
)  # width x blocks x heads; the teacher has 128 x 4 x 4
RATES = (0.03, 0.1, 0.3)  # of Muon; AdamW, for the rest, has the default's
TUNING_SEED = 100


def main():
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
        help="which expert is projected",
    )
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="one = no tuning")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("outputs/projection"),
        help="where the teacher's trajectories are kept",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds, options.shapes, options.rates = (
            30,
            1,
            options.shapes[:1],
            options.rates[1:2],
        )
    print(
        f"comparing {len(options.starts)} starts x {len(options.shapes)} shapes x {options.seeds} seeds over "
        f"{options.steps} "
        f"steps; trajectories go to {options.folder}",
        flush=True,
    )
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    data = prepare(options.folder, 256 if options.quick else 4000)
    os.environ["TQDM_DISABLE"] = "1"  # the runs at once would write over each other's bars
    rows = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        rates = tune(pool, rows, options, data)
        jobs = [
            job(start, shape, seed, rates[start, width_of(shape)], expert, options, data)
            for seed in range(options.seeds)
            for shape in options.shapes
            for start in options.starts
            for expert in options.experts
            if expert == options.experts[0]
            or start == "weights_only"
            or (start, expert) == ("calibrated", "high")
        ]
        summarise(run_all(pool, rows, jobs, options))


def job(start, shape, seed, rate, expert, options, data):
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


def run_all(pool, rows, jobs, options):
    """Run the jobs that have no row yet, adding to `rows` and to the file as they end; returns the rows of
    all jobs.
    """

    def key(row):
        return json.dumps(
            [row[name] for name in ("start", "student", "expert", "seed", "rate", "steps", "batch")]
        )

    have = {key(row) for row in rows}
    missing = [job for job in jobs if key(job) not in have]
    for number, row in enumerate(pool.map(run, missing), 1):
        rows.append(row)
        errors = "  ".join(f"{step}: {error:.3f}" for step, error in row["error_at"].items())
        shape = "x".join(map(str, row["student"].values()))
        print(
            f"[{number}/{len(missing)}] {row['start']:>12} ({row['expert']}) {shape:>7} seed {row['seed']} "
            f"rate {row['rate']:g}  "
            f"{errors}  accuracy {row['accuracy']:.3f}  {row['seconds']:.1f} s",
            flush=True,
        )
        if options.json:
            partial = options.json.with_suffix(".partial")
            partial.write_text(json.dumps(rows, indent=1) + "\n")
            os.replace(partial, options.json)
    return [row for row in rows if key(row) in {key(job) for job in jobs}]


def tune(pool, rows, options, data):
    """Return {(start, width): the rate with the lowest error at the end}, by a seed that the table does not
    use.
    """
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
        }  # the last, best one stays
    else:
        rates = {(job["start"], job["student"]["hidden_size"]): job["rate"] for job in jobs}
    print(
        "learning rates of Muon:",
        ", ".join(f"{start} at width {width} {rate:g}" for (start, width), rate in rates.items()),
        flush=True,
    )
    return rates


def width_of(shape):
    return int(shape.split("x")[0])


# ---- training data of every run ----------------------------------------------------------------------------


def prepare(folder, num_trajectories):
    """Generate the teacher's trajectories once, as a training run does; returns their folder."""
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
        lambda said, has_features: guided(pack_text([embeddings[p] for p in said]), has_features),
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


def run(job):
    """Make a start, train it, and judge it; returns the row."""
    import torch
    from diffusers.training_utils import EMAModel

    import train_distillation as script
    from wanlite.data.autoencoder import load_autoencoder
    from wanlite.data.datasets import SeededBatches, Trajectories
    from wanlite.flow import make_scheduler
    from wanlite.network import pack_text
    from wanlite.planning.resolve import complete
    from wanlite.student.shape import student_shape
    from wanlite.teacher.checkpoint import open_teacher_files
    from wanlite.training.losses import velocity_loss
    from wanlite.training.metrics import prompt_accuracy
    from wanlite.training.optimizers import make_lr_schedulers, make_optimizers
    from wanlite.training.state import averaged_weights
    from wanlite.training.steps import velocity_from
    from wanlite.training.validation import ImageSampler, generate_images, relative_error

    torch.set_num_threads(1)
    cache = Path(job["data"])
    saved = torch.load(cache / "prompts.pt", weights_only=True)
    training, held_out, embeddings = saved["training"], saved["held_out"], saved["embeddings"]
    states = {
        part: Trajectories(cache / part, len(list((cache / part).glob("shard-*"))))
        for part in ("training", "held_out")
    }
    settings = replace(
        complete(script.Settings()),
        seed=job["seed"],
        learning_rate=2e-3,
        muon_learning_rate=job["rate"],
        max_train_steps=job["steps"],
        lr_warmup_steps=job["steps"] // 10,
    )
    files = open_teacher_files(settings.teacher)
    torch.manual_seed(job["seed"])
    student = script.WanLiteStudent(student_shape(files.config, **job["student"]))
    began = time.perf_counter()
    STARTERS[job["start"]](
        student, files, job["expert"], [embeddings[prompt] for prompt in training[:1024]], job["seed"]
    )
    seconds = time.perf_counter() - began
    optimizers = make_optimizers(settings, student)
    rates = make_lr_schedulers(settings, optimizers)
    ema, errors = EMAModel(student.parameters(), decay=0.995), {}

    def measure(step):
        with averaged_weights(ema, student):
            errors[str(step)] = round(
                relative_error(student, states["held_out"], embeddings, held_out, "cpu", lambda: None), 5
            )

    measure(0)
    for step, numbers in enumerate(
        SeededBatches(len(states["training"]), job["batch"], job["seed"], 0, job["steps"]), 1
    ):
        batch = states["training"].__getitems__(numbers)
        text = pack_text([embeddings[training[number]] for number in batch["prompt"].tolist()])
        velocity = velocity_from(student, text)(batch["latents"].float(), batch["timestep"])
        velocity_loss(velocity, batch["velocity"]).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
        for optimizer, rate in zip(optimizers, rates):
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
        ema.step(student.parameters())
        if step in (200, 400, 500, job["steps"]):
            measure(step)
    ema.copy_to(student.parameters())
    sampler = ImageSampler(
        load_autoencoder(settings.teacher), make_scheduler(settings.flow_shift), (16, 8, 8)
    )
    judged = prompt_accuracy(
        lambda prompts: generate_images(
            partial(velocity_from, student),
            [embeddings[prompt] for prompt in prompts],
            list(range(len(prompts))),
            settings.teacher_steps,
            sampler,
        ),
        held_out[:200],
    )
    return {name: value for name, value in job.items() if name != "data"} | {
        "error_at": errors,
        "accuracy": judged["accuracy"],
        "seconds": round(seconds, 2),
        "parameters": student.num_parameters(),
    }


# ---- the starts --------------------------------------------------------------------------------------------


def random_start(student, files, expert, embeddings, seed):
    pass


def weights_only(student, files, expert, embeddings, seed):
    import torch

    from wanlite.student.projection import choose_experts, project

    project(student, choose_experts(files, expert), torch.cat(embeddings))


def calibrated(student, files, expert, embeddings, seed):
    import torch

    from wanlite.network import pack_text
    from wanlite.student.calibration import calibrate, choose_channels, make_frames
    from wanlite.student.projection import choose_experts, project

    (expert,) = choose_experts(files, expert)
    frames = make_frames(expert, pack_text(embeddings), (8, 8), seed=seed)
    report = project(
        student, [expert], torch.cat(embeddings), choose_channels(expert, frames, student.config.hidden_size)
    )
    calibrate(student, expert, report, frames)


def selection(student, files, expert, embeddings, seed):
    """Evenly spaced rows and columns of evenly spaced blocks.

    Source: weight selection (Xu et al., ICLR 2024).
    """
    slice_into(student, files.experts[expert], lambda name, dimension, few, many: evenly(few, many))


def importance(student, files, expert, embeddings, seed):
    """The channels, heads and neurons that are most active, of evenly spaced blocks; whole heads or rotary
    pairs of them, slicing and nothing else. Source: Minitron (Muralidharan et al. 2024), activations over
    calibration frames."""
    import torch

    from wanlite.network import one_frame_velocity, pack_text
    from wanlite.student.calibration import make_frames
    from wanlite.student.pruning import _rotary_rows, top_indices
    from wanlite.teacher.model import load_expert

    files, active = files.experts[expert], {}
    network = load_expert(files)

    def watch(name, module):
        def add(module, inputs, output):
            active[name] = active.get(name, 0) + inputs[0].detach().flatten(0, -2).abs().mean(0)

        module.register_forward_hook(add)

    for index, block in enumerate(network.blocks):
        watch(f"{index}.channels", block.attn1.to_q)
        for name in ("attn1", "attn2"):
            watch(f"{index}.{name}", getattr(block, name).to_out[0])
        watch(f"{index}.ffn", block.ffn.net[2])
    frames = make_frames(files, pack_text(embeddings[:256]), (8, 8), seed=seed)
    with torch.no_grad():
        one_frame_velocity(network, frames.latents, frames.timestep, *frames.text)
    config, head_dim = student.config, files.config["attention_head_dim"]
    size = config.hidden_size // config.num_heads
    channels = top_indices(
        sum(score for name, score in active.items() if name.endswith("channels")), config.hidden_size
    )

    def head_rows(block, attention):
        heads = top_indices(
            active[f"{block}.{attention}"].unflatten(0, (-1, head_dim)).square().sum(1), config.num_heads
        )
        layers = {
            kind: (
                files.read(f"blocks.{block}.{attention}.to_{kind}.weight"),
                files.read(f"blocks.{block}.{attention}.to_{kind}.bias"),
            )
            for kind in "qk"
        }
        places = [head * head_dim + torch.arange(head_dim) for head in heads.tolist()]
        return torch.cat([rows[_rotary_rows(layers, rows, size, attention == "attn1")] for rows in places])

    def choose(name, dimension, few, many):
        part = name.split(".")
        if few == many:
            return torch.arange(many)
        if (
            part[0] == "blocks"
            and part[2] in ("attn1", "attn2")
            and (part[3].startswith("norm") or (part[3] == "to_out") == (dimension == 1))
        ):
            return head_rows(part[1], part[2])
        if part[0] == "blocks" and part[2] == "ffn" and (dimension == 0) == (part[4] == "0"):
            return top_indices(active[f"{part[1]}.ffn"], few)
        if "time_proj" in name and dimension == 0:
            return (torch.arange(6)[:, None] * files.width + channels).flatten()
        return channels

    slice_into(student, files, choose)


def slice_into(student, files, choose):
    """Fill a student with slices of the tensors of evenly spaced blocks; `choose` names the indices kept of
    each dimension.
    """
    import torch

    blocks = evenly(student.config.depth, files.config["num_layers"]).tolist()
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            part = name.split(".")
            theirs = (
                ".".join([part[0], str(blocks[int(part[1])]), *part[2:]]) if part[0] == "blocks" else name
            )
            found = files.read(theirs)
            for dimension, (few, many) in enumerate(zip(tensor.shape, found.shape)):
                kept = choose(theirs, dimension, few, many)
                found = found.index_select(dimension, kept) if few != many else found
            tensor.copy_(found)


def evenly(few, many):
    import torch

    return torch.linspace(0, many - 1, few).round().long()


STARTERS = {
    "random": random_start,
    "selection": selection,
    "importance": importance,
    "weights_only": weights_only,
    "calibrated": calibrated,
}


# ---- the table ---------------------------------------------------------------------------------------------


def summarise(rows):
    """Print the README's table: mean and range over seeds."""
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
