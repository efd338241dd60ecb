"""Compare the memory that the dry run predicts for each phase with measured memory, in one table.

    python benchmarks/memory.py             # minutes; hours on CPUs that are slow in bfloat16, which Muon uses
    python benchmarks/memory.py --quick     # seconds

Each phase is simulated, then run in a new process. Memory is the peak of torch's allocations on a GPU, and the peak
of the process's anonymous memory on the CPU.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers.training_utils import EMAModel

from train_distillation import Settings, WanLiteStudent
from wanlite.data.autoencoder import decode_latents, make_autoencoder
from wanlite.planning.memory import count_decoding_bytes, count_pass_bytes, count_training_bytes
from wanlite.planning.report import format_size
from wanlite.planning.simulation import simulate_peak
from wanlite.training.optimizers import make_optimizers

Size = dict[str, int]
Peak = Callable[[Callable[[], object]], Any]  # work -> the bytes at its peak

WARM: Size = {"width": 128, "depth": 2, "side": 16, "rows": 1, "teacher": 256, "base_dim": 8}
SIZES: dict[bool, Size] = {
    False: {"width": 1024, "depth": 8, "side": 64, "rows": 2, "teacher": 2560, "base_dim": 96},
    True: {"width": 512, "depth": 4, "side": 32, "rows": 2, "teacher": 1024, "base_dim": 32},
}


def phases(size: Size) -> dict[str, Callable[[Peak], Any]]:
    """Return {phase: function of a Peak that returns the bytes of the phase}."""
    latents = (size["side"], size["side"])
    files = teacher_files(size)

    def train(peak, muon_rate):
        settings = Settings(muon_learning_rate=muon_rate)
        return count_training_bytes(
            partial(WanLiteStudent, size["width"], size["depth"]),
            lambda network: make_optimizers(settings, network, is_fused=network.device.type == "cuda"),
            lambda network: EMAModel(network.parameters()),
            size["rows"],
            latents,
            False,
            peak,
        )

    return {
        "training, AdamW": partial(train, muon_rate=0.0),
        "training, Muon": partial(train, muon_rate=0.01),
        "a teacher's pass": lambda peak: count_pass_bytes(
            files, 8 * size["rows"], latents, torch.float32, peak
        ),
        "decoding": lambda peak: count_decoding_bytes(
            partial(make_autoencoder, {"base_dim": size["base_dim"]}),
            decode_latents,
            4 * size["rows"],
            (16, *latents),
            peak,
        ),
    }


def teacher_files(size: Size) -> Any:
    """Return the config of a teacher of two blocks, in place of its files."""
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": size["teacher"] // 128,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 3 * size["teacher"],
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    }
    expert = SimpleNamespace(width=size["teacher"], config=config)
    return SimpleNamespace(config={"in_channels": 16, "text_dim": 4096}, experts={"only": expert})


def measured_peak(work: Callable[[], object]) -> int:
    """Return the bytes at the peak of `work()`, without those before it."""
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    before, found, is_done = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not is_done.is_set():
            found[0] = max(found[0], anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    is_done.set()
    watcher.join()
    return found[0] - before


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def measure(size: Size, phase: str, connection: Any) -> None:
    """Measure a phase in this process and send the bytes."""
    phases(WARM)[phase](lambda work: work() or 0)  # the libraries allocate their own memory first
    connection.send(phases(size)[phase](measured_peak))


def measure_in_a_process(size: Size, phase: str) -> int:
    """Measure a phase in a new process; returns the bytes."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=measure, args=(size, phase, theirs))
    process.start()
    theirs.close()
    measured = ours.recv()
    process.join()
    return measured


def main() -> None:
    """Simulate and measure each phase, and print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = (
        "65536"  # glibc returns freed memory, so that holes are not counted
    )
    size, figures = SIZES[options.quick], {}
    print(
        f"measuring {len(phases(size))} phases, each in a new process: {size}\n\n"
        "| phase | predicted | measured | predicted / measured |\n|---|---|---|---|",
        flush=True,
    )
    for phase, find in phases(size).items():
        predicted = find(partial(simulate_peak, device_type="cuda" if torch.cuda.is_available() else "cpu"))
        measured = measure_in_a_process(size, phase)
        figures[phase] = {"told": predicted, "measured": measured}
        print(
            f"| {phase} | {format_size(predicted)} | {format_size(measured)} | {predicted / measured:.3f} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
