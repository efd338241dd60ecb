"""Measure the projection of a whole Wan: peak memory, seconds of reading and of arithmetic, beside a plain read.

    python benchmarks/projection_scale.py                        # an expert of A14B's shape, 28.6 GB on disk while it runs
    python benchmarks/projection_scale.py --layers 2             # the true width, 1.9 GB
    python benchmarks/projection_scale.py --quick                # the same code on a narrow Wan, seconds
    python benchmarks/projection_scale.py --folder DIR --keep    # measure the kept files again without writing

Prints one figure per line. No teacher is needed: an expert of random values is written in the official layout, in
bf16 and six shards. Requires Linux: memory is read from /proc, and files are dropped from the page cache, so that
they are read from the disk.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from tqdm import tqdm

from benchmarks.calls import Callbacks, observe
from wanlite.planning.settings import OneLineParser

Shapes = dict[str, tuple[int, ...]]

TEACHERS = {
    # one of two experts
    "a14b": {"dim": 5120, "ffn_dim": 13824, "num_layers": 40, "num_heads": 40, "in_dim": 16},
    "14b": {"dim": 5120, "ffn_dim": 13824, "num_layers": 40, "num_heads": 40, "in_dim": 16},
    "5b": {"dim": 3072, "ffn_dim": 14336, "num_layers": 30, "num_heads": 24, "in_dim": 48},
    "1.3b": {"dim": 1536, "ffn_dim": 8960, "num_layers": 30, "num_heads": 12, "in_dim": 16},
}
STUDENT = {"hidden_size": 1024, "depth": 16, "num_heads": 16, "ffn_dim": 4096}
QUICK_TEACHER = {"dim": 512, "ffn_dim": 1408, "num_layers": 2, "num_heads": 4}
QUICK_STUDENT = {"hidden_size": 256, "depth": 2, "num_heads": 2, "ffn_dim": 1024}
TEXT_DIM = 4096
NUM_SHARDS = 6
INDEX = "diffusion_pytorch_model.safetensors.index.json"
PIECE = 16 << 20  # bytes of one plain read
SPARE = 1 << 30  # bytes of disk that are left free
GIB = 1 << 30


# ---- the tensors of a Wan, by their official names ---------------------------------------------------------


def teacher_config(name: str, layers: int | None = None, is_quick: bool = False) -> dict[str, Any]:
    """Return an expert's config.json; `_written_by` identifies a folder of this script."""
    sizes = TEACHERS[name] | (QUICK_TEACHER if is_quick else {})
    return {
        "_class_name": "WanModel",
        "_written_by": f"projection_scale.py for {name}",
        **sizes,
        "out_dim": sizes["in_dim"],
        "num_layers": layers or sizes["num_layers"],
        "freq_dim": 256,
        "text_len": 512,
        "eps": 1e-6,
        "model_type": "t2v",
    }


def tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return {official name: shape} in the order of the layers."""
    width, inner, channels = config["dim"], config["ffn_dim"], config["in_dim"]
    shapes: Shapes = {"patch_embedding.weight": (width, channels, 1, 2, 2), "patch_embedding.bias": (width,)}
    for name, out, fan_in in (
        ("text_embedding.0", width, TEXT_DIM),
        ("text_embedding.2", width, width),
        ("time_embedding.0", width, config["freq_dim"]),
        ("time_embedding.2", width, width),
        ("time_projection.1", 6 * width, width),
    ):
        shapes |= _linear(name, out, fan_in)
    for index in range(config["num_layers"]):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in _block_shapes(width, inner).items()}
    return shapes | _linear("head.head", 4 * channels, width) | {"head.modulation": (1, 2, width)}


def _linear(name, out, fan_in):
    return {f"{name}.weight": (out, fan_in), f"{name}.bias": (out,)}


def _block_shapes(width, inner):
    shapes = {"modulation": (1, 6, width), "norm3.weight": (width,), "norm3.bias": (width,)}
    for attention in ("self_attn", "cross_attn"):
        for kind in "qkvo":
            shapes |= _linear(f"{attention}.{kind}", width, width)
        shapes |= {f"{attention}.norm_{kind}.weight": (width,) for kind in "qk"}
    return shapes | _linear("ffn.0", inner, width) | _linear("ffn.2", width, inner)


def num_bytes(shapes: Shapes) -> int:
    """Return the bytes of tensors in bfloat16."""
    return sum(2 * math.prod(shape) for shape in shapes.values())


# ---- writing -----------------------------------------------------------------------------------------------


class RandomWan:
    """Random bf16 values with a common part: all matrices read or write one falling spectrum over the residual.

    A row is the sum of two rows of a pool, pool = normal @ diag(falling) @ basis + noise. So all rows of a
    teacher differ although few random numbers are drawn, and a gigabyte takes a second.
    """

    def __init__(self, width: int, rank: int = 256, num_rows: int = 4096, seed: int = 0):
        self.random = np.random.default_rng(seed)
        self.width, rank = width, min(rank, width)
        basis = self._normal(rank, width) * np.arange(1, rank + 1, dtype=np.float32)[:, None] ** -0.75
        self.pool = self._normal(num_rows, rank) @ basis
        self.pool *= 1 / self.pool.std()
        self.pool += 0.1 * self._normal(num_rows, width)

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield a tensor's values in the order of the file: a few MB at a time, or at once if it writes the residual."""
        if len(shape) == 1 or "modulation" in name:
            yield _upper_half(self._small(name, shape))
        elif shape[0] == self.width and not name.endswith((".q.weight", ".k.weight", ".v.weight")):
            yield self._transposed(fan_in=math.prod(shape[1:]))
        else:
            yield from self._rows(shape[0], self.width)

    def _rows(self, count, fan_in, at_once=128):
        scale = np.float32((2 * fan_in) ** -0.5)
        for start in range(0, count, at_once):
            first, second = self.random.integers(0, len(self.pool), (2, min(at_once, count - start)))
            rows = self.pool[first]
            rows += self.pool[second]
            rows *= scale
            yield _upper_half(rows)

    def _transposed(self, fan_in):
        matrix, start = np.empty((self.width, fan_in), np.uint16), 0
        for rows in self._rows(fan_in, fan_in):
            matrix[:, start : start + len(rows)] = rows.T
            start += len(rows)
        return matrix

    def _small(self, name, shape):
        if "norm" in name and name.endswith("weight"):
            return 1 + 0.1 * self._normal(*shape)
        return self._normal(*shape) * (self.width**-0.5 if "modulation" in name else 0.02)

    def _normal(self, *shape):
        return self.random.standard_normal(shape, dtype=np.float32)


