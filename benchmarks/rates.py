"""Learning rates over width: the change of the output in one step, and a grid of peaks.

    python benchmarks/rates.py --json rates.json             # all of it; an hour or more on one core, resumable
    python benchmarks/rates.py --quick --json rates.json     # less than a minute
    python benchmarks/rates.py --only check                  # the first step alone, a few minutes

check   one step at the peak rates, without warm-up, of a student of each width and text width. `change` is the
        RMS of the change of its velocity over the RMS of the teacher's velocity; "all" is the change with the new
        weights of all groups, the others that with the new weights of one group. `update` is the RMS of the step
        over the RMS of the weights. `rates` are "scaled" (those of a run) or "constant" (the peaks at every width).
grid    a regression to a teacher at each pair of peaks, at widths 64, 256 and 768: the relative squared error on
        other states after the last step of a cosine schedule.

Start "random" is that of --projection none, but with an output layer as in a stock model: from the zero output of
a run only that layer moves. Start "projected" is projected from a random teacher of twice the width, whose residual
channels fall in size. Rows that are already in the --json file are not computed again.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from train_distillation import Settings, WanLiteStudent
from wanlite.files.atomic import write_json
from wanlite.network import TextTokens, pack_text
from wanlite.student.projection import project
from wanlite.teacher.expert_files import ExpertFiles
from wanlite.teacher.model import make_expert, run_expert
from wanlite.training.optimizers import make_lr_schedulers, make_optimizers

# Legend: B states of a batch, C channels, H W latent height and width, T text width.
DEPTH, HEAD_DIM, CHANNELS, SIDE = 2, 32, 16, 8
FALLING, GAIN = (
    0.25,
    4,
)  # of a teacher: exponent of the sizes of its channels; factor of what its blocks write
WORDS, PROMPT_LENGTH = 64, 6  # distinct text tokens; tokens of a prompt
CHECK_ROWS, HELD_OUT_ROWS, HELD_OUT_SEED = 16, 128, 1000
WIDTHS, TEXT_DIMS = (64, 256, 512, 1024), (64, 4096)
ADAMW_PEAKS, MUON_PEAKS = (1e-3, 3e-3, 9e-3), (0.03, 0.09, 0.27)
GRID = {  # width: text width, states of a step, steps
    64: (64, 32, 200),
    256: (1024, 32, 80),
    768: (4096, 32, 30),
}
QUICK_GRID = {64: (64, 16, 20)}
DEFAULT = (Settings.learning_rate, Settings.muon_learning_rate)
STARTS = ("random", "projected")
STUDENT = ("start", "text", "rates", "width")  # columns of the tables


@dataclass
class States:
    """Noisy latents (B, C, H, W), timesteps (B,), text, and a teacher's velocity there (B, C, H, W)."""

    latents: Tensor
    timestep: Tensor
    text: TextTokens
    velocity: Tensor

    def loss(self, student: Any) -> Tensor:
        """Return the squared error of the student's velocity over the power of the teacher's."""
        return (self.of(student) - self.velocity).square().mean() / self.velocity.square().mean()

    def of(self, student: Any) -> Tensor:
        return student(self.latents, self.timestep, self.text, return_dict=False)[0]


# ---- teacher and students ----------------------------------------------------------------------------------


class ExpertInMemory(ExpertFiles):
    """An expert whose tensors lie in memory instead of files."""

    tensors: dict[str, Tensor]

    def read(self, name, dtype=torch.float32, rows=None, device="cpu"):
        tensor = self.tensors[name]
        return (tensor if rows is None else tensor[rows]).to(device, dtype).clone()

    @property
    def num_bytes(self):
        return 4 * self.num_parameters


def teacher_config(width: int, text_dim: int) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": text_dim,
        "freq_dim": 256,
        "ffn_dim": 4 * width,
        "num_layers": DEPTH,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 64,
        "pos_embed_seq_len": None,
    }


@torch.no_grad()
def make_teacher(width: int, text_dim: int, seed: int) -> tuple[ExpertInMemory, Any]:
    """Return a random teacher as files to project from and as a network; its residual channels fall in size."""
    torch.manual_seed(seed)
    files = ExpertInMemory("only", Path(), teacher_config(width, text_dim), {})
    network = make_expert(files, DEPTH).eval().requires_grad_(False)
    falling = torch.arange(1, width + 1).float()[torch.randperm(width)] ** -FALLING
    falling /= falling.square().mean().sqrt()
    for name, weight in network.named_parameters():
        if name.endswith("scale_shift_table"):
            weight.normal_(std=width**-0.5)
        elif name.startswith("patch_embedding") or "to_out" in name or "ffn.net.2" in name:
            gain = GAIN if name.startswith("blocks") and weight.ndim == 2 else 1
            weight.mul_(gain * falling.view(-1, *[1] * (weight.ndim - 1)))
    files.tensors = network.state_dict()
    files.places = {name: (Path(), name, tuple(tensor.shape)) for name, tensor in files.tensors.items()}
    return files, network


