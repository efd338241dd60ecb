"""A whole run at the real teacher's widths: seconds and memory of each phase, beside what `--dry_run` had
said.

    python benchmarks/real_size.py                     # two blocks an expert, 45 GB of disk at most
    python benchmarks/real_size.py --layers 40         # the whole of it, 100 GB
    python benchmarks/real_size.py --quick             # the same code on small widths

A folder as Wan's own repository lays it out is written with random weights: two experts of A14B's widths in
bfloat16, the autoencoder and the text encoder in pickles, a tokenizer; one trajectory is generated, a student
trained for four steps and saved, each expert's blocks read from the disk at each pass. Linux alone: memory is
read in /proc. *Peak* is the process's own memory beyond Python and its libraries, and text encoder and
autoencoder, which on the CPU are mapped files; *resident* counts the pages of all mapped files, which are
given up where memory is short. That the streamed teacher is the stock one is checked on two blocks.
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
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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
QUICK = {
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
    "3",  # of two steps each expert takes one
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
# What a run calls -> the phase that it is, in the words of --dry_run where these know it.
PHASES = {
    "train_distillation.compare_experts": "start",
    "wanlite.training.teacher_data.convert_components": "converting",
    "wanlite.training.teacher_data.encode_once": "text",
    "train_distillation.initialize_student": "start",
    "wanlite.data.trajectories.TrajectoryGenerator.find_basis": "trajectories",
    "wanlite.data.trajectories.TrajectoryGenerator.generate": "trajectories",
    "wanlite.data.trajectories.TrajectoryGenerator.roll_out": "own path",
    "wanlite.training.validation.generate_images": "drawing",
    "wanlite.training.validation.read_teacher_images": "drawing",
    "wanlite.training.validation.relative_error": "validation",
    "wanlite.training.validation.compare_images": "validation",
    "train_distillation.save_components": "saving",
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest velocity


# ---- an official folder ------------------------------------------------------------------------------------


def text_shapes(words, width, neurons, heads, head_size, layers):
    """Return {official name: shape} of a UMT5 encoder."""
    shapes = {"token_embedding.weight": (words, width), "norm.weight": (width,)}
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


def write_text_encoder(path, sizes):
    """Write a pickle of random bfloat16 values whose room is laid out first and filled through a mapping: it
    never is in memory.
    """
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


def write_folder(folder, config, text, base_dim):
    """Write what Wan's own repository would: both experts, the autoencoder, the text encoder, a tokenizer."""
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


def remove_folder(folder):
    """Delete what write_folder and the run wrote."""
    for name in EXPERTS:
        remove_expert(folder / name)
    for name in (AUTOENCODER, TEXT_ENCODER, "prompts.txt"):
        (folder / name).unlink(missing_ok=True)
    for name in ("google", "run"):
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.rmdir()


# ---- measuring; in a process of its own --------------------------------------------------------------------


class PhaseMeter(threading.Thread):
    """Samples the process's memory by phase: `seconds`, and the most that was seen of its own and of all that
    is resident.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.phases, self.stack, self.since, self.before = (
            {},
            ["between"],
            time.perf_counter(),
            memory("RssAnon"),
        )
        self.mapped = 0

    def run(self):
        while True:
            own, resident = memory("RssAnon") - self.before + self.mapped, memory("VmRSS")
            found = self._phase()
            found["peak"], found["resident"] = max(found["peak"], own), max(found["resident"], resident)
            time.sleep(0.01)

    def _phase(self):
        return self.phases.setdefault(self.stack[-1], {"seconds": 0.0, "peak": 0, "resident": 0})

    @contextmanager
    def within(self, phase):
        """Count what happens inside as `phase` and no longer as the one around it."""
        self.turn()
        self.stack.append(phase)
        try:
            yield
        finally:
            self.turn()
            found = self.phases[self.stack.pop()]
            print(
                f"{phase}: {found['seconds']:.0f} s so far, peak {found['peak'] / GIB:.2f} GiB",
                file=sys.stderr,
                flush=True,
            )

    def turn(self):
        now = time.perf_counter()
        self._phase()["seconds"] += now - self.since
        self.since = now


def watched(meter, function, phase):
    def called(*arguments, **options):
        with meter.within(phase):
            return function(*arguments, **options)

    return called


def weighed(meter, load):
    """Return a loader whose networks count from then on: on the CPU their weights are a file's own pages."""

    def loaded(*arguments, **options):
        found = load(*arguments, **options)
        network = found[-1] if isinstance(found, tuple) else found
        meter.mapped = sum(weight.nbytes for weight in network.parameters())
        return found

    return loaded