def _upper_half(values):
    """Return float32 values as bf16 bits, which are their upper halves."""
    return np.ascontiguousarray(values.view("<u4").view("<u2").reshape(*values.shape, 2)[..., 1])


def write_expert(folder: Path, config: Mapping[str, Any], seed: int = 0) -> float:
    """Write an expert with at most one matrix in memory; returns bytes per second.

    config.json is written last, so that its presence marks a complete expert.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes, values, began = tensor_shapes(config), RandomWan(config["dim"], seed=seed), time.perf_counter()
    weight_map = {}
    with tqdm(total=num_bytes(shapes), desc="writing", unit="B", unit_scale=True, disable=None) as progress:
        for number, names in enumerate(_shards(shapes), 1):
            path = folder / _shard_name(number)
            _write_shard(path, {name: shapes[name] for name in names}, values, progress)
            weight_map |= dict.fromkeys(names, path.name)
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": num_bytes(shapes)}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(_config_text(config))
    return num_bytes(shapes) / (time.perf_counter() - began)


def _config_text(config):
    return json.dumps(config, indent=2) + "\n"


def _shard_name(number):
    return f"diffusion_pytorch_model-{number:05d}-of-{NUM_SHARDS:05d}.safetensors"


def _shards(shapes):
    """Yield the names of each shard; shards have about equal bytes, and at least one tensor."""
    names = list(shapes)
    for left in range(NUM_SHARDS, 0, -1):
        share, count, held = num_bytes({name: shapes[name] for name in names}) / left, 0, 0
        while count <= len(names) - left and (left == 1 or held < share):
            held += num_bytes({names[count]: shapes[names[count]]})
            count += 1
        yield names[:count]
        names = names[count:]


def _write_shard(path, shapes, values, progress):
    """Write one safetensors file: length of the header, header, values."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + num_bytes({name: shape})
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for piece in values.pieces(name, shape):
                file.write(piece)
                progress.update(piece.nbytes)
        file.flush()
        os.fsync(file.fileno())
    forget(path)


def remove_expert(folder: Path) -> None:
    """Delete the files of write_expert, and the folder if it is empty."""
    for name in ("config.json", INDEX, *map(_shard_name, range(1, NUM_SHARDS + 1))):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


# ---- measuring ---------------------------------------------------------------------------------------------


def forget(path: Path) -> None:
    """Drop a file from the page cache, so that it is read from the disk again."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def forget_all(folder: Path) -> None:
    """Drop all shards of a folder from the page cache."""
    for path in folder.glob("*.safetensors"):
        forget(path)


def plain_read(folder: Path) -> float:
    """Read every byte of the shards once, from the disk; returns bytes per second."""
    forget_all(folder)
    paths = sorted(folder.glob("*.safetensors"))
    size, buffer, began = sum(path.stat().st_size for path in paths), bytearray(PIECE), time.perf_counter()
    with tqdm(total=size, desc="reading", unit="B", unit_scale=True, disable=None) as progress:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                start = 0
                while count := os.preadv(file.fileno(), [buffer], start):
                    start += count
                    progress.update(count)
    return size / (time.perf_counter() - began)


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes: VmHWM is the peak of all resident pages, RssAnon is anonymous."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}; a newer Linux is needed.")


class PeakAnonymous(threading.Thread):
    """Samples the process's anonymous memory; `peak` is the largest sample, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.is_over = memory("RssAnon"), threading.Event()

    def run(self) -> None:
        while not self.is_over.wait(0.02):
            self.peak = max(self.peak, memory("RssAnon"))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.is_over.set()
        self.join()


