"""Correctness, speed and memory on one GPU, in eight minutes.

    python benchmarks/gpu.py --json gpu.json                # on an H100 or H200, all parts, about 480 s
    python benchmarks/gpu.py --parts right step             # some of them
    python benchmarks/gpu.py --device cpu --small           # dry: tiny shapes, on a machine without a GPU

Parts: right (runs of the tiny teacher on the GPU), step (a training step from the cache), teacher (guided passes at
A14B's shape, random weights, by residency), draw (an image in 4 steps), compiled (the same, compiled). A part begins
only while --seconds allow it; every figure is printed and written at once; a failure is named, and the rest follows.
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
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

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

BEGAN, ROWS = time.perf_counter(), []
NEEDS = {"right": 100, "step": 70, "teacher": 150, "draw": 60, "compiled": 120}  # seconds, with a margin


def say(part, what, **figures):
    """Print one figure, and keep it."""
    row = {"part": part, "what": what, "at": round(time.perf_counter() - BEGAN, 1)} | figures
    ROWS.append(row)
    print(
        f"{row['at']:6.1f}s  {part:9} {what:40} " + "  ".join(f"{k} {v}" for k, v in figures.items()),
        flush=True,
    )
    if ARGS.json:
        ARGS.json.write_text(json.dumps(ROWS, indent=1) + "\n")


@contextlib.contextmanager
def attempt(part, what):
    """Name a failure, and go on."""
    try:
        yield
    except Exception as error:  # of whatever kind: GPU time is short
        traceback.print_exc(limit=4)
        say(part, what, FAILED=f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
    finally:
        if GPU:
            torch.cuda.empty_cache()


def settle():
    if GPU:
        torch.cuda.synchronize()


def timed(work, repeats, warming=2):
    """Return the median milliseconds of `work()`."""
    for _ in range(warming):
        work()
    found = []
    for _ in range(repeats):
        settle()
        began = time.perf_counter()
        work()
        settle()
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found)


def peak(work):
    """Return the GB that torch has allocated at the peak of `work()`, all that lies there included."""
    if not GPU:
        work()
        return 0.0
    settle()
    torch.cuda.reset_peak_memory_stats()
    work()
    settle()
    return torch.cuda.max_memory_allocated() / 1e9


# ---- is it right ---------------------------------------------------------------------------------------------------------------

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
    "--few_steps",
    "1",
    "2",
    "4",
]
RUNS = {
    "no, both, matching": ["--mixed_precision=no", "--matching_steps=4"],
    "bf16, one, images of two shapes": [
        "--mixed_precision=bf16",
        "--teacher_residency=one",
        "--aspect_ratios",
        "1:1",
        "3:2",
    ],
    "bf16, streamed, fp8": ["--mixed_precision=bf16", "--teacher_residency=streamed", "--teacher_fp8"],
    "bf16, disk, checkpointing": [
        "--mixed_precision=bf16",
        "--teacher_residency=disk",
        "--gradient_checkpointing",
    ],
    "fp16, both, fp8": ["--mixed_precision=fp16", "--teacher_fp8", "--teacher_residency=both"],
}


def right(folder):
    """Train by every way at once, in processes of their own, then draw with what came out."""
    started = {
        name: subprocess.Popen(
            [
                sys.executable,
                ROOT / "train_distillation.py",
                f"--output_dir={folder / str(index)}",
                *STAGES,
                *flags,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for index, (name, flags) in enumerate(RUNS.items())
    }
    with attempt("right", "dtypes and kernels"):
        kernels()
    for index, (name, run) in enumerate(started.items()):
        with attempt("right", name):
            said = run.communicate(timeout=150)[0]
            if run.returncode:
                print(said[-3000:], flush=True)
                raise RuntimeError(f"exit code {run.returncode}")
            losses = [
                json.loads(line) for line in (folder / str(index) / "metrics.jsonl").read_text().splitlines()
            ]
            say(
                "right",
                name,
                rc=run.returncode,
                records=len(losses),
                loss=[value for line in losses for key, value in line.items() if key.endswith("loss")][:1],
                last=losses[-1],
            )
    for dtype in ("float32", "bfloat16"):
        with attempt("right", f"run_inference {dtype}"):
            done = subprocess.run(
                [
                    sys.executable,
                    ROOT / "run_inference.py",
                    "--model",
                    folder / "0",
                    "--dtype",
                    dtype,
                    "--output_dir",
                    folder / dtype,
                ],
                capture_output=True,
                text=True,
                timeout=60,
                cwd=ROOT,
            )
            say(
                "right",
                f"run_inference {dtype}",
                rc=done.returncode,
                said=done.stdout.splitlines()[-1][-90:] if done.stdout else done.stderr[-200:],
            )


def kernels():
    """Report the dtype of a norm under autocast, and the kernels that a block calls."""
    student = WanLiteStudent(hidden_size=256, depth=1, num_heads=4, text_dim=64).to(DEVICE)
    seen = {}
    student.blocks[0].attn1.norm_q.register_forward_hook(
        lambda module, inputs, output: seen.update(into=inputs[0].dtype, out=output.dtype)
    )
    latents, text = torch.randn(2, 16, 32, 32, device=DEVICE), torch.randn(2, 13, 64, device=DEVICE)
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * GPU
    with torch.profiler.profile(activities=activities) as profile:
        with torch.autocast(DEVICE, torch.bfloat16):
            (velocity,) = student(
                latents,
                torch.full((2,), 500.0, device=DEVICE),
                text,
                text_logit_bias=torch.zeros(2, 13, device=DEVICE),
                return_dict=False,
            )
        velocity.float().square().mean().backward()
        settle()
    names = sorted(
        {
            event.key
            for event in profile.key_averages()
            if re.search("attention|fmha|flash|cudnn|conv", event.key)
        }
    )
    say("right", "norm of queries under autocast", into=str(seen["into"]), out=str(seen["out"]))
    say("right", "attention and convolution calls", found=[name[:60] for name in names][:14])


# ---- a training step -------------------------------------------------------------------------------------------------------------


def world_of(folder, side, batch):
    files = speed.random_teacher(A14B, DEVICE)
    return speed.make_world(folder / f"{side}-{batch}", files, SHAPE, side, batch, DEVICE, "bf16")


def step(folder, ways=("ours", "muon", "muon, cuDNN", "plain"), sizes=((64, 32), (128, 8))):
    for side, batch in sizes if not ARGS.small else ((8, 4),):
        world = world_of(folder, side, batch)
        for name in ways:
            with attempt("step", f"{name} {8 * side} px"):
                torch.backends.cuda.enable_cudnn_sdp("cuDNN" in name)
                way = {"plain": lambda: speed.plain(world), "ours": lambda: speed.ours(world)}.get(name) or (
                    lambda: speed.ours(world, muon_rate=0.09, is_compiled="compiled" in name)
                )
                one = way()
                began = time.perf_counter()
                used = peak(lambda: [next(one) for _ in range(4)])
                warmed = time.perf_counter() - began
                each = timed(lambda: next(one), 2 if ARGS.small else 8, 0)
                say(
                    "step",
                    f"{name} {8 * side} px x {batch}",
                    ms=round(each),
                    images_s=round(1e3 * batch / each, 1),
                    peak_gb=round(used, 1),
                    mfu=f"{speed.student_operations(world) / (each / 1e3) / RATE:.1%}",
                    warming_s=round(warmed, 1),
                )
                one.close()
                one = None
    torch.backends.cuda.enable_cudnn_sdp(False)


# ---- the teacher -----------------------------------------------------------------------------------------------------------------


class SharedFiles(ExpertFiles):
    """An expert of random weights; on the CPU all blocks share the memory of one, pinned where it is asked for."""

    place, is_pinned, kept = "cuda", False, {}

    def read(self, name, dtype=torch.float32, rows=None):
        make = partial(torch.empty, self.shape(name), device=DEVICE, dtype=dtype)
        if self.place != "cpu":
            return make().normal_(0, 0.02)
        key = (re.sub(r"^blocks\.\d+\.", "blocks.", name), dtype, self.is_pinned)
        if key not in self.kept:
            tensor = make().normal_(0, 0.02).cpu()
            self.kept[key] = tensor.pin_memory() if self.is_pinned and GPU else tensor
        return self.kept[key]


class QuickTeacher(Teacher):
    """Casts to float8 on the GPU, an expert at a time: on the CPU that takes longer than all the rest."""

    def _load(self, files):
        if not self.is_fp8 or self.residency != "both":
            return super()._load(files)
        expert = load_expert(files, self.device, self.dtype)
        expert.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=self.dtype)
        return expert


def shared_teacher(residency):
    with torch.device("meta"):
        shapes = {
            name: tuple(t.shape)
            for name, t in make_expert(ExpertFiles("high", Path(), A14B, {}), A14B["num_layers"])
            .state_dict()
            .items()
        }
    experts = {
        name: SharedFiles(name, Path(), A14B, {key: (Path(), key, shape) for key, shape in shapes.items()})
        for name in ("high", "low")
    }
    for files in experts.values():
        files.place, files.is_pinned = (
            ("cpu" if residency in ("one", "streamed") else DEVICE),
            residency == "streamed",
        )
    return TeacherFiles(Path(), "diffusers", experts, 0.875)


def teacher(
    folder, ways=(("both", False), ("streamed", False), ("one", False), ("both", True)), is_compiled=False
):
    dtype, side, words = torch.bfloat16, 64 if not ARGS.small else 8, 48
    rows = 32 if not ARGS.small else 2  # guided pictures: 65,536 tokens of 512 px with the negative prompt
    text = pack_text([torch.randn(words, A14B["text_dim"])] * rows).to(DEVICE)
    latents = torch.randn(rows, 16, side, side, device=DEVICE)
    operations = pass_operations(A14B, 2 * rows, (side // 2) ** 2, words + 1)
    for residency, is_fp8 in ways:
        name = f"{residency}{', fp8' * is_fp8}{', compiled' * is_compiled}"
        with attempt("teacher", name):
            files = shared_teacher(residency)
            told = count_teacher_bytes(files, residency, dtype, is_fp8)[0] + count_pass_bytes(
                files, 2 * rows, (side, side), dtype, partial(simulate_peak, device_type=DEVICE)
            )
            one = QuickTeacher(files, DEVICE, dtype, residency, is_fp8)
            if is_compiled:
                for expert in ("high", "low"):
                    one.expert(expert).compile_repeated_blocks()
            began = time.perf_counter()

            def ask(level):
                return one.velocity(
                    latents,
                    torch.full((rows,), level, device=DEVICE),
                    text,
                    text,
                    4.0,
                    3.0,
                    (29 % A14B["num_layers"],),
                )

            used = peak(lambda: (ask(950.0), ask(500.0)))
            loading = time.perf_counter() - began
            each = timed(lambda: ask(500.0), 3 if residency != "one" else 2, 1)
            swap = (
                timed(lambda: (one.expert("high"), one.expert("low")), 1, 0) / 2 if residency == "one" else 0
            )
            say(
                "teacher",
                name,
                s=round(each / 1e3, 2),
                share=f"{operations / (each / 1e3) / RATE:.1%}",
                peak_gb=round(used, 1),
                told_gb=round(told / 1e9, 1),
                loading_s=round(loading, 1),
                **({"swap_s": round(swap / 1e3, 2)} if swap else {}),
            )
            one.unload()
            SharedFiles.kept.clear()
            one = None


# ---- a picture -------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(folder, compiled=False):
    scheduler, side = make_scheduler(3.0, (1, 2, 4)), 128 if not ARGS.small else 8
    for dtype in (torch.bfloat16,) if compiled else (torch.float32, torch.bfloat16):
        student = WanLiteStudent(SHAPE).to(DEVICE).eval().requires_grad_(False)
        if dtype == torch.bfloat16:
            for name, module in student.named_modules():
                if (
                    isinstance(module, (torch.nn.Linear, torch.nn.Conv3d))
                    and "time_embedder" not in name
                    or name.endswith(("norm_q", "norm_k"))
                ):
                    module.to(dtype)
        if compiled:
            student.compile_repeated_blocks()
        for pixels in (side // 2, side):
            text = TextTokens(
                torch.randn(1, 49, SHAPE["text_dim"], device=DEVICE, dtype=dtype),
                torch.zeros(1, 49, device=DEVICE),
            )
            noise = torch.randn(1, 16, pixels, pixels, device=DEVICE)

            def velocity_of(latents, timestep):
                return student(
                    latents.to(dtype),
                    timestep,
                    text.tokens,
                    text_logit_bias=text.logit_bias,
                    return_dict=False,
                )[0].float()

            for cudnn in (False, True):
                with attempt("draw", f"student {8 * pixels} px"):
                    torch.backends.cuda.enable_cudnn_sdp(cudnn)
                    each = timed(lambda: sample(velocity_of, noise, scheduler, 4), 5)
                    say(
                        "draw",
                        f"4 steps {8 * pixels} px {str(dtype)[6:]}{' compiled' * compiled}{' cuDNN' * cudnn}",
                        ms=round(each, 1),
                    )
            torch.backends.cuda.enable_cudnn_sdp(False)
            if GPU and dtype == torch.bfloat16:
                with attempt("draw", f"graph {8 * pixels} px"):
                    at, graph = torch.full((1,), 500.0, device=DEVICE), torch.cuda.CUDAGraph()
                    for _ in range(3):
                        velocity_of(noise, at)
                    settle()
                    with torch.cuda.graph(graph):
                        velocity_of(noise, at)
                    say(
                        "draw",
                        f"one step as a graph {8 * pixels} px{' compiled' * compiled}",
                        ms=round(timed(graph.replay, 10), 2),
                    )
                    del graph
        student = None
    if compiled:
        return
    with attempt("draw", "stock pipeline"):
        stock(side)
    for name, dtype, form, is_cached in (
        ("as it is", torch.float32, None, True),
        ("without its cache", torch.float32, None, False),
        ("bf16, channels last", torch.bfloat16, torch.channels_last, False),
    ):
        with attempt("draw", f"decoding {name}"):
            vae = make_autoencoder({}).to(DEVICE, dtype).eval().requires_grad_(False)
            latents = torch.randn(1, 16, side, side, device=DEVICE, dtype=dtype)
            raw = (
                latents.unsqueeze(2) if form is None else latents.contiguous(memory_format=form).unsqueeze(2)
            )
            decode = (
                (lambda: decode_latents(vae, latents))
                if is_cached
                else (lambda: vae.decoder(vae.post_quant_conv(raw), first_chunk=True))
            )
            used = peak(decode)
            say(
                "draw",
                f"decoding {8 * side} px {name}",
                ms=round(timed(decode, 3), 1),
                peak_gb=round(used, 2),
            )


@torch.no_grad()
def stock(side):
    """A whole picture by diffusers' own pipeline, of a student's shape, text padded to 512 and encoded before."""
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    config = WanLiteStudent(SHAPE | {"depth": 1}).config
    names = ("num_attention_heads", "attention_head_dim", "text_dim", "ffn_dim")
    network = (
        WanTransformer3DModel(**{name: config[name] for name in names}, num_layers=SHAPE["depth"])
        .to(DEVICE, torch.bfloat16)
        .eval()
    )
    pipeline = WanPipeline(
        None, None, AutoencoderKLWan().to(DEVICE).eval(), make_scheduler(3.0, (1, 2, 4)), transformer=network
    )
    pipeline.set_progress_bar_config(disable=True)
    words = torch.randn(1, 512, config["text_dim"], device=DEVICE, dtype=torch.bfloat16)
    each = timed(
        lambda: pipeline(
            prompt_embeds=words,
            height=8 * side,
            width=8 * side,
            num_frames=1,
            guidance_scale=1.0,
            num_inference_steps=4,
            output_type="pt",
        ),
        3,
    )
    say("draw", f"stock pipeline, 4 steps, decoded {8 * side} px", ms=round(each, 1))


def compiled(folder):
    step(folder, ways=("muon, compiled",), sizes=((64, 32),))
    draw(folder, compiled=True)
    teacher(folder, ways=(("both", False),), is_compiled=True)


def main():
    global RATE
    say(
        "machine",
        torch.cuda.get_device_name() if GPU else "cpu",
        torch=torch.__version__,
        cudnn=torch.backends.cudnn.version(),
        threads=torch.get_num_threads(),
    )
    RATE = measure_matrix_rate(torch.device(DEVICE), torch.bfloat16)
    one = torch.empty((2**30 if GPU else 2**20), dtype=torch.int32, device=DEVICE)
    copied = timed(one.clone, 5)
    say("machine", "rates", bf16_tflops=round(RATE / 1e12), copy_tb_s=round(2 * one.nbytes / copied / 1e9, 2))
    one = None
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        for part in ARGS.parts:
            left = ARGS.seconds - (time.perf_counter() - BEGAN)
            if left < NEEDS[part] and not ARGS.small:
                say(part, "left out", seconds_left=round(left))
                continue
            with attempt(part, "all of it"):
                globals()[part](Path(folder))
    failed = [row["what"] for row in ROWS if "FAILED" in row]
    print(f"{len(ROWS)} figures, {len(failed)} failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--parts", nargs="+", default=list(NEEDS), choices=list(NEEDS))
    parser.add_argument("--seconds", type=float, default=500, help="no part begins that would end later")
    parser.add_argument("--small", action="store_true", help="tiny shapes: does the script run at all?")
    parser.add_argument("--json", type=Path)
    ARGS = parser.parse_args()
    DEVICE, GPU = ARGS.device, ARGS.device == "cuda"
    A14B = (
        speed.A14B
        if not ARGS.small
        else speed.A14B | {"num_attention_heads": 2, "ffn_dim": 256, "num_layers": 2, "text_dim": 64}
    )
    SHAPE = (
        student_shape(A14B)
        if not ARGS.small
        else dict(hidden_size=64, depth=2, num_heads=2, num_channels=16, text_dim=64)
    )
    sys.exit(main())
