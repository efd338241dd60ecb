"""Predicted memory by phase, disk and time of a run; no weight is read or allocated.

Memory is not guessed by formulas: each phase is run once on tensors that have shapes and no contents, and the
bytes that are alive at its peak are counted.
"""

import math
import shutil
import time
import weakref
from contextlib import nullcontext
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..data.trajectories import count_compared
from ..teacher.model import make_expert, pinned_bytes

TEXT = 64  # tokens of a long prompt
TOKENS_A_WORD = 1.3  # of UMT5, in English
EFFICIENCY = 0.4  # of a device's rate for matrices that large transformers reach
H100 = 989e12  # operations a second, in bfloat16
TIMED = 2e10  # the most operations of a step that is timed; where one state takes more, all is reckoned


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still alive: `now`, and `peak`, the most there
    were.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function.namespace == "prim":  # asks a tensor for its device, half of all that is called
            return function(*arguments, **keywords)
        given = {
            tensor.untyped_storage()._cdata
            for tensor in tree_iter((arguments, keywords))
            if isinstance(tensor, torch.Tensor)
        }
        result = function(*arguments, **keywords)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage, given):
        if (
            storage in self._known or storage._cdata in given
        ):  # a view, of what was made inside or of what was there before
            return
        self._known[storage] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size):
        self.now -= size


class GpuNorms(TorchFunctionMode):
    """Computes RMSNorm as a GPU does: in one kernel that keeps its input alone, from torch 2.12 on in float32
    under autocast.
    """

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function is functional.rms_norm:
            tensors = [arguments[0], keywords["weight"]]
            if (
                torch.is_autocast_enabled("cpu") and torch.__version__ >= "2.12"
            ):  # the simulation runs on the CPU
                tensors = [tensor.float() for tensor in tensors]
            return torch.native_layer_norm(tensors[0], arguments[1], tensors[1], None, keywords["eps"])[0]
        return function(*arguments, **keywords)


def simulated_peak(work, device_type="cpu"):
    """Return the bytes alive at the peak of `work()` on a device, which is run without contents and without
    memory.
    """
    fused = GpuNorms() if device_type == "cuda" else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryMeter() as meter, fused:
        work()
    return meter.peak


def at_depth(peak_of, depth):
    """Return `peak_of(depth)` of a network of equal blocks, extrapolated from one block and two."""
    first = peak_of(1)
    return first if depth == 1 else first + (peak_of(2) - first) * (depth - 1)


# ---- memory; `peak(work)` may also be one that measures ----------------------------------------------------


def teacher_bytes(files, residency, dtype, is_fp8, shares=1):
    """Return the bytes of a teacher's weights on the device and in CPU memory; `shares` divide a sharded one."""
    sizes = [expert.num_parameters * (1 if is_fp8 else dtype.itemsize) for expert in files.experts.values()]
    if residency == "both":
        return sum(sizes), 0
    if residency == "one":
        return max(sizes), sum(sizes)
    blocks = [
        sum(
            torch.Size(shape).numel()
            for name, (*_, shape) in expert.places.items()
            if name.startswith("blocks.")
        )
        for expert in files.experts.values()
    ]
    block = max(blocks) // files.config["num_layers"] * dtype.itemsize
    others = max(sizes) - max(blocks) * (1 if is_fp8 else dtype.itemsize)
    if residency == "disk":  # each block is gone before the next is read; both experts' others stay
        return others * len(files.experts) + block, 0
    if residency == "sharded":
        return len(sizes) * others + sum(blocks) * dtype.itemsize // shares + 2 * block, 0
    return others + 2 * block, sum(pinned_bytes(expert, dtype, is_fp8) for expert in files.experts.values())


def pass_peak(files, rows, latent_size, dtype, peak=simulated_peak):
    """Return the bytes that a pass of an expert takes besides its weights, for `rows` latents."""

    def work():
        expert = make_expert(
            next(iter(files.experts.values())), 2
        )  # without gradients the third takes what the second did
        weights.append(sum(tensor.untyped_storage().nbytes() for tensor in expert.parameters()))
        with torch.no_grad():
            expert(
                torch.zeros(rows, files.config["in_channels"], *latent_size),
                torch.zeros(rows),
                torch.zeros(rows, TEXT, files.config["text_dim"]),
                torch.zeros(rows, TEXT),
            )

    weights: list[int] = []
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a network without contents cannot be cast
    try:
        return peak(work) - weights[0]
    finally:
        torch.set_default_dtype(before)


def generation_peak(passing, states, dtype, kept):
    """Return the peak bytes of generating trajectories: a pass needs `passing`, their results `kept`.

    A step has `states` hidden values (trajectories x tokens x width): those of earlier passes are in memory
    during a pass, then all are concatenated and cast to float32 for their projection. At the end the results
    are concatenated.
    """
    return max(kept + max(passing + states * dtype.itemsize, states * (2 * dtype.itemsize + 4)), 2 * kept)