def make_student(width: int, text_dim: int, files: ExpertInMemory | None, seed: int) -> WanLiteStudent:
    """Return a student projected from `files`, or a random one."""
    torch.manual_seed(seed)
    student = WanLiteStudent(
        hidden_size=width,
        depth=DEPTH,
        num_heads=width // HEAD_DIM,
        num_channels=CHANNELS,
        text_dim=text_dim,
        rope_max_seq_len=64,
    )
    if files is None:
        student.proj_out.reset_parameters()
    else:
        project(student, [files])
    return student


def make_states(teacher: Any, text_dim: int, rows: int, seed: int) -> States:
    """Return random states of random prompts; the vocabulary is the same for every seed."""
    vocabulary = torch.randn(WORDS, text_dim, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed + 1)
    prompts = torch.randint(0, WORDS, (rows, PROMPT_LENGTH), generator=draw)
    text = pack_text(list(vocabulary[prompts]))
    latents = torch.randn(rows, CHANNELS, SIDE, SIDE, generator=draw)
    timestep = 1000 * torch.rand(rows, generator=draw)
    with torch.no_grad():
        return States(latents, timestep, text, run_expert(teacher, latents, timestep, text)[0])


def teacher_width(width: int) -> int:
    return 2 * width


# ---- the first step ----------------------------------------------------------------------------------------


def first_step(
    student: WanLiteStudent, states: States, is_constant: bool = False
) -> dict[str, dict[str, float]]:
    """Return {group: its change and update} of one step at the peak rates, see the top of this file.

    `is_constant` gives every group the peak of its optimizer. The student's weights are those before the step
    afterwards.
    """
    settings, weights = Settings(), dict(student.named_parameters())
    optimizers = make_optimizers(settings, student)
    before, velocity = {name: weight.detach().clone() for name, weight in weights.items()}, states.of(student)
    states.loss(student).backward()
    for optimizer, peak in zip(optimizers, DEFAULT):
        for group in optimizer.param_groups if is_constant else ():
            group["lr"] = peak
        optimizer.step()
        optimizer.zero_grad()
    after = {name: weight.detach().clone() for name, weight in weights.items()}
    names = {id(weight): name for name, weight in weights.items()}
    groups = defaultdict(list)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        groups[group["role"]] += [names[id(weight)] for weight in group["params"]]
    found = {}
    for group, members in {"all": list(weights), **groups}.items():
        student.load_state_dict(before | {name: after[name] for name in members})
        found[group] = {
            "change": _rms([(states.of(student) - velocity).detach()]) / _rms([states.velocity]),
            "update": _rms([after[name] - before[name] for name in members])
            / _rms([before[name] for name in members]),
        }
    student.load_state_dict(before)
    return found


def _rms(tensors):
    power = sum(tensor.square().sum().item() for tensor in tensors)
    return math.sqrt(power / sum(tensor.numel() for tensor in tensors))


def check(width: int, text_dim: int, start: str, seed: int = 0) -> list[dict[str, Any]]:
    """Return the rows of the check for one student, by group, at scaled and at constant rates."""
    files, teacher = make_teacher(teacher_width(width), text_dim, seed)
    student = make_student(width, text_dim, files if start == "projected" else None, seed)
    states = make_states(teacher, text_dim, CHECK_ROWS, seed)
    return [
        {
            "kind": "check",
            "width": width,
            "text_dim": text_dim,
            "start": start,
            "rates": rates,
            "group": group,
            **{name: round(figure, 4) for name, figure in figures.items()},
        }
        for rates in ("scaled", "constant")
        for group, figures in first_step(student, states, rates == "constant").items()
    ]


# ---- the grid ----------------------------------------------------------------------------------------------


class Regression:
    """The states and the start of one width and seed, which all pairs of peaks share."""

    def __init__(self, width, text_dim, rows, steps, seed):
        files, teacher = make_teacher(teacher_width(width), text_dim, seed)
        self.steps, self.start = steps, make_student(width, text_dim, files, seed)
        self.batches = [
            make_states(teacher, text_dim, rows, 10_000 * (seed + 1) + step) for step in range(steps)
        ]
        self.held_out = make_states(teacher, text_dim, HELD_OUT_ROWS, HELD_OUT_SEED)
        self.weights = {name: tensor.clone() for name, tensor in self.start.state_dict().items()}

    def train(self, adamw, muon) -> dict[str, float]:
        """Return the held-out error before and after training at these peaks, and the seconds."""
        student, began = self.start, time.perf_counter()
        student.load_state_dict(self.weights)
        settings = replace(
            Settings(),
            learning_rate=adamw,
            muon_learning_rate=muon,
            max_train_steps=self.steps,
            lr_warmup_steps=self.steps // 10,
        )
        optimizers = make_optimizers(settings, student)
        lr_schedulers, before = make_lr_schedulers(settings, optimizers), self.error()
        for states in self.batches:
            states.loss(student).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
            for optimizer, lr_scheduler in zip(optimizers, lr_schedulers):
                optimizer.step()
                optimizer.zero_grad()
                lr_scheduler.step()
        return {"start": before, "error": self.error(), "seconds": round(time.perf_counter() - began, 1)}

    @torch.no_grad()
    def error(self) -> float:
        return round(self.held_out.loss(self.start).item(), 5)