class ReadMeter:
    """Sums the seconds and the bytes, as stored, of the tensors that are read."""

    def __init__(self) -> None:
        self.seconds, self.bytes, self.began = 0.0, 0, 0.0

    def begin(self) -> None:
        """Count from here on as reading."""
        self.began = time.perf_counter()

    def end(self, tensor: Any) -> None:
        """Count a tensor that was read."""
        self.seconds += time.perf_counter() - self.began
        self.bytes += 2 * tensor.numel() if tensor is not None else 0


def measure_projection(folder: str, student: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Project an expert into a student in this process; returns the figures."""
    import torch

    from train_distillation import WanLiteStudent
    from wanlite.student.initialization import project_into
    from wanlite.teacher.expert_files import ExpertFiles

    network, reads = WanLiteStudent(**student), ReadMeter()
    callbacks: dict[Callable, Callbacks] = {ExpertFiles.read: (reads.begin, reads.end)}
    with PeakAnonymous() as anonymous:
        before, began = anonymous.peak, time.perf_counter()
        with observe(callbacks):
            project_into(network, folder, device=device)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    if not reads.bytes:
        raise AssertionError(
            "found no call of ExpertFiles.read in the projection; count its other reads here"
        )
    return {
        "peak_gib": memory("VmHWM") / GIB,
        "peak_anonymous_gib": anonymous.peak / GIB,
        "anonymous_before_gib": before / GIB,  # python, torch and the student
        "peak_device_gib": torch.cuda.max_memory_allocated() / GIB if device.startswith("cuda") else None,
        "seconds": seconds,
        "seconds_reading": reads.seconds,
        "seconds_arithmetic": seconds - reads.seconds,
        "bytes_read": reads.bytes,
        "read_gb_per_s": reads.bytes / reads.seconds / 1e9,
        "threads": torch.get_num_threads(),
    }


def measure_in_a_fresh_process(folder: Path, student: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Run measure_projection in a new process, with the files dropped from the page cache."""
    forget_all(folder)
    task = json.dumps({"folder": str(folder), "student": student, "device": device})
    process = subprocess.run([sys.executable, __file__, "--project", task], stdout=subprocess.PIPE, text=True)
    if process.returncode:
        is_killed = process.returncode == -signal.SIGKILL
        how = "was killed, as happens when memory runs out" if is_killed else "failed"
        sys.exit(f"projection_scale.py: the projection {how} (exit code {process.returncode}).")
    return json.loads(process.stdout.splitlines()[-1])


# ---- the script --------------------------------------------------------------------------------------------


def read_options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser and the options of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teacher",
        choices=TEACHERS,
        default="a14b",
        help="the Wan whose shape is written (default: a14b, one expert)",
    )
    parser.add_argument("--layers", type=int, help="fewer blocks of the same width (default: all)")
    for name, value in STUDENT.items():
        parser.add_argument(f"--{name}", type=int, help=f"of the student (default: {value})")
    parser.add_argument("--device", default="cpu", help="where the arithmetic runs (default: cpu)")
    parser.add_argument(
        "--folder", type=Path, help="new or empty folder for the expert, on a disk (default: a temporary one)"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the expert in --folder, for the next run to measure"
    )
    parser.add_argument("--quick", action="store_true", help="a narrow Wan of two blocks")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--project", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.layers is not None and options.layers < 1:
        parser.error(f"--layers {options.layers}, expected at least 1.")
    if sys.platform != "linux":
        parser.error(f"found {sys.platform}, expected Linux: memory is read from /proc.")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: no such folder.")
    if options.keep and not options.folder:
        parser.error("--keep requires --folder, the folder of the kept expert.")
    return parser, options


