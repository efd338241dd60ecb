"""Measure a whole run at the real teacher's widths: seconds and memory of each phase beside the dry run's prediction.

    python benchmarks/real_size.py                     # two blocks per expert, at most 45 GB of disk
    python benchmarks/real_size.py --layers 40         # all blocks, 100 GB
    python benchmarks/real_size.py --quick             # the same code on small widths

Prints one table. It writes a folder in the layout of Wan's own repository with random weights: two experts of
A14B's widths in bfloat16, the autoencoder and the text encoder as pickles, and a tokenizer. The run generates one
trajectory, trains a student for four steps and saves it, and reads each expert's blocks from the disk at each
pass. *Peak* is the process's own memory without Python and its libraries, plus text encoder and autoencoder, which
are mapped files on the CPU. *Resident* includes the pages of all mapped files, which the system takes back when
memory is short. The streamed teacher is compared with the stock network on two blocks. Requires Linux, because
memory is read from /proc.
"""

import argparse
import json
import math
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.calls import Callbacks, observe
from benchmarks.projection_scale import (
    GIB,
    SPARE,
    memory,
    num_bytes,
    remove_expert,
    teacher_config,
    tensor_shapes,
    write_expert,
)
from wanlite.planning.settings import OneLineParser

EXPERTS = ("high_noise_model", "low_noise_model")
TEXT_ENCODER, AUTOENCODER = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
TEXT_SIZES = {"words": 256384, "width": 4096, "neurons": 10240, "heads": 64, "head_size": 64, "layers": 24}
QUICK: dict[str, Any] = {
    "config": {"dim": 256, "ffn_dim": 512, "num_heads": 2},
    "base_dim": 8,
    "text": {"words": 4096, "neurons": 64, "heads": 2, "head_size": 8, "layers": 1},
    "flags": [
        "--hidden_size",
        "128",
        "--depth",
        "2",
        "--num_heads",
        "2",
        "--validation_trajectories",
        "4",
        "--rollout_states",
        "2",
    ],
}
PROMPTS = (
    "a lighthouse at dusk",
    "two cats on a red sofa",
    "a glass of water on a wooden table",
    "an old bicycle in the rain",
)
FLAGS = [
    "--num_trajectories",
    "1",
    "--teacher_steps",
    "2",
    "--flow_shift",
    "3",  # each expert takes one of the two steps
    "--few_steps",
    "1",
    "2",
    "--num_inference_steps",
    "2",
    "--train_batch_size",
    "2",
    "--max_train_steps",
    "4",
    "--few_step_train_steps",
    "2",
    "--lr_warmup_steps",
    "1",
    "--muon_learning_rate",
    "0",
    "--report_to",
    "none",
    "--teacher_residency",
    "disk",
]
PHASE_OF_CALL = {  # {function of a run: phase, named as in the dry run where both have it}
    "wanlite.student.initialization.compare_experts": "start",
    "wanlite.teacher.components.convert_components": "converting",
    "wanlite.data.text_encoder.encode_once": "text",
    "wanlite.student.initialization.initialize_student": "start",
    "wanlite.data.trajectories.TrajectoryGenerator.find_basis": "trajectories",
    "wanlite.data.trajectories.TrajectoryGenerator.generate": "trajectories",
    "wanlite.data.trajectories.TrajectoryGenerator.roll_out": "own path",
    "wanlite.training.training_step.training_step": "training",
    "wanlite.training.validation.generate_images": "drawing",
    "wanlite.training.validation.read_teacher_images": "drawing",
    "wanlite.training.validation.relative_error": "validation",
    "wanlite.training.validation.compare_images": "validation",
    "wanlite.training.run_folder.save_components": "saving",
}
LOADERS = (  # of networks whose weights are the pages of a mapped file on the CPU
    "wanlite.data.autoencoder.load_autoencoder",
    "wanlite.data.text_encoder.load_text_encoder",
)
PRINTED = {"own path": "rollout"}  # {phase: its name in the table}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest velocity


# ---- an official folder ------------------------------------------------------------------------------------


def text_shapes(
    words: int, width: int, neurons: int, heads: int, head_size: int, layers: int
) -> dict[str, tuple[int, ...]]:
    """Return {official name: shape} of a UMT5 encoder."""
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (words, width), "norm.weight": (width,)}
    for block in (f"blocks.{index}." for index in range(layers)):
        shapes |= {f"{block}attn.{kind}.weight": (heads * head_size, width) for kind in "qkv"}
        shapes |= {
            f"{block}attn.o.weight": (width, heads * head_size),
            f"{block}ffn.gate.0.weight": (neurons, width),
            f"{block}ffn.fc1.weight": (neurons, width),
            f"{block}ffn.fc2.weight": (width, neurons),
            f"{block}pos_embedding.embedding.weight": (32, heads),
        }
        shapes |= {f"{block}norm{number}.weight": (width,) for number in (1, 2)}
    return shapes