def start_peaks(files, probe, frames, latent_size, peak=simulated_peak):
    """Return the bytes of comparing two experts and of calibrating on `frames` latents, 0 for a skipped one.

    `probe` is (rows, size) of the comparison. Both are in float32, with one block of an expert in memory.
    """
    expert = next(iter(files.experts.values()))
    blocks = sum(
        torch.Size(shape).numel() for name, (*_, shape) in expert.places.items() if name.startswith("blocks.")
    )
    held = 4 * (expert.num_parameters - blocks + blocks // files.config["num_layers"])
    comparing = len(files.experts) * held + pass_peak(files, probe[0], probe[1], torch.float32, peak)
    calibrating = held + pass_peak(files, frames, latent_size, torch.float32, peak) if frames else 0
    return comparing if len(files.experts) > 1 else 0, calibrating


def training_peak(
    make_student, make_optimizers, make_average, rows, latent_size, is_mixed, peak=simulated_peak
):
    """Return the bytes of training: weights, their average, gradients, optimizers and activations of `rows`
    states.
    """

    def work():
        student = make_student()
        optimizers, average = make_optimizers(student), make_average(student)
        latents = torch.zeros(rows, student.config.num_channels, *latent_size)
        for parameter in student.parameters():  # optimizers that have stepped have their memory beside a step
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.step(student.parameters())
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=is_mixed):
            (velocity,) = student(
                latents,
                torch.zeros(rows),
                torch.zeros(rows, TEXT, student.config.text_dim),
                text_logit_bias=torch.zeros(rows, TEXT),
                return_dict=False,
            )
        (velocity.float() - latents).square().mean().backward()

    return peak(work)


def decoding_peak(make_autoencoder, decode, rows, latent_shape, peak=simulated_peak):
    """Return the bytes of an autoencoder and of decoding `rows` latents with `decode(autoencoder, latents)`."""

    def work():
        with torch.no_grad():
            decode(make_autoencoder(), torch.zeros(rows, *latent_shape))

    return peak(work)


# ---- disk and time -----------------------------------------------------------------------------------------


def generation_bytes(num_trajectories, num_steps, latent_shape, num_tokens, width):
    """Return the bytes in memory of trajectories under way: latents and velocities of each state, in float32, and
    hidden states of a width of some tokens, in float16."""
    state = 4 * 2 * math.prod(latent_shape) + 2 * count_compared(num_tokens) * width
    return num_trajectories * num_steps * state


def trajectory_bytes(num_trajectories, num_steps, latent_shape, num_tokens, width):
    """Return the bytes on disk of trajectories: latents and velocities of each state, and hidden states of a width
    of some tokens, all in int8 with float32 scales.
    """
    pixels, num_compared = math.prod(latent_shape[1:]), count_compared(num_tokens)
    state = 2 * latent_shape[0] * (pixels + 4) + num_compared * (width + 4) + 16
    return num_trajectories * num_steps * state


def text_bytes(prompts, width):
    """Return the bytes on disk of prompts' embeddings of a width, in bfloat16; none is tokenized."""
    return 2 * width * round(sum(1 + TOKENS_A_WORD * len(prompt.split()) for prompt in prompts))


