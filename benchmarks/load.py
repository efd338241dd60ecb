"""Measure the loading of a saved student beside three alternatives, and the time until run_inference.py samples.

    python benchmarks/load.py
    python benchmarks/load.py --quick --json load.json

Prints one table, then the ratios of the slower dtype. A student of 0.3 B with random weights is saved in float32 and
in bfloat16. Each way to load it runs in new processes, in turns, after its imports and with the file in the page
cache:

wanlite  WanLiteStudent.from_pretrained: header checked against the config, every weight checked to be finite
stock    ModelMixin.from_pretrained on the same class and folder, like every model of diffusers
bare     build the module, read the safetensors file, copy it into the module
lean     build the module on the meta device, map the safetensors file, assign the mapped tensors without a check

"First read" is the time until every weight has been read once, because a mapped file is read when it is used. "Peak"
is the largest resident memory, without that before loading, over the bytes of the weights. "Own" is its part outside
of files.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
Figures = dict[str, float]  # of one process
Medians = dict[tuple[str, str], Figures]  # by (dtype, way)

WAYS = ("ours", "stock", "bare", "lean")
PRINTED = {"ours": "wanlite"}  # {way: its name in the table}
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZES: dict[bool, dict[str, int]] = {False: {}, True: {"hidden_size": 256, "depth": 4, "num_heads": 4}}
SHORT_RUN = (
    "--num_trajectories",
    "32",
    "--max_train_steps",
    "2",
    "--train_batch_size",
    "16",
    "--num_held_out",
    "16",
    "--rollout_states",
    "0",
    "--validation_trajectories",
    "8",
    "--teacher_steps",
    "8",
    "--report_to",
    "none",
)
IMPORTS = """
import os
import numpy, torch, safetensors.torch, tqdm
from PIL import Image
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel
os._exit(0)
"""
FIRST_STEP = """
import os, runpy, sys
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
from torch.nn.modules.module import register_module_forward_pre_hook
from train_distillation import WanLiteStudent
register_module_forward_pre_hook(lambda module, _: os._exit(0) if isinstance(module, WanLiteStudent) else None)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def read_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9, help="processes per way and dtype")
    parser.add_argument("--quick", action="store_true", help="a small student in one dtype, each way once")
    parser.add_argument(
        "--folder",
        type=Path,
        help="new folder for the students (default: a temporary one, removed at the end)",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)  # in a process of this script
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}, expected at least 1.")
    if (
        arguments.folder
        and not arguments.one
        and arguments.folder.exists()
        and any(arguments.folder.iterdir())
    ):
        parser.error(f"--folder {arguments.folder} is not empty. Name a new one.")
    return arguments


# ---- one way, once -----------------------------------------------------------------------------------------


def memory(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name)
    )


def load_once(way: str, folder: Path) -> None:
    """Load the student in one way and print time and memory."""
    import torch

    load = loaders(folder)[way]
    torch.empty(1).sum()  # torch's own set-up is not measured
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    resident, own = memory("VmRSS:"), memory("RssAnon:")
    began = time.perf_counter()
    student = load()
    seconds = time.perf_counter() - began
    peak, own = memory("VmHWM:") - resident, memory("RssAnon:") - own
    for parameter in student.parameters():
        parameter.detach().sum()
    touched = time.perf_counter() - began
    total = sum(parameter.detach().sum(dtype=torch.float64).item() for parameter in student.parameters())
    size = sum(parameter.nbytes for parameter in student.parameters())
    print(
        json.dumps(
            {"seconds": seconds, "touched": touched, "peak": peak / size, "own": own / size, "total": total}
        )
    )