def measure_run(words):
    """Train as the command of these words does, in this process; returns {phase: its figures}."""
    sys.argv = [str(ROOT / "train_distillation.py"), *words]
    import train_distillation as spine
    from wanlite.data import text_encoder as text

    meter = PhaseMeter()
    for place, phase in PHASES.items():
        owner, _, name = place.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        setattr(owner, name, watched(meter, getattr(owner, name), phase))
    deal = spine.Pace.count_batches
    spine.load_autoencoder = weighed(meter, spine.load_autoencoder)
    text.load_text_encoder = weighed(meter, text.load_text_encoder)

    def dealt(pace, batches):
        with meter.within("training"):  # the loop's body runs between two of its batches
            yield from deal(pace, batches)

    spine.Pace.count_batches = dealt
    settings, is_resumed = spine.read_settings()
    meter.start()
    code = spine.main(settings, is_resumed)
    if code:
        sys.exit(code)
    meter.turn()
    return meter.phases


def measure_agreement(folder):
    """Return how far the streamed expert's velocity is from the stock network's of the same two blocks, by
    dtype.
    """
    import torch
    from diffusers import WanTransformer3DModel

    from wanlite.network import pack_text, unpack_text
    from wanlite.teacher.checkpoint import open_teacher_files
    from wanlite.teacher.model import load_expert, run_expert, stream_expert

    whole, found = open_teacher_files(folder).experts["high"], {}
    blocks = tuple(f"blocks.{index}." for index in range(2))
    places = {
        name: place
        for name, place in whole.places.items()
        if name.startswith(blocks) or not name.startswith("blocks.")
    }
    expert = replace(whole, config=whole.config | {"num_layers": 2}, places=places)
    generator = torch.Generator().manual_seed(0)
    latents, text = (
        torch.randn(2, 16, 16, 16, generator=generator),
        pack_text(list(torch.randn(2, 9, 4096, generator=generator))),
    )
    timestep = torch.tensor([950.0, 400.0])
    for name, most in TOLERANCE.items():
        dtype = getattr(torch, name)
        with torch.no_grad():
            ours, _ = run_expert(stream_expert(expert, dtype=dtype), latents, timestep, text)
            weights = load_expert(expert, dtype=dtype).state_dict()
            with torch.device("meta"):
                stock = WanTransformer3DModel(**expert.config)
            stock.rope = load_rope(expert.config)
            stock.load_state_dict(weights, strict=True, assign=True)
            theirs = (
                stock(latents[:, :, None].to(dtype), timestep, unpack_text(text).to(dtype))
                .sample[:, :, 0]
                .float()
            )
        found[name] = float((ours - theirs).abs().max() / theirs.abs().max())
        if not found[name] < most:
            raise AssertionError(
                f"the streamed teacher is {found[name]:.2g} off the stock one in {name}, expected {most} at "
                f"most"
            )
    return found