def write_text_encoder(path: Path, sizes: Mapping[str, int]) -> None:
    """Write a pickle of random bfloat16 values, allocated first and filled through a mapping to save memory."""
    import mmap

    import torch

    shapes = text_shapes(**sizes)
    with torch.serialization.skip_data():
        torch.save({name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, path)
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    before = torch.serialization.get_default_mmap_options()
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    try:
        for name, tensor in torch.load(path, weights_only=True, mmap=True).items():
            scale = 1.0 if len(tensor.shape) == 1 or "embedding" in name else tensor.shape[1] ** -0.5
            for start, part in enumerate(tensor.view(-1).split(len(pool))):
                part.copy_(
                    (pool.roll(7919 * start) * scale)[: len(part)]
                    if len(tensor.shape) > 1
                    else torch.ones(len(part))
                )
    finally:
        torch.serialization.set_default_mmap_options(before)


def write_folder(folder: Path, config: Mapping[str, Any], text: Mapping[str, int], base_dim: int) -> None:
    """Write both experts, the autoencoder, the text encoder and a tokenizer in the layout of Wan's repository."""
    import torch
    from diffusers import AutoencoderKLWan

    from tests.test_official import write_autoencoder

    for seed, name in enumerate(EXPERTS):
        write_expert(folder / name, config, seed)
    torch.manual_seed(0)
    write_autoencoder(folder / AUTOENCODER, AutoencoderKLWan(base_dim=base_dim))
    write_text_encoder(folder / TEXT_ENCODER, text)
    shutil.copytree(ROOT / "tiny_teacher" / "tokenizer", folder / "google" / "umt5-xxl")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")


def remove_folder(folder: Path) -> None:
    """Delete the files of write_folder and of the run."""
    for name in EXPERTS:
        remove_expert(folder / name)
    for name in (AUTOENCODER, TEXT_ENCODER, "prompts.txt"):
        (folder / name).unlink(missing_ok=True)
    for name in ("google", "run"):
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.rmdir()


# ---- measuring; in a process of its own --------------------------------------------------------------------


class PhaseMeter(threading.Thread):
    """Samples the process's memory by phase: {"seconds", "peak" own bytes, "resident" bytes with mapped files}.

    An inner phase is not counted as part of the outer one.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.phases: dict[str, dict[str, Any]] = {}
        self.stack = ["between"]
        self.since = time.perf_counter()
        self.before = memory("RssAnon")
        self.mapped = 0  # bytes of weights in mapped files

    def run(self) -> None:
        while True:
            own, resident = memory("RssAnon") - self.before + self.mapped, memory("VmRSS")
            found = self._phase()
            found["peak"], found["resident"] = max(found["peak"], own), max(found["resident"], resident)
            time.sleep(0.01)

    def _phase(self):
        return self.phases.setdefault(self.stack[-1], {"seconds": 0.0, "peak": 0, "resident": 0})

    def begin(self, phase: str) -> None:
        """Count from here on as `phase`."""
        self.count_seconds()
        self.stack.append(phase)

    def end(self, returned: object = None) -> None:
        """Count from here on as the phase around the current one."""
        self.count_seconds()
        phase = self.stack.pop()
        found = self.phases[phase]
        print(
            f"{phase}: {found['seconds']:.0f} s so far, peak {found['peak'] / GIB:.2f} GiB",
            file=sys.stderr,
            flush=True,
        )

    def count_seconds(self) -> None:
        """Add the time since the last call to the current phase."""
        now = time.perf_counter()
        self._phase()["seconds"] += now - self.since
        self.since = now

    def count_weights(self, loaded: Any) -> None:
        """Count the weights of a loaded network, the last of a tuple, as mapped; the latest network replaces others."""
        if loaded is not None:
            network = loaded[-1] if isinstance(loaded, tuple) else loaded
            self.mapped = sum(weight.nbytes for weight in network.parameters())


def measure_run(arguments: list[str]) -> dict[str, dict[str, Any]]:
    """Train in this process, with these arguments of the command line; returns {phase: its figures}."""
    sys.argv = [str(ROOT / "train_distillation.py"), *arguments]
    import train_distillation as script

    meter = PhaseMeter()
    callbacks: dict[Callable, Callbacks] = {
        pkgutil.resolve_name(name): (partial(meter.begin, phase), meter.end)
        for name, phase in PHASE_OF_CALL.items()
    }
    callbacks |= {pkgutil.resolve_name(name): (lambda: None, meter.count_weights) for name in LOADERS}
    settings, is_resumed = script.read_settings()
    meter.start()
    with observe(callbacks):
        code = script.main(settings, is_resumed)
    if code:
        sys.exit(code)
    meter.count_seconds()
    return meter.phases


def measure_agreement(folder: str) -> dict[str, float]:
    """Return the difference of the streamed from the stock velocity of two blocks, over the largest, by dtype."""
    import torch

    from wanlite.network import pack_text
    from wanlite.teacher.checkpoint import open_teacher_files

    expert, differences = first_two_blocks(open_teacher_files(folder).experts["high"]), {}
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 16, 16, generator=generator)
    text = pack_text(list(torch.randn(2, 9, 4096, generator=generator)))
    timestep = torch.tensor([950.0, 400.0])
    for name, limit in TOLERANCE.items():
        dtype = getattr(torch, name)
        with torch.no_grad():
            ours = streamed_velocity(expert, dtype, latents, timestep, text)
            theirs = stock_velocity(expert, dtype, latents, timestep, text)
        differences[name] = float((ours - theirs).abs().max() / theirs.abs().max())
        if not differences[name] < limit:
            raise AssertionError(
                f"the streamed teacher differs from the stock one by {differences[name]:.2g} in {name}, "
                f"expected at most {limit}"
            )
    return differences


def first_two_blocks(expert: Any) -> Any:
    """Return the files of an expert without its other blocks."""
    blocks = tuple(f"blocks.{index}." for index in range(2))
    places = {
        name: place
        for name, place in expert.places.items()
        if name.startswith(blocks) or not name.startswith("blocks.")
    }
    return replace(expert, config=expert.config | {"num_layers": 2}, places=places)


def streamed_velocity(expert: Any, dtype: Any, latents: Any, timestep: Any, text: Any) -> Any:
    """Return the velocity of an expert whose blocks are read from the disk one by one."""
    from wanlite.teacher.model import run_expert, stream_expert

    velocity, _ = run_expert(stream_expert(expert, dtype=dtype), latents, timestep, text)
    return velocity


def stock_velocity(expert: Any, dtype: Any, latents: Any, timestep: Any, text: Any) -> Any:
    """Return the velocity of diffusers' WanTransformer3DModel with the weights of an expert, in float32."""
    import torch
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    from wanlite.network import unpack_text
    from wanlite.teacher.model import load_expert

    weights, config = load_expert(expert, dtype=dtype).state_dict(), expert.config
    with torch.device("meta"):
        stock = WanTransformer3DModel(**config)
    stock.rope = WanRotaryPosEmbed(
        config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"]
    )
    stock.load_state_dict(weights, strict=True, assign=True)
    frames = stock(latents[:, :, None].to(dtype), timestep, unpack_text(text).to(dtype)).sample
    return frames[:, :, 0].float()


def in_a_process(task: str, *arguments: Any) -> Any:
    """Run a task of this script in a new process; returns its result."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # glibc returns freed memory, as in memory.py
    process = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps([task, *arguments])],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    if process.returncode:
        sys.exit(f"real_size.py: {task} failed (exit code {process.returncode}).")
    return json.loads(process.stdout.splitlines()[-1])


def dry_run(arguments: list[str]) -> tuple[float, dict[str, float]]:
    """Return the seconds of a dry run, and {phase: predicted bytes}."""
    began = time.perf_counter()
    process = subprocess.run(
        [sys.executable, ROOT / "train_distillation.py", "--dry_run", *arguments],
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - began
    print(process.stdout + process.stderr, flush=True)
    memory_lines = process.stdout.partition("\nmemory ")[2].partition("\ndisk")[0]
    return seconds, {
        name: float(number.replace(",", "")) * {"GB": 1e9, "MB": 1e6}[unit]
        for number, unit, name in re.findall(r"([\d.,]+) ([GM]B)  (\S.*)", memory_lines)
    }


# ---- the script --------------------------------------------------------------------------------------------


def read_options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser and the options of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=2, help="blocks of each expert, at least 2; 40 = all (default: 2)"
    )
    parser.add_argument("--text_layers", type=int, help="blocks of the text encoder (default: all 24)")
    parser.add_argument("--resolution", type=int, default=256, help="of the run (default: 256)")
    parser.add_argument("--folder", type=Path, help="new folder for all files (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="small widths")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument(
        "--train_flags", nargs=argparse.REMAINDER, default=[], help="flags of the run, to the end of the line"
    )
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.layers < 2:
        parser.error(f"--layers {options.layers}, expected at least 2.")
    if sys.platform != "linux":
        parser.error(f"found {sys.platform}, expected Linux: memory is read from /proc.")
    if options.folder and options.folder.exists():
        parser.error(f"--folder {options.folder} exists already; name a new one.")
    return parser, options


def check_disk(
    parser: argparse.ArgumentParser, folder: Path, config: Mapping[str, Any], text: Mapping[str, int]
) -> int:
    """Return the bytes of the teacher's folder and of the two copies of its text encoder; refuse a smaller disk."""
    encoder = sum(2 * math.prod(shape) for shape in text_shapes(**text).values())
    needed = 2 * num_bytes(tensor_shapes(config)) + 3 * encoder + 6 * SPARE
    free = shutil.disk_usage(next(place for place in folder.parents if place.is_dir())).free
    if free < needed:
        parser.error(
            f"needs {needed / 1e9:.1f} GB, found {free / 1e9:.1f} GB free at {folder}. Name another disk with "
            "--folder, or fewer --layers or --text_layers."
        )
    return needed


def print_table(phases: Mapping[str, Mapping[str, Any]], predicted: Mapping[str, float]) -> None:
    """Print a line for each phase, with the prediction of the dry run if it has one."""
    columns = ("phase", "seconds", "peak (GiB)", "resident (GiB)", "predicted (GiB)", "predicted / measured")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for phase, found in phases.items():
        cells = ["", ""]
        if phase in predicted and found["peak"]:
            cells = [f"{predicted[phase] / GIB:.2f}", f"{predicted[phase] / found['peak']:.2f}"]
        print(
            f"| {PRINTED.get(phase, phase)} | {found['seconds']:.1f} | {found['peak'] / GIB:.2f} | "
            f"{found['resident'] / GIB:.2f} | {' | '.join(cells)} |"
        )


def train_arguments(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the arguments of the measured run."""
    return [
        *("--teacher", str(folder)),
        *("--prompts", str(folder / "prompts.txt")),
        *("--output_dir", str(folder / "run")),
        *("--resolution", str(options.resolution)),
        *FLAGS,
        *(QUICK["flags"] if options.quick else []),
        *options.train_flags,
    ]


def measure(options: argparse.Namespace, folder: Path, config: dict, text: dict) -> dict[str, Any]:
    """Write the teacher, run the dry run, the run and the comparison with the stock network; returns all figures."""
    arguments = train_arguments(options, folder)
    try:
        write_folder(folder, config, text, QUICK["base_dim"] if options.quick else 96)
        seconds, predicted = dry_run(arguments)
        phases = in_a_process("run", arguments)
        agreement = in_a_process("agreement", str(folder))
    finally:
        remove_folder(folder)
    return {"dry_run_seconds": seconds, "told": predicted, "agreement": agreement, "phases": phases}


def main() -> None:
    """Measure a run, or do one task of it in this process."""
    parser, options = read_options()
    if options.task:
        task, *arguments = json.loads(options.task)
        print("\n" + json.dumps({"run": measure_run, "agreement": measure_agreement}[task](*arguments)))
        return
    config = teacher_config("a14b", options.layers) | (QUICK["config"] if options.quick else {})
    text = TEXT_SIZES | (QUICK["text"] if options.quick else {})
    text |= {"layers": options.text_layers} if options.text_layers else {}
    folder = options.folder or Path(tempfile.gettempdir()) / f"real_size-{os.getpid()}"
    folder = folder.expanduser().absolute()
    needed = check_disk(parser, folder, config, text)
    print(
        f"writing at most {needed / 1e9:.1f} GB to {folder}, which is removed at the end, and training there; "
        "a table follows",
        flush=True,
    )
    figures = measure(options, folder, config, text)
    differences = " and ".join(f"{error:.1g} in {name}" for name, error in figures["agreement"].items())
    print(
        f"--dry_run took {figures['dry_run_seconds']:.1f} s; streamed and stock teacher differ by {differences} "
        "of the largest velocity\n"
    )
    print_table(figures["phases"], figures["told"])
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