# ---- rows --------------------------------------------------------------------------------------------------


def jobs_of(options) -> list[dict[str, Any]]:
    """Return the checks and the cells of the grid in order, each as the part of its rows that is known before."""
    widths, text_dims = ((64, 128), (64,)) if options.quick else (WIDTHS, TEXT_DIMS)
    checks = [
        {"kind": "check", "width": width, "text_dim": text_dim, "start": start}
        for start, text_dim, width in product(STARTS, text_dims, widths)
    ]
    others = (
        [] if options.quick else [peaks for peaks in product(ADAMW_PEAKS, MUON_PEAKS) if peaks != DEFAULT]
    )
    grid = [
        {"kind": "grid", "width": width, "seed": seed, "adamw": adamw, "muon": muon}
        | dict(zip(("text_dim", "batch", "steps"), sizes))
        for seed in range(1 if options.quick else options.seeds)
        for width, sizes in (QUICK_GRID if options.quick else GRID).items()
        if width in options.widths
        for adamw, muon in [DEFAULT, *others]
    ]
    return [job for job in checks + grid if options.only in (None, job["kind"])]


def compute(jobs: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path | None) -> None:
    """Add the rows of the jobs to `rows`, and write the file after each."""
    regression: tuple[tuple, Regression] | None = None
    for number, job in enumerate(jobs, 1):
        if any(job.items() <= row.items() for row in rows):
            continue
        if job["kind"] == "check":
            rows += check(job["width"], job["text_dim"], job["start"])
        else:
            sizes = tuple(job[name] for name in ("width", "text_dim", "batch", "steps", "seed"))
            if regression is None or regression[0] != sizes:
                regression = sizes, Regression(*sizes)
            rows.append(job | regression[1].train(job["adamw"], job["muon"]))
        print(f"{number} of {len(jobs)}: {describe(rows[-1] if job['kind'] == 'grid' else job)}", flush=True)
        if path:
            write_json(path, rows)


def describe(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items() if name != "kind")


# ---- tables ------------------------------------------------------------------------------------------------


def print_checks(rows: list[dict[str, Any]], figure: str) -> None:
    """Print `figure` by group, a line for each student and rates."""
    groups = [*dict.fromkeys(row["group"] for row in rows)]
    lines: dict[tuple, dict[str, float]] = defaultdict(dict)
    for row in rows:
        lines[row["start"], row["text_dim"], row["rates"], row["width"]][row["group"]] = row[figure]
    print(f"\n{figure} in the first step\n" + "".join(f"{name:>10}" for name in [*STUDENT, *groups]))
    for student, found in sorted(lines.items()):
        figures = "".join(f"{found[group]:>10.4f}" for group in groups)
        print("".join(f"{each:>10}" for each in student) + figures)


def print_grid(rows: list[dict[str, Any]]) -> None:
    """Print the mean error of each pair of peaks over its seeds, and the default's over the best."""
    errors: dict[int, dict[tuple[float, float], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        errors[row["width"]][row["adamw"], row["muon"]].append(row["error"])
    for width, cells in sorted(errors.items()):
        means = {peaks: mean(found) for peaks, found in sorted(cells.items())}
        print(f"\nwidth {width}: error after training, at the peaks of AdamW / Muon")
        for (adamw, muon), error in means.items():
            print(f"{adamw:>8g} / {muon:<5g} {error:.5f}  ({len(cells[adamw, muon])} seeds)")
        if DEFAULT in means:
            print(f"default over best: {means[DEFAULT] / min(means.values()):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two widths and one cell, less than a minute")
    parser.add_argument("--only", choices=("check", "grid"), help="compute one of the two")
    parser.add_argument("--widths", nargs="+", type=int, default=[*GRID], help="of the grid")
    parser.add_argument("--seeds", type=int, default=3, help="of the grid")
    parser.add_argument("--json", type=Path, help="rows are read from there, and written after each student")
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # bars of the projections
    torch.set_num_threads(1)
    jobs = jobs_of(options)
    print(
        f"computing {len(jobs)} checks and cells, rows go to {options.json or 'the tables alone'}", flush=True
    )
    rows = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    compute(jobs, rows, options.json)
    checks, grid = ([row for row in rows if row["kind"] == kind] for kind in ("check", "grid"))
    for figure in ("change", "update") if checks else ():
        print_checks(checks, figure)
    print_grid(grid)


if __name__ == "__main__":
    main()