def load_rope(config):
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    return WanRotaryPosEmbed(config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"])


def in_a_process(task, *arguments):
    """Run a task of this script in a process of its own; returns what it tells."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # glibc gives back what is freed, as in memory.py
    process = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps([task, *arguments])],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    if process.returncode:
        sys.exit(f"real_size.py: {task} failed (exit code {process.returncode}).")
    return json.loads(process.stdout.splitlines()[-1])


def dry_run(words):
    """Return (seconds, {phase: bytes that it is said to need})."""
    began = time.perf_counter()
    process = subprocess.run(
        [sys.executable, ROOT / "train_distillation.py", "--dry_run", *words], capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    print(process.stdout + process.stderr, flush=True)
    said = process.stdout.partition("\nmemory ")[2].partition("\ndisk")[0]
    return seconds, {
        name: float(number.replace(",", "")) * {"GB": 1e9, "MB": 1e6}[unit]
        for number, unit, name in re.findall(r"([\d.,]+) ([GM]B)  (\S.*)", said)
    }


# ---- the script --------------------------------------------------------------------------------------------


def read_options():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=2, help="blocks of each expert, at least 2; 40 = all (default: 2)"
    )
    parser.add_argument("--text_layers", type=int, help="of the text encoder; None = all 24")
    parser.add_argument("--resolution", type=int, default=256, help="of the run (default: 256)")
    parser.add_argument(
        "--folder", type=Path, help="where all is written, a new folder; None = a temporary one"
    )
    parser.add_argument("--quick", action="store_true", help="small widths")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument(
        "--train_flags", nargs=argparse.REMAINDER, default=[], help="all that follows goes to the run"
    )
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.layers < 2:
        parser.error(f"--layers {options.layers}, expected at least 2.")
    if sys.platform != "linux":
        parser.error(f"runs on Linux alone, this is {sys.platform}: it reads /proc.")
    if options.folder and options.folder.exists():
        parser.error(f"--folder {options.folder} is there already; name a new one.")
    return parser, options


def check_disk(parser, folder, config, text):
    """Refuse a disk too small for the folder, the converted text encoder, and the one that is saved with the
    student.
    """
    encoder = sum(2 * math.prod(shape) for shape in text_shapes(**text).values())
    needed = 2 * num_bytes(tensor_shapes(config)) + 3 * encoder + 6 * SPARE
    free = shutil.disk_usage(next(place for place in folder.parents if place.is_dir())).free
    if free < needed:
        parser.error(
            f"all takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free at {folder}. Name another disk "
            f"with --folder, "
            "or fewer --layers or --text_layers."
        )
    return needed


def print_table(phases, told):
    print(
        "| phase | seconds | peak (GiB) | resident (GiB) | told (GiB) | told / measured "
        "|\n|---|---|---|---|---|---|"
    )
    for phase, found in phases.items():
        said = (
            f"{told[phase] / GIB:.2f} | {told[phase] / found['peak']:.2f}"
            if phase in told and found["peak"]
            else " | "
        )
        print(
            f"| {phase} | {found['seconds']:.1f} | {found['peak'] / GIB:.2f} | {found['resident'] / GIB:.2f} "
            f"| {said} |"
        )


def main():
    parser, options = read_options()
    if options.task:
        task, *arguments = json.loads(options.task)
        print("\n" + json.dumps({"run": measure_run, "agreement": measure_agreement}[task](*arguments)))
        return
    config = teacher_config("a14b", options.layers) | (QUICK["config"] if options.quick else {})
    text = (
        TEXT_SIZES
        | (QUICK["text"] if options.quick else {})
        | ({"layers": options.text_layers} if options.text_layers else {})
    )
    folder = (
        (options.folder or Path(tempfile.gettempdir()) / f"real_size-{os.getpid()}").expanduser().absolute()
    )
    needed = check_disk(parser, folder, config, text)
    print(
        f"writes {needed / 1e9:.1f} GB at most in {folder}, removed at the end; trains there; a table "
        f"follows",
        flush=True,
    )
    words = [
        "--teacher",
        str(folder),
        "--prompts",
        str(folder / "prompts.txt"),
        "--output_dir",
        str(folder / "run"),
        "--resolution",
        str(options.resolution),
        *FLAGS,
        *(QUICK["flags"] if options.quick else []),
        *options.train_flags,
    ]
    try:
        write_folder(folder, config, text, QUICK["base_dim"] if options.quick else 96)
        seconds, told = dry_run(words)
        phases = in_a_process("run", words)
        agreement = in_a_process("agreement", str(folder))
    finally:
        remove_folder(folder)
    print(
        f"--dry_run took {seconds:.1f} s; streamed and stock teacher differ by "
        + " and ".join(f"{error:.1g} in {name}" for name, error in agreement.items())
        + " of the largest velocity\n"
    )
    print_table(phases, told)
    if options.json:
        options.json.write_text(
            json.dumps(
                {"dry_run_seconds": seconds, "told": told, "agreement": agreement, "phases": phases}, indent=2
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
