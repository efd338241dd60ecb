"""The work of a run and a device -> an estimate of the time it takes."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..teacher.expert_files import TeacherFiles
from .part_plan import PartWork
from .resolutions import Resolution

EFFICIENCY = 0.4  # of a device's rate of matrix products, as large transformers reach
H100_RATE = 989e12  # operations per second in bfloat16
MAX_TIMED_OPERATIONS = 2e10  # of one state; a larger student is not timed
MAX_TIMED_BATCH_SIZE = 64
TIMED_TEXT_TOKENS = 24
NUM_TIMINGS = 3
UNITS = {"years": 8766, "months": 730.5, "weeks": 168, "days": 24, "hours": 1}  # in hours
SLOW_PRECISION = 1.2  # float32 is recommended if it is faster than mixed precision by this factor


@dataclass(frozen=True)
class Workload:
    """The image tokens in the passes of the teacher and in the training states of a run.

    A student is timed on images of `resolution`. `parts` is the work on small parts, None without any.
    """

    student: Any
    files: TeacherFiles
    teacher_tokens: int
    student_tokens: int
    resolution: Resolution
    parts: PartWork | None = None

    @property
    def teacher_parameters(self) -> float:
        """The parameters that a pass of the teacher uses: those of one expert."""
        return self.files.num_parameters / len(self.files.experts)

    @property
    def operations_per_state(self) -> int:
        """The operations of a forward and a backward pass of the student on one state."""
        return 6 * self.resolution.tokens * self.student.num_parameters()

    @property
    def operations(self) -> float:
        """The operations of the run, without those of small parts."""
        passes = 2 * self.teacher_tokens * self.teacher_parameters
        return passes + 6 * self.student_tokens * self.student.num_parameters()

    @property
    def h100_hours(self) -> float:
        """The hours of the run on an H100, without those of small parts."""
        return h100_hours(self.operations)


def h100_hours(operations: float) -> float:
    """Return the hours of operations in bfloat16 on an H100."""
    return operations / (EFFICIENCY * H100_RATE * 3600)


def estimate_duration(work: Workload, device, dtype) -> str:
    """Return the estimated time, by timing a small student, or from the operations of a large one."""
    if work.operations_per_state > MAX_TIMED_OPERATIONS:
        return _describe_operations(work, device, dtype)
    token_seconds = _time_state(work, device) / work.resolution.tokens
    pass_seconds = token_seconds / 3 * work.teacher_parameters / work.student.num_parameters()
    seconds = token_seconds * work.student_tokens + pass_seconds * work.teacher_tokens
    if work.parts is not None:
        seconds += token_seconds * work.parts.operations / (6 * work.student.num_parameters())
    return describe_hours(seconds / 3600)


def _describe_operations(work, device, dtype):
    rate = measure_matrix_rate(device, dtype)
    operations = work.operations + (work.parts.operations if work.parts else 0)
    hours = operations / (EFFICIENCY * rate * 3600)
    text = f"{describe_hours(hours)} on this {'GPU' if device.type == 'cuda' else 'CPU'}; {describe_h100_hours(work)}"
    speedup = measure_matrix_rate(device, torch.float32) / rate if dtype != torch.float32 else 1
    if speedup > SLOW_PRECISION:
        text += f"; {speedup:,.1f} times faster without --mixed_precision, which is slow on this device"
    return text


def describe_hours(hours: float) -> str:
    """Return a duration in the largest unit of which it has at least 1.5, or in minutes."""
    name, unit = next((item for item in UNITS.items() if hours >= 1.5 * item[1]), ("minutes", 1 / 60))
    count = round(hours / unit)
    return f"about {count:,} {name}" if count > 1 else "about a minute"


def describe_h100_hours(work: Workload) -> str:
    """Return the time of the work on an H100, which compares runs, and its operations."""
    hours, operations = work.h100_hours, work.operations
    if work.parts is not None:
        hours += h100_hours(work.parts.h100_operations)
        operations += work.parts.operations
    return f"{format_hours(hours)} hours on an H100 ({operations / 1e15:,.0f} PFLOP)"


def format_hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 0.05 else "below 0.1"


def describe_part_hours(parts: PartWork) -> str:
    """Return the hours of each phase of small parts on an H100, and of the student's images before them."""
    hours = {
        name: h100_hours(sum(cost * count for cost, count in counts.items()))
        for name, counts in parts.by_phase.items()
    }
    return f"hours on an H100: {', '.join(f'{name} {format_hours(each)}' for name, each in hours.items())}"


def _time_state(work, device):
    """Return the seconds of a forward and a backward pass of the student on one state."""
    config = work.student.config
    student = type(work.student)(dict(config)).to(device)
    batch_size = int(min(MAX_TIMED_BATCH_SIZE, MAX_TIMED_OPERATIONS // work.operations_per_state))
    text = torch.zeros(batch_size, TIMED_TEXT_TOKENS, config.text_dim, device=device)
    latents = torch.randn(batch_size, *work.resolution.latent_shape, device=device)
    timestep = torch.full((batch_size,), 500.0, device=device)
    seconds: list[float] = []
    for _ in range(NUM_TIMINGS):
        began = time.perf_counter()
        (velocity,) = student(latents, timestep, text, return_dict=False)
        velocity.mean().backward()
        seconds.append(time.perf_counter() - began)
    return min(seconds) / batch_size


def measure_matrix_rate(device, dtype, max_width=8192, patience=0.02):
    """Return the operations per second of a device's matrix products, measured on ever larger matrices.

    It ends at `max_width`, or once a product takes longer than `patience` seconds: some CPUs are a thousand
    times slower than a GPU in bfloat16.
    """
    width, rate = 128, 0.0
    warmup = torch.ones(width, width, device=device, dtype=dtype)
    (warmup @ warmup)[0, 0].item()  # on a GPU, the first product loads a library
    while width <= max_width:
        matrix = torch.randn(width, width, device=device).to(dtype)
        seconds: list[float] = []
        while len(seconds) < NUM_TIMINGS and sum(seconds) < NUM_TIMINGS * patience:
            began = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits for the result
            seconds.append(time.perf_counter() - began)
        rate = max(rate, 2 * width**3 / min(seconds))
        if min(seconds) > patience:
            break
        width *= 2
    return rate