def loaders(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return {way: function that loads the student}."""
    import torch
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import ModelMixin
    from safetensors.torch import load_file

    from train_distillation import WanLiteStudent

    dtype = torch.bfloat16 if folder.name == "bfloat16" else torch.float32
    config = json.loads((folder / "config.json").read_text())

    def ours():
        return WanLiteStudent.from_pretrained(folder)

    def stock():
        return ModelMixin.from_pretrained.__func__(WanLiteStudent, folder, torch_dtype=dtype)

    def bare():
        student = WanLiteStudent(config).to(dtype)
        student.load_state_dict(load_file(folder / WEIGHTS), strict=True)
        return student.eval()

    def lean():
        with init_empty_weights():
            student = WanLiteStudent(config)
        student.load_state_dict(load_file(folder / WEIGHTS), strict=True, assign=True)
        return student.eval()

    return {"ours": ours, "stock": stock, "bare": bare, "lean": lean}


# ---- all ways ----------------------------------------------------------------------------------------------


def save_students(folder: Path, dtypes: Sequence[str], is_quick: bool) -> float:
    """Save a student with random weights in each dtype; returns its parameters in millions."""
    import torch

    from train_distillation import WanLiteStudent

    torch.manual_seed(0)
    student = WanLiteStudent(**SIZES[is_quick])
    student.proj_out.reset_parameters()  # zero in a new student
    for name in dtypes:
        student.to(getattr(torch, name)).save_pretrained(folder / name)
    return student.num_parameters() / 1e6


def measure_loading(folder: Path, dtypes: Sequence[str], repeats: int) -> dict[str, dict[str, list[Figures]]]:
    """Return {dtype: {way: figures of each process}}; the ways take turns."""
    from tqdm import tqdm

    found: dict[str, dict[str, list[Figures]]] = {dtype: {way: [] for way in WAYS} for dtype in dtypes}
    jobs = [(dtype, way) for _ in range(repeats) for dtype in found for way in WAYS]
    for dtype, way in tqdm(jobs, desc="loading", unit="process"):
        (folder / dtype / WEIGHTS).read_bytes()  # into the page cache
        process = subprocess.run(
            [sys.executable, __file__, "--one", way, "--folder", folder / dtype],
            check=True,
            capture_output=True,
            text=True,
        )
        found[dtype][way].append(json.loads(process.stdout.splitlines()[-1]))
    for dtype, ways in found.items():
        totals = [row["total"] for rows in ways.values() for row in rows]
        if max(totals) - min(totals) > 1e-9 * abs(totals[0]):
            raise SystemExit(
                f"load.py: found different weights in {dtype}, with the sums {totals}, expected equal ones"
            )
    return found


def measure_start(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of the bare imports, and from the start of run_inference.py to its first sampling step."""
    subprocess.run(
        [sys.executable, ROOT / "train_distillation.py", "--output_dir", folder / "run", *SHORT_RUN],
        check=True,
        capture_output=True,
    )
    commands = {
        "imports": [sys.executable, "-c", IMPORTS],
        "start": [
            sys.executable,
            "-c",
            FIRST_STEP,
            ROOT,
            ROOT / "run_inference.py",
            "--model",
            folder / "run",
            "--output_dir",
            folder / "images",
            "--prompt",
            "a small red circle",
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def summarise(found: Mapping[str, Mapping[str, list[Figures]]]) -> Medians:
    """Print the table; returns the medians by (dtype, way)."""
    print("\n| weights | way | seconds | first read | peak | own |\n|---|---|---|---|---|---|")
    medians = {}
    for dtype, ways in found.items():
        for way, rows in ways.items():
            middle = medians[dtype, way] = {
                name: statistics.median(row[name] for row in rows) for name in rows[0]
            }
            low, high = (f"{function(row['seconds'] for row in rows):.3f}" for function in (min, max))
            print(
                f"| {dtype} | {PRINTED.get(way, way)} | {middle['seconds']:.3f} ({low} to {high}) | "
                f"{middle['touched']:.3f} | {middle['peak']:.2f} | {middle['own']:.2f} |"
            )
    return medians


def compare(medians: Medians, dtypes: Sequence[str], start: Mapping[str, float], millions: float) -> dict:
    """Return the figures of --json: ratios of the slower dtype, and the seconds until the first step."""

    def worst(name, way, over=None):
        return max(
            medians[dtype, way][name] / (medians[dtype, over][name] if over else 1) for dtype in dtypes
        )

    return {
        "over_bare": worst("seconds", "ours", "bare"),
        "over_stock": worst("seconds", "ours", "stock"),
        "over_lean": worst("seconds", "ours", "lean"),
        "touched_over_stock": worst("touched", "ours", "stock"),
        "touched_over_lean": worst("touched", "ours", "lean"),
        "peak_over_weights": worst("peak", "ours"),
        "start_over_imports": start["start"] / start["imports"],
        "million_parameters": millions,
        "seconds_to_start": dict(start),
    }


def print_summary(figures: Mapping[str, Any]) -> None:
    """Print the ratios, and the seconds until the first sampling step."""
    start = figures["seconds_to_start"]
    print(
        f"\nwanlite, in the slower dtype: {figures['over_bare']:.2f} x bare, {figures['over_stock']:.2f} x stock, "
        f"{figures['over_lean']:.2f} x lean; first read {figures['touched_over_stock']:.2f} x stock, "
        f"{figures['touched_over_lean']:.2f} x lean; peak {figures['peak_over_weights']:.2f} x the weights "
        f"({figures['million_parameters']:.0f} M)\n"
        f"run_inference.py takes its first sampling step after {start['start']:.1f} s, "
        f"{figures['start_over_imports']:.2f} x the {start['imports']:.1f} s of its bare imports"
    )


def main() -> int:
    """Measure all ways to load a student, and the start of run_inference.py; or load it once."""
    arguments = read_arguments()
    if arguments.one:
        load_once(arguments.one, arguments.folder)
        return 0
    repeats, dtypes = (1, ("bfloat16",)) if arguments.quick else (arguments.repeats, ("float32", "bfloat16"))
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="load-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(
        f"loading a student in {len(WAYS)} ways, {repeats} times each in {' and '.join(dtypes)}; writing to "
        f"{folder}",
        flush=True,
    )
    millions = save_students(folder, dtypes, arguments.quick)
    medians = summarise(measure_loading(folder, dtypes, repeats))
    start = {name: statistics.median(each) for name, each in measure_start(folder, repeats).items()}
    figures = compare(medians, dtypes, start, millions)
    print_summary(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if not arguments.folder:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
