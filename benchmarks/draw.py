"""Measure a whole image, from a prompt to a PNG file, beside diffusers' own pipeline with equal weights.

    python benchmarks/draw.py                       # minutes; 1024 px need --sides 256 512 1024
    python benchmarks/draw.py --quick --json draw.json

Students with random weights are saved: the tiny one, with the tiny teacher's components, and one of 1024 x 16 with an
autoencoder of Wan2.1's shape. Both have the tiny teacher's text encoder, and each image takes 4 steps.

cold   CPU seconds of a process that loads the student, draws and writes one image: run_inference.py, or a WanPipeline
warm   median CPU seconds of a further image in one process; on a GPU, seconds
peak   largest resident memory of the cold process in MiB; on a GPU, torch's largest allocation of the warm one
off    largest difference of the warm image to that of stock in float32, of 255
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TINY_TEACHER = ROOT / "tiny_teacher"
PROMPT = "a small red circle at the left on a white background"
STEPS = 4
WAYS = {"stock": "float32", "wanlite": "float32", "wanlite bf16": "bfloat16"}  # {way: dtype}
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "depth": 4, "num_heads": 2},
    "1024 x 16": {"hidden_size": 1024, "depth": 16, "num_heads": 16},
}


def read_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], help="pixels, of 1024 x 16")
    parser.add_argument("--repeats", type=int, default=5, help="processes, and images in one process")
    parser.add_argument("--quick", action="store_true", help="the tiny student, each figure once")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)  # in a process of this script
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--image", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeats < 1 and not options.one:
        parser.error(f"--repeats {options.repeats}, expected at least 1.")
    return options


# ---- students ----------------------------------------------------------------------------------------------


def save_student(folder: Path, name: str) -> None:
    """Save a student with random weights and its components."""
    import torch
    from diffusers import AutoencoderKLWan

    from train_distillation import WanLiteStudent
    from wanlite.flow import make_scheduler
    from wanlite.training.run_folder import save_components

    torch.manual_seed(0)
    components = folder.with_name(f"{folder.name} components")
    components.mkdir(parents=True)
    for part in ("text_encoder", "tokenizer", "model_index.json"):
        (components / part).symlink_to(TINY_TEACHER / part)
    if name == "tiny":
        (components / "vae").symlink_to(TINY_TEACHER / "vae")
    else:
        AutoencoderKLWan().save_pretrained(components / "vae")
    student = WanLiteStudent(**SHAPES[name], num_channels=16, text_dim=64)
    student.proj_out.reset_parameters()  # zero in a new student
    student.save_pretrained(folder)
    save_components(folder, components, make_scheduler(3.0, (1, 2, STEPS)))


# ---- one way, in a process of its own ----------------------------------------------------------------------


def stock_images(folder: Path, side: int, device: str) -> Callable[[], Any]:
    """Return a function that draws an image with diffusers alone: (height, width, 3), 0..255."""
    import torch
    from diffusers import WanPipeline, WanTransformer3DModel

    network = WanTransformer3DModel.from_pretrained(folder)
    pipeline = WanPipeline.from_pretrained(folder, transformer=network).to(device)
    pipeline.set_progress_bar_config(disable=True)
    stride = pipeline.vae.config.scale_factor_spatial

    def draw() -> Any:
        noise = torch.randn(16, side // stride, side // stride, generator=torch.Generator().manual_seed(0))
        sizes = {"height": side, "width": side, "num_frames": 1, "num_inference_steps": STEPS}
        latents = noise[None, :, None].to(device)
        frames = pipeline(PROMPT, guidance_scale=1.0, latents=latents, output_type="np", **sizes).frames
        return (255 * frames[0, 0]).round().astype("uint8")

    return draw


def own_images(folder: Path, side: int, device: str, dtype: str) -> Callable[[], Any]:
    """Return a function that draws an image as run_inference.py does: (height, width, 3), 0..255."""
    from wanlite.generation.student import StudentPipeline

    pipeline = StudentPipeline(folder, device, dtype)
    return lambda: pipeline.generate([PROMPT], [0], STEPS, side, side)[0]


def draw_once(options: argparse.Namespace) -> None:
    """Draw and write one image, then time the --repeats further ones and print their figures."""
    side, is_gpu = options.sides[0], options.device == "cuda"
    if options.one == "stock":
        draw = stock_images(options.folder, side, options.device)
    else:
        draw = own_images(options.folder, side, options.device, WAYS[options.one])
    from PIL import Image

    Image.fromarray(draw()).save(options.image)
    clock, seconds = time.perf_counter if is_gpu else time.process_time, []
    for _ in range(options.repeats):
        began = clock()
        draw()  # the image is on the CPU, so that the device is idle
        seconds.append(clock() - began)
    if seconds:
        import torch

        peak = torch.cuda.max_memory_allocated() / 2**20 if is_gpu else None
        print(json.dumps({"warm": statistics.median(seconds), "peak": peak}))


# ---- all ways ----------------------------------------------------------------------------------------------


def run(command: list[Any]) -> tuple[float, float, str]:
    """Run a command; returns its CPU seconds, its largest resident memory in MiB, and its output."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"draw.py: exit code {process.returncode} of {' '.join(map(str, command))}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, printed


