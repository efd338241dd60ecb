"""Measure one GPU in eight minutes: correctness of short runs, speed and memory of training, teacher and inference.

    python benchmarks/gpu.py --json gpu.json                # on an H100 or H200, all parts, about 480 s
    python benchmarks/gpu.py --parts right step             # some of them
    python benchmarks/gpu.py --device cpu --small           # tiny shapes, on a machine without a GPU

Parts: right (runs of the tiny teacher on the GPU), step (a training step from the cache), teacher (guided passes at
A14B's shape, random weights, by residency), draw (an image in 4 steps), compiled (the same, compiled). A part begins
only if it fits in the remaining --seconds. Each figure is printed and written at once. A failure is printed with its
figure, and the next one is measured.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from diffusers import AutoencoderKLWan

from benchmarks import train_speed as speed
from train_distillation import WanLiteStudent
from wanlite.data.autoencoder import decode_latents, make_autoencoder
from wanlite.flow import make_scheduler, sample
from wanlite.network import TextTokens, pack_text, pass_operations
from wanlite.planning.duration import measure_matrix_rate
from wanlite.planning.memory import count_pass_bytes, count_teacher_bytes
from wanlite.planning.simulation import simulate_peak
from wanlite.student.shape import student_shape
from wanlite.teacher.expert_files import ExpertFiles, TeacherFiles
from wanlite.teacher.model import Teacher, load_expert, make_expert

NEEDS = {"right": 100, "step": 70, "teacher": 150, "draw": 60, "compiled": 120}  # seconds, with a margin
PRINTED = {"told_gb": "predicted_gb", "said": "output"}  # {name in the JSON file: printed name}
SMALL_A14B = speed.A14B | {"num_attention_heads": 2, "ffn_dim": 256, "num_layers": 2, "text_dim": 64}
SMALL_SHAPE = dict(hidden_size=64, depth=2, num_heads=2, num_channels=16, text_dim=64)


@dataclass
class Bench:
    """The device under test, the shapes that it is tested with, and the figures found on it."""

    device: str
    is_small: bool
    json: Path | None
    began: float = field(default_factory=time.perf_counter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    rate: float = 0.0  # operations a second of bfloat16 matrix products

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def config(self) -> dict[str, Any]:
        """The config of the teacher's experts."""
        return SMALL_A14B if self.is_small else speed.A14B

    @property
    def shape(self) -> dict[str, Any]:
        """The shape of the student."""
        return SMALL_SHAPE if self.is_small else student_shape(speed.A14B)

    @property
    def side(self) -> int:
        """Height and width of large latents."""
        return 8 if self.is_small else 128

    def record(self, part: str, what: str, **figures: Any) -> None:
        """Print the figures of one measurement and write all rows."""
        row = {"part": part, "what": what, "at": round(time.perf_counter() - self.began, 1)} | figures
        self.rows.append(row)
        printed = "  ".join(f"{PRINTED.get(name, name)} {value}" for name, value in figures.items())
        print(f"{row['at']:6.1f}s  {part:9} {what:40} {printed}", flush=True)
        if self.json:
            self.json.write_text(json.dumps(self.rows, indent=1) + "\n")

    @contextlib.contextmanager
    def attempt(self, part: str, what: str) -> Iterator[None]:
        """Record a failure and continue after it."""
        try:
            yield
        except Exception as error:  # of any kind: GPU time is short
            traceback.print_exc(limit=4)
            self.record(part, what, FAILED=f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
        finally:
            if self.is_gpu:
                torch.cuda.empty_cache()

    def settle(self) -> None:
        """Wait until the device is idle."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], object], repeats: int, warming: int = 2) -> float:
        """Return the median milliseconds of `work()`."""
        for _ in range(warming):
            work()
        found = []
        for _ in range(repeats):
            self.settle()
            began = time.perf_counter()
            work()
            self.settle()
            found.append(1e3 * (time.perf_counter() - began))
        return statistics.median(found)

    def peak(self, work: Callable[[], object]) -> float:
        """Return the GB that torch has allocated at the peak of `work()`, including earlier allocations."""
        if not self.is_gpu:
            work()
            return 0.0
        self.settle()
        torch.cuda.reset_peak_memory_stats()
        work()
        self.settle()
        return torch.cuda.max_memory_allocated() / 1e9


# ---- correctness -------------------------------------------------------------------------------------------

STAGES = [
    "--num_trajectories=32",
    "--num_held_out=8",
    "--train_batch_size=16",
    "--max_train_steps=24",
    "--few_step_train_steps=8",
    "--validation_steps=24",
    "--validation_trajectories=4",
    "--rollout_states=8",
    "--teacher_steps=4",
    *("--few_steps", "1", "2", "4"),
]
RUNS = {
    "no, both, matching": ["--mixed_precision=no", "--matching_steps=4"],
    "bf16, one, images of two shapes": [
        *("--mixed_precision=bf16", "--teacher_residency=one", "--aspect_ratios", "1:1", "3:2")
    ],
    "bf16, streamed, fp8": ["--mixed_precision=bf16", "--teacher_residency=streamed", "--teacher_fp8"],
    "bf16, disk, checkpointing": [
        *("--mixed_precision=bf16", "--teacher_residency=disk", "--gradient_checkpointing")
    ],
    "fp16, both, fp8": ["--mixed_precision=fp16", "--teacher_fp8", "--teacher_residency=both"],
}


def right(bench: Bench, folder: Path) -> None:
    """Train all RUNS at once, each in its own process, then generate images with the first student.

    With tiny shapes, only two are trained.
    """
    names = list(RUNS)[:2] if bench.is_small else list(RUNS)
    processes = {name: start_run(folder / str(index), RUNS[name]) for index, name in enumerate(names)}
    with bench.attempt("right", "dtypes and kernels"):
        kernels(bench)
    for index, (name, process) in enumerate(processes.items()):
        with bench.attempt("right", name):
            record_run(bench, name, process, folder / str(index))
    for dtype in ("float32", "bfloat16"):
        with bench.attempt("right", f"run_inference {dtype}"):
            record_inference(bench, folder / "0", folder / dtype, dtype)


def start_run(output: Path, flags: Sequence[str]) -> subprocess.Popen:
    """Start train_distillation.py; its output is piped."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train_distillation.py", f"--output_dir={output}", *STAGES, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def record_run(bench: Bench, name: str, process: subprocess.Popen, output: Path) -> None:
    """Wait for a run and record its losses; raises RuntimeError if it failed."""
    printed = process.communicate(timeout=150)[0]
    if process.returncode:
        print(printed[-3000:], flush=True)
        raise RuntimeError(f"exit code {process.returncode}")
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [value for record in records for key, value in record.items() if key.endswith("loss")]
    bench.record(
        "right", name, rc=process.returncode, records=len(records), loss=losses[:1], last=records[-1]
    )


def record_inference(bench: Bench, model: Path, output: Path, dtype: str) -> None:
    """Generate images with run_inference.py and record its last line."""
    command = [sys.executable, ROOT / "run_inference.py", "--model", model]
    process = subprocess.run(
        [*command, "--dtype", dtype, "--output_dir", output],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    last = process.stdout.splitlines()[-1][-90:] if process.stdout else process.stderr[-200:]
    bench.record("right", f"run_inference {dtype}", rc=process.returncode, said=last)


def kernels(bench: Bench) -> None:
    """Record the dtype of a norm under autocast, and the kernels of a block."""
    student = WanLiteStudent(hidden_size=256, depth=1, num_heads=4, text_dim=64).to(bench.device)
    dtypes: dict[str, torch.dtype] = {}
    student.blocks[0].attn1.norm_q.register_forward_hook(
        lambda module, inputs, output: dtypes.update(into=inputs[0].dtype, out=output.dtype)
    )
    make = partial(torch.randn, device=bench.device)
    latents, text = make(2, 16, 32, 32), make(2, 13, 64)
    timestep, logit_bias = (
        torch.full((2,), 500.0, device=bench.device),
        torch.zeros(2, 13, device=bench.device),
    )
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * bench.is_gpu
    with torch.profiler.profile(activities=activities) as profile:
        with torch.autocast(bench.device, torch.bfloat16):
            (velocity,) = student(latents, timestep, text, text_logit_bias=logit_bias, return_dict=False)
        velocity.float().square().mean().backward()
        bench.settle()
    pattern = "attention|fmha|flash|cudnn|conv"
    names = sorted({event.key for event in profile.key_averages() if re.search(pattern, event.key)})
    bench.record("right", "norm of queries under autocast", into=str(dtypes["into"]), out=str(dtypes["out"]))
    bench.record("right", "attention and convolution calls", found=[name[:60] for name in names][:14])


# ---- a training step ---------------------------------------------------------------------------------------


def step(
    bench: Bench,
    folder: Path,
    variants: Sequence[str] = ("wanlite", "muon", "muon, cuDNN", "baseline"),
    sizes: Sequence[tuple[int, int]] = ((64, 32), (128, 8)),  # side of the latents, batch
) -> None:
    """Time a training step of each variant at each size."""
    for side, batch in sizes if not bench.is_small else ((8, 4),):
        files = speed.random_teacher(bench.config, bench.device)
        world = speed.make_world(
            folder / f"{side}-{batch}", files, bench.shape, side, batch, bench.device, "bf16"
        )
        for name in variants:
            with bench.attempt("step", f"{name} {8 * side} px"):
                torch.backends.cuda.enable_cudnn_sdp("cuDNN" in name)
                record_step(bench, world, name)
    torch.backends.cuda.enable_cudnn_sdp(False)


def record_step(bench: Bench, world: speed.World, name: str) -> None:
    """Record the milliseconds, memory and arithmetic of a variant's step."""
    steps = start_variant(world, name)
    began = time.perf_counter()
    used = bench.peak(lambda: [next(steps) for _ in range(4)])
    warmed = time.perf_counter() - began
    milliseconds = bench.timed(lambda: next(steps), 2 if bench.is_small else 8, 0)
    bench.record(
        "step",
        f"{name} {8 * world.side} px x {world.batch}",
        ms=round(milliseconds),
        images_s=round(1e3 * world.batch / milliseconds, 1),
        peak_gb=round(used, 1),
        mfu=f"{speed.student_operations(world) / (milliseconds / 1e3) / bench.rate:.1%}",
        warming_s=round(warmed, 1),
    )
    steps.close()


def start_variant(world: speed.World, name: str) -> Any:
    """Return the generator of a variant's steps."""
    if name == "baseline":
        return speed.plain(world)
    if name == "wanlite":
        return speed.ours(world)
    return speed.ours(world, muon_rate=0.09, is_compiled="compiled" in name)


# ---- the teacher -------------------------------------------------------------------------------------------


@dataclass
class SharedFiles(ExpertFiles):
    """An expert of random weights; on the CPU all blocks share the memory of one block, which may be pinned."""

    device: str = "cuda"
    place: str = "cuda"  # of the tensors that are read
    is_pinned: bool = False
    shared: dict[Any, torch.Tensor] = field(repr=False, default_factory=dict)

    def read(self, name: str, dtype: torch.dtype = torch.float32, *_: Any, **__: Any) -> torch.Tensor:
        make = partial(torch.empty, self.shape(name), device=self.device, dtype=dtype)
        if self.place != "cpu":
            return make().normal_(0, 0.02)
        key = (re.sub(r"^blocks\.\d+\.", "blocks.", name), dtype, self.is_pinned)
        if key not in self.shared:
            tensor = make().normal_(0, 0.02).cpu()
            self.shared[key] = tensor.pin_memory() if self.is_pinned and self.device == "cuda" else tensor
        return self.shared[key]


class QuickTeacher(Teacher):
    """Casts to float8 on the GPU, one expert after the other, which takes too long on the CPU."""

    def _load(self, files):
        if not self.is_fp8 or self.residency != "both":
            return super()._load(files)
        expert = load_expert(files, self.device, self.dtype)
        expert.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=self.dtype)
        return expert


def shared_teacher(bench: Bench, residency: str) -> TeacherFiles:
    """Return the files of two experts of random weights that share their memory on the CPU."""
    config = bench.config
    with torch.device("meta"):
        network = make_expert(ExpertFiles("high", Path(), config, {}), config["num_layers"])
    places: dict[str, Any] = {
        name: (Path(), name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()
    }
    options: dict[str, Any] = dict(
        device=bench.device,
        place="cpu" if residency in ("one", "streamed") else bench.device,
        is_pinned=residency == "streamed",
        shared={},
    )
    experts: dict[str, ExpertFiles] = {
        name: SharedFiles(name, Path(), config, places, **options) for name in ("high", "low")
    }
    return TeacherFiles(Path(), "diffusers", experts, 0.875)


@dataclass
class TeacherInputs:
    """A batch for the guided teacher: 32 images of 512 px are 65,536 tokens with the negative prompt."""

    latents: torch.Tensor
    text: TextTokens
    num_words: int

    @property
    def rows(self) -> int:
        return len(self.latents)

    @property
    def side(self) -> int:
        return self.latents.shape[-1]

    def velocity(self, one: Teacher, level: float) -> Any:
        """Return the guided velocity, with the hidden states of a late block."""
        timestep = torch.full((self.rows,), level, device=self.latents.device)
        block = 29 % one.config["num_layers"]
        return one.velocity(self.latents, timestep, self.text, self.text, 4.0, 3.0, (block,))


def teacher_inputs(bench: Bench) -> TeacherInputs:
    """Return random latents and text."""
    side, rows, words = (8, 2, 48) if bench.is_small else (64, 32, 48)
    text = pack_text([torch.randn(words, bench.config["text_dim"])] * rows).to(bench.device)
    return TeacherInputs(torch.randn(rows, 16, side, side, device=bench.device), text, words)


def teacher(
    bench: Bench,
    folder: Path,
    residencies: Sequence[tuple[str, bool]] = (
        *(("both", False), ("streamed", False)),
        *(("one", False), ("both", True)),
    ),
    is_compiled: bool = False,
) -> None:
    """Time a guided pass for each residency and precision of the teacher."""
    inputs = teacher_inputs(bench)
    for residency, is_fp8 in residencies:
        name = f"{residency}{', fp8' * is_fp8}{', compiled' * is_compiled}"
        with bench.attempt("teacher", name):
            record_teacher(bench, inputs, name, residency, is_fp8, is_compiled)


def record_teacher(
    bench: Bench, inputs: TeacherInputs, name: str, residency: str, is_fp8: bool, is_compiled: bool
) -> None:
    """Record the seconds of a guided pass, and its measured and predicted memory."""
    files = shared_teacher(bench, residency)
    predicted = predict_memory(bench, files, inputs, residency, is_fp8)
    one = QuickTeacher(files, bench.device, torch.bfloat16, residency, is_fp8)
    if is_compiled:
        for expert in ("high", "low"):
            one.expert(expert).compile_repeated_blocks()
    began = time.perf_counter()
    used = bench.peak(lambda: (inputs.velocity(one, 950.0), inputs.velocity(one, 500.0)))
    loading = time.perf_counter() - began
    seconds = bench.timed(lambda: inputs.velocity(one, 500.0), 3 if residency != "one" else 2, 1) / 1e3
    figures: dict[str, Any] = {}
    if residency == "one":
        swap = bench.timed(lambda: (one.expert("high"), one.expert("low")), 1, 0) / 2
        figures["swap_s"] = round(swap / 1e3, 2)
    operations = pass_operations(bench.config, 2 * inputs.rows, (inputs.side // 2) ** 2, inputs.num_words + 1)
    bench.record(
        "teacher",
        name,
        s=round(seconds, 2),
        share=f"{operations / seconds / bench.rate:.1%}",
        peak_gb=round(used, 1),
        told_gb=round(predicted / 1e9, 1),
        loading_s=round(loading, 1),
        **figures,
    )
    one.unload()


def predict_memory(
    bench: Bench, files: TeacherFiles, inputs: TeacherInputs, residency: str, is_fp8: bool
) -> float:
    """Return the bytes that the dry run predicts for the teacher and its pass."""
    peak = partial(simulate_peak, device_type=bench.device)
    passing = count_pass_bytes(files, 2 * inputs.rows, (inputs.side, inputs.side), torch.bfloat16, peak)
    return count_teacher_bytes(files, residency, torch.bfloat16, is_fp8)[0] + passing


# ---- an image ----------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(bench: Bench, folder: Path) -> None:
    """Time an image of the student in each dtype, of diffusers' pipeline, and the decoding of its latents."""
    for dtype in (torch.float32, torch.bfloat16):
        draw_student(bench, dtype)
    with bench.attempt("draw", "stock pipeline"):
        stock(bench)
    for name, dtype in (
        ("stock", torch.float32),
        ("single frame", torch.float32),
        ("single frame bf16", torch.bfloat16),
    ):
        with bench.attempt("draw", f"decoding {name}"):
            record_decoding(bench, name, dtype)


def draw_student(bench: Bench, dtype: torch.dtype, is_compiled: bool = False) -> None:
    """Time the student at two sizes, with and without cuDNN's attention, and one step as a CUDA graph."""
    student = make_student(bench, dtype)
    if is_compiled:
        student.compile_repeated_blocks()
    suffix = " compiled" * is_compiled
    for side in (bench.side // 2, bench.side):
        velocity_of = student_velocity(bench, student, dtype)
        noise = torch.randn(1, 16, side, side, device=bench.device)
        for is_cudnn in (False, True):
            with bench.attempt("draw", f"student {8 * side} px"):
                torch.backends.cuda.enable_cudnn_sdp(is_cudnn)
                name = f"4 steps {8 * side} px {str(dtype)[6:]}{suffix}{' cuDNN' * is_cudnn}"
                record_sampling(bench, name, velocity_of, noise)
        torch.backends.cuda.enable_cudnn_sdp(False)
        if bench.is_gpu and dtype == torch.bfloat16:
            with bench.attempt("draw", f"graph {8 * side} px"):
                record_graph(bench, f"one step as a graph {8 * side} px{suffix}", velocity_of, noise)


def make_student(bench: Bench, dtype: torch.dtype) -> Any:
    """Return a new student; in bfloat16 only its matrices, convolutions and the norms of queries and keys are cast."""
    student = WanLiteStudent(bench.shape).to(bench.device).eval().requires_grad_(False)
    if dtype == torch.bfloat16:
        for name, module in student.named_modules():
            is_matrix = isinstance(module, (torch.nn.Linear, torch.nn.Conv3d))
            if is_matrix and "time_embedder" not in name or name.endswith(("norm_q", "norm_k")):
                module.to(dtype)
    return student


def student_velocity(bench: Bench, student: Any, dtype: torch.dtype) -> Callable:
    """Return the student's velocity of a random prompt, as a function of (latents, timestep)."""
    tokens = torch.randn(1, 49, bench.shape["text_dim"], device=bench.device, dtype=dtype)
    logit_bias = torch.zeros(1, 49, device=bench.device)

    def velocity_of(latents, timestep):
        return student(latents.to(dtype), timestep, tokens, text_logit_bias=logit_bias, return_dict=False)[
            0
        ].float()

    return velocity_of


def record_sampling(bench: Bench, name: str, velocity_of: Callable, noise: torch.Tensor) -> None:
    """Record the milliseconds of an image in 4 steps."""
    scheduler = make_scheduler(3.0, (1, 2, 4))
    bench.record("draw", name, ms=round(bench.timed(lambda: sample(velocity_of, noise, scheduler, 4), 5), 1))


def record_graph(bench: Bench, name: str, velocity_of: Callable, noise: torch.Tensor) -> None:
    """Record the milliseconds of one step that is replayed as a CUDA graph."""
    timestep, graph = torch.full((1,), 500.0, device=bench.device), torch.cuda.CUDAGraph()
    for _ in range(3):
        velocity_of(noise, timestep)
    bench.settle()
    with torch.cuda.graph(graph):
        velocity_of(noise, timestep)
    bench.record("draw", name, ms=round(bench.timed(graph.replay, 10), 2))


def record_decoding(bench: Bench, name: str, dtype: torch.dtype) -> None:
    """Record the milliseconds and the memory of decoding one image, by our decoder or by diffusers' own."""
    ours = make_autoencoder({}).to(bench.device, dtype)
    stock_autoencoder = AutoencoderKLWan().to(bench.device).eval() if name == "stock" else None

    def decode(latents: torch.Tensor) -> object:
        if stock_autoencoder is not None:
            return stock_autoencoder.decode(latents.unsqueeze(2))
        return decode_latents(ours, latents)

    latents = torch.randn(1, 16, bench.side, bench.side, device=bench.device)
    used = bench.peak(lambda: decode(latents))
    milliseconds = bench.timed(lambda: decode(latents), 3)
    bench.record(
        "draw", f"decoding {8 * bench.side} px {name}", ms=round(milliseconds, 1), peak_gb=round(used, 2)
    )


@torch.no_grad()
def stock(bench: Bench) -> None:
    """Time an image of diffusers' own pipeline with a student's shape, and prompt embeddings padded to 512 tokens."""
    from diffusers import WanPipeline, WanTransformer3DModel

    config = WanLiteStudent(bench.shape | {"depth": 1}).config
    sizes = {
        name: config[name] for name in ("num_attention_heads", "attention_head_dim", "text_dim", "ffn_dim")
    }
    network = WanTransformer3DModel(**sizes, num_layers=bench.shape["depth"])
    pipeline = WanPipeline(
        None,
        None,
        AutoencoderKLWan().to(bench.device).eval(),
        make_scheduler(3.0, (1, 2, 4)),
        transformer=network.to(bench.device, torch.bfloat16).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    embeddings = torch.randn(1, 512, config["text_dim"], device=bench.device, dtype=torch.bfloat16)
    generate = partial(
        pipeline,
        prompt_embeds=embeddings,
        height=8 * bench.side,
        width=8 * bench.side,
        num_frames=1,
        guidance_scale=1.0,
        num_inference_steps=4,
        output_type="pt",
    )
    name = f"stock pipeline, 4 steps, decoded {8 * bench.side} px"
    bench.record("draw", name, ms=round(bench.timed(generate, 3), 1))


# ---- compiled ----------------------------------------------------------------------------------------------


def compiled(bench: Bench, folder: Path) -> None:
    """Time a training step, an image and the teacher with compiled blocks."""
    step(bench, folder / "compiled", variants=("muon, compiled",), sizes=((64, 32),))
    with torch.no_grad():
        draw_student(bench, torch.bfloat16, is_compiled=True)
    teacher(bench, folder, residencies=(("both", False),), is_compiled=True)


PARTS = {"right": right, "step": step, "teacher": teacher, "draw": draw, "compiled": compiled}


# ---- the script --------------------------------------------------------------------------------------------


def record_machine(bench: Bench) -> None:
    """Record the device, and its rates of matrix products and of copies."""
    bench.record(
        "machine",
        torch.cuda.get_device_name() if bench.is_gpu else "cpu",
        torch=torch.__version__,
        cudnn=torch.backends.cudnn.version(),
        threads=torch.get_num_threads(),
    )
    bench.rate = measure_matrix_rate(torch.device(bench.device), torch.bfloat16)
    numbers = torch.empty((2**30 if bench.is_gpu else 2**20), dtype=torch.int32, device=bench.device)
    copied = bench.timed(numbers.clone, 5)
    bandwidth = round(2 * numbers.nbytes / copied / 1e9, 2)
    bench.record("machine", "rates", bf16_tflops=round(bench.rate / 1e12), copy_tb_s=bandwidth)


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--parts", nargs="+", default=list(NEEDS), choices=list(NEEDS))
    parser.add_argument("--seconds", type=float, default=500, help="skip a part that would end later")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to test the script itself")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    return parser.parse_args()


def main() -> int:
    """Run the parts that fit in the time; returns 1 if a measurement failed."""
    options = read_options()
    bench = Bench(options.device, options.small, options.json)
    record_machine(bench)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        for part in options.parts:
            left = options.seconds - (time.perf_counter() - bench.began)
            if left < NEEDS[part] and not bench.is_small:
                bench.record(part, "left out", seconds_left=round(left))
                continue
            with bench.attempt(part, "all of it"):
                PARTS[part](bench, Path(folder))
    failed = [row["what"] for row in bench.rows if "FAILED" in row]
    print(f"{len(bench.rows)} figures, {len(failed)} failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