def estimate(student, files, passes, states, tokens, latent_size, device, dtype):
    """Return in words how long `passes` of the teacher and training on `states` take: by timing a small
    student, a large one's operations by how fast the device multiplies matrices."""
    teacher = files.num_parameters / len(files.experts)
    one_state = 6 * tokens * student.num_parameters()
    if one_state > TIMED:
        operations = 2 * tokens * (passes * teacher + 3 * states * student.num_parameters())
        rate = matrix_rate(device, dtype)
        hours = [operations / (EFFICIENCY * each * 3600) for each in (rate, H100)]
        slower = matrix_rate(device, torch.float32) / rate if dtype != torch.float32 else 1
        return (
            f"about {hours[0]:,.1f} hours ({operations / 1e15:,.0f} PFLOP; an H100 would take "
            f"{hours[1]:,.1f} hours)"
            + (
                f"; {slower:,.1f} times less without --mixed_precision, for this device is slow in it"
                if slower > 1.2
                else ""
            )
        )
    twin, rows = type(student)(dict(student.config)).to(device), int(min(64, TIMED // one_state))
    words = torch.zeros(rows, 24, student.config.text_dim, device=device)
    latents = torch.randn(rows, student.config.num_channels, *latent_size, device=device)
    seconds: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        twin(latents, torch.full((rows,), 500.0, device=device), words, return_dict=False)[
            0
        ].mean().backward()
        seconds.append(time.perf_counter() - began)
    each = min(seconds) / rows
    return f"about {max(1, round((each * states + each / 3 * teacher / student.num_parameters() * passes) / 60)):,} minutes"


def matrix_rate(device, dtype, widest=8192, patience=0.02):
    """Return the operations a second that a device multiplies matrices of a dtype with: of ever larger ones
    while these are quick.

    Products that take longer than `patience` seconds are the last: some CPUs are a thousand times slower than
    a GPU in bfloat16.
    """
    width, fastest = 128, 0.0
    first = torch.ones(width, width, device=device, dtype=dtype)
    (first @ first)[0, 0].item()  # not timed: on a GPU it loads a library first
    while width <= widest:
        matrix = torch.randn(width, width, device=device).to(dtype)
        seconds: list[float] = []
        while len(seconds) < 3 and sum(seconds) < 3 * patience:
            began = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits until it is there
            seconds.append(time.perf_counter() - began)
        fastest = max(fastest, 2 * width**3 / min(seconds))
        if min(seconds) > patience:
            break
        width *= 2
    return fastest


def free_disk(folder):
    """Return the bytes that are free where a folder is, or will be."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def bytes_there(folder, *apart):
    """Return the bytes of the files in a folder, without those in folders `apart` that may lie in it."""
    others = [Path(each).absolute() for each in apart]
    return sum(
        path.stat().st_size
        for path in Path(folder).absolute().rglob("*")
        if path.is_file() and not any(path.is_relative_to(each) for each in others)
    )


# ---- report ------------------------------------------------------------------------------------------------


def largest_batch(rows, peak, rest, free):
    """Return the largest of `rows` and its halves that fits into `free` bytes, 0 where none does.

    `peak` is what all rows take, `rest` what is there without any; fewer rows take at most their share of the
    difference.
    """
    fits = rows
    while fits and rest + (peak - rest) * fits / rows > free:
        fits //= 2
    return fits


def report(phases, disk, device, free, residency=None, placed=None, rows=0, accumulated=0, rest=0):
    """Print the bytes of `phases` and `disk`, {name: bytes}, and what is free; return the problems in words.

    `placed` is {residency: teacher_bytes()}, None if the teacher does not run; `rest` is what training
    takes without activations.
    """
    print(f"memory   {gigabytes(free)} free on {device}")
    for name, needed in phases.items():
        print(f"  {gigabytes(needed):>10}  {name}")
    if placed:
        _print_residencies(phases["trajectories"], residency, placed)
    rooms, missing = {place: free_disk(place) for place in disk}, _print_disk(disk)
    problems = _memory_problems(phases, free, residency)
    if phases.get("training", 0) > free:
        problems.append(_smaller_batch(phases["training"], free, rows, accumulated, rest))
    return problems + _disk_problems(missing, rooms, placed)


def _print_residencies(needed, residency, placed):
    rest_of_pass = needed - placed[residency][0]
    predicted = [
        f"{place} {gigabytes(rest_of_pass + held)}{f' (+ {gigabytes(beside)} CPU)' if beside else ''}"
        for place, (held, beside) in placed.items()
    ]
    print(f"experts  {residency}; trajectories by --teacher_residency: {', '.join(predicted)}")


def _print_disk(disk):
    """Print the bytes that each folder needs; returns {folder: bytes that are still to be written}."""
    print("disk")
    missing = {}
    for place, needed in disk.items():
        others = (other for other in disk if Path(other).is_relative_to(place) and other != place)
        there = bytes_there(place, *others)
        missing[place] = needed - min(needed, there)
        written = f"{gigabytes(there)} are there, " if there else ""
        print(f"  {gigabytes(needed):>10}  {place} ({written}{gigabytes(free_disk(place))} free)")
    return missing


def _memory_problems(phases, free, residency):
    """Return what to change for each phase but training that needs more than the `free` bytes."""
    remedies = {
        "text": "the text encoder does not fit: run where more memory is free.",
        "trajectories": "the teacher's passes do not fit: "
        + ("lower --resolution." if residency == "disk" else "add --teacher_residency disk."),
        "validation": "validation does not fit: lower --validation_trajectories.",
        "start": "projecting does not fit: run where more memory is free; a start in --cache_dir is reused.",
    }
    problems = [remedy for name, remedy in remedies.items() if phases.get(name, 0) > free]
    if phases.get("matching", 0) > free >= phases["training"]:
        problems.append(
            "distribution matching does not fit: leave --matching_steps out, or lower --train_batch_size."
        )
    return problems


def _smaller_batch(needed, free, rows, accumulated, rest):
    """Return the batch size with which training fits, as advice."""
    fits = largest_batch(rows, needed, rest, free)
    if not fits:
        return "training does not fit at any batch: add --gradient_checkpointing, or lower --resolution."
    return (
        f"training does not fit: lower --train_batch_size to {fits} and raise --gradient_accumulation_steps to "
        f"{accumulated * rows // fits}."
    )


def _disk_problems(missing, rooms, placed):
    """Return what to change for each folder that has less room than `missing` bytes; folders on one disk share it."""
    if len(set(rooms.values())) == 1:
        missing = {next(iter(rooms)): sum(missing.values())}
    remedy = (
        "Lower --num_trajectories, or name a larger --cache_dir."
        if placed
        else "Name another --cache_dir or --output_dir."
    )
    return [
        f"the disk is too small: {gigabytes(needed, math.ceil)} are to be written in {place}, "
        f"{gigabytes(rooms[place], math.floor)} are free. {remedy}"
        for place, needed in missing.items()
        if needed > rooms[place]
    ]


def gigabytes(size, rounded=round):
    """Return a size in words; two that are compared are `rounded` apart, so that they never look equal."""
    unit, name = (1e9, "GB") if size >= 1e8 else (1e6, "MB")
    return f"{rounded(10 * size / unit) / 10:,.1f} {name}"