def command(options: argparse.Namespace, way: str, folder: Path, side: int, repeats: int) -> list[Any]:
    """Return the command that draws one image, and `repeats` further ones, into the folder beside the student."""
    device = ("--device", options.device)
    if way != "stock" and not repeats:
        flags = ["--model", folder, "--prompt", PROMPT, "--output_dir", folder.parent / "images", *device]
        sizes = ["--height", str(side), "--width", str(side), "--num_inference_steps", str(STEPS)]
        return [sys.executable, ROOT / "run_inference.py", *flags, *sizes, "--dtype", WAYS[way]]
    flags = ["--one", way, "--folder", folder, "--sides", str(side), "--repeats", str(repeats), *device]
    return [sys.executable, __file__, *flags, "--image", folder.parent / f"{way}.png"]


def measure(options: argparse.Namespace, name: str, folder: Path, side: int) -> list[dict[str, Any]]:
    """Return a row for each way; the ways take turns."""
    import numpy as np
    from PIL import Image

    repeats = 1 if options.quick else options.repeats
    cold: dict[str, list] = {way: [] for way in WAYS}
    for _ in range(repeats if name == "tiny" else 1):
        for way in WAYS:
            cold[way].append(run(command(options, way, folder, side, 0))[:2])
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        warm = json.loads(run(command(options, way, folder, side, repeats))[2].splitlines()[-1])
        images = [np.asarray(Image.open(folder.parent / f"{each}.png"), int) for each in (way, "stock")]
        seconds, peak = map(statistics.median, zip(*cold[way]))
        rows.append({"student": name, "side": side, "way": way, "cold": seconds, "peak": peak})
        rows[-1] |= {name: value for name, value in warm.items() if value is not None}
        rows[-1]["off"] = int(abs(images[0] - images[1]).max())
        print_row(rows[-1], rows[0])
    return rows


def print_row(row: dict[str, Any], stock: dict[str, Any]) -> None:
    """Print the figures of a way, with their ratios to stock."""
    cells = [f"{row[name]:.2f} ({row[name] / stock[name]:.2f})" for name in ("cold", "warm")]
    cells.append(f"{row['peak']:.0f} ({row['peak'] / stock['peak']:.2f})")
    print(
        f"| {row['student']} | {row['side']} | {row['way']} | {' | '.join(cells)} | {row['off']} |",
        flush=True,
    )


def main() -> int:
    """Measure all ways for each student and size, or one way."""
    options = read_arguments()
    if options.one:
        draw_once(options)
        return 0
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("draw.py: --device cuda: no CUDA device was found. Leave the flag out.", file=sys.stderr)
            return 2
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    sizes = {"tiny": [64]} if options.quick else {"tiny": [64], "1024 x 16": options.sides}
    print(f"drawing with {len(sizes)} students on {options.device}; in brackets: over stock\n")
    print(
        "| student | px | way | cold (s) | warm (s) | peak (MiB) | off |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="draw-") as place:
        for name, sides in sizes.items():
            save_student(Path(place) / name, name)
            for side in sides:
                rows += measure(options, name, Path(place) / name, side)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