def student_config(options: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the student's settings; its default depth is at most the teacher's."""
    defaults = (
        QUICK_STUDENT if options.quick else STUDENT | {"depth": min(STUDENT["depth"], config["num_layers"])}
    )
    given = {name: getattr(options, name) for name in STUDENT if getattr(options, name) is not None}
    return defaults | given | {"num_channels": config["in_dim"]}


def check_folder(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder holds this expert from an earlier run; raises OSError for other content or a small disk."""
    path, size = folder / "config.json", num_bytes(tensor_shapes(config))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if path.is_file() and path.read_bytes() == _config_text(config).encode():
            return True
        raise OSError(
            f"--folder {folder} is not empty, and its content is not this expert, written by this script. "
            "Name a new folder."
        )
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free
    if free < size + SPARE:
        raise OSError(
            f"the expert takes {size / 1e9:.1f} GB plus a spare {SPARE / 1e9:.1f} GB, found {free / 1e9:.1f} GB "
            f"free at {folder}. Name another disk with --folder, or fewer --layers."
        )
    return False


def check_student(config: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    """Refuse a student that cannot be projected from the teacher, before anything is written."""
    from wanlite.student.config import check_shape
    from wanlite.student.shape import check_shape_fits

    patch = {"patch_size": (1, 2, 2)}
    check_shape(**patch, eps=config["eps"], **student)
    teacher = {
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["dim"] // config["num_heads"],
        "num_layers": config["num_layers"],
        "ffn_dim": config["ffn_dim"],
        "in_channels": config["in_dim"],
        "text_dim": TEXT_DIM,
        "freq_dim": config["freq_dim"],
    }
    check_shape_fits(
        teacher | patch, {**student, **patch, "text_dim": TEXT_DIM, "freq_dim": config["freq_dim"]}
    )


def print_table(record: Mapping[str, Any], size: int) -> None:
    """Print the figures, one per line; `size` is the bytes of the expert."""
    print(f"peak resident memory     {record['peak_gib']:8.2f} GiB, pages of mapped files included")
    print(
        f"peak anonymous memory    {record['peak_anonymous_gib']:8.2f} GiB, including "
        f"{record['anonymous_before_gib']:.2f} GiB before the projection"
    )
    if record["peak_device_gib"] is not None:
        print(f"peak device memory       {record['peak_device_gib']:8.2f} GiB")
    print(
        f"projection               {record['seconds']:8.1f} s, reading {record['seconds_reading']:.1f} s and "
        f"arithmetic {record['seconds_arithmetic']:.1f} s, {record['threads']} threads"
    )
    print(
        f"read                     {record['bytes_read'] / 1e9:8.1f} GB, {record['bytes_read'] / size:.1f} "
        f"times the expert, at {record['read_gb_per_s']:.2f} GB/s"
    )
    print(f"plain read               {size / 1e9:8.1f} GB at {record['plain_read_gb_per_s']:.2f} GB/s")
    if record["write_gb_per_s"] is not None:
        print(f"written                  {size / 1e9:8.1f} GB at {record['write_gb_per_s']:.2f} GB/s")


def run(
    folder: Path, config: dict[str, Any], student: dict[str, Any], options: argparse.Namespace, is_kept: bool
) -> None:
    """Write the expert unless it exists, measure, and print the figures."""
    written = None if is_kept else write_expert(folder, config) / 1e9
    record = {
        "teacher": {"name": options.teacher, **config},
        "student": student,
        "device": options.device,
        "plain_read_gb_per_s": plain_read(folder) / 1e9,
        "write_gb_per_s": written,
        **measure_in_a_fresh_process(folder, student, options.device),
    }
    print_table(record, num_bytes(tensor_shapes(config)))
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def describe(
    options: argparse.Namespace,
    config: Mapping[str, Any],
    student: Mapping[str, Any],
    folder: Path,
    is_kept: bool,
) -> str:
    """Return the first line of the output: the expert, its size and folder, and the student."""
    size = num_bytes(tensor_shapes(config))
    return (
        f"{'measuring' if is_kept else 'writing'} an expert of {options.teacher}'s shape, "
        f"{config['num_layers']} blocks of width {config['dim']}, {size / 2e9:.2f} B parameters, "
        f"{size / 1e9:.1f} GB of disk, in {folder} ({'kept' if options.keep else 'removed at the end'}), and "
        f"projecting it into {student['hidden_size']} x {student['depth']} on {options.device}; a table follows"
    )


def main() -> None:
    """Check the folder and the student, then measure; or measure in this process."""
    parser, options = read_options()
    if options.project:
        print(json.dumps(measure_projection(**json.loads(options.project))))
        return
    config = teacher_config(options.teacher, options.layers, options.quick)
    student = student_config(options, config)
    folder = options.folder or Path(tempfile.gettempdir()) / f"projection_scale-{os.getpid()}"
    folder = folder.expanduser().absolute()
    try:
        is_kept = check_folder(folder, config)
    except OSError as error:
        parser.error(str(error))
    print(describe(options, config, student, folder, is_kept), flush=True)
    try:
        check_student(config, student)
    except ValueError as error:
        parser.error(str(error))
    for number in (signal.SIGTERM, signal.SIGHUP):  # after these, the written files are removed as well
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        run(folder, config, student, options, is_kept)
    finally:
        if not options.keep:
            remove_expert(folder)


if __name__ == "__main__":
    main()
