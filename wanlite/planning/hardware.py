"""Settings and a device -> the settings with precision, residency and batch chosen for the hardware if unset."""

from bisect import bisect_right
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch

from ..data.shards import SHARD_SIZE
from ..phases import (
    MAX_VALIDATION_TRAJECTORIES,
    count_states,
    fill_validation_and_rollout,
    plan_phases,
    split_trajectories,
)
from ..runtime.devices import free_memory, has_gpu
from ..runtime.launch import local_processes
from ..teacher.model import choose_residency
from .checks import check_batch, has_compiler
from .machines import planned_machine

LARGE_WIDTH = 1024  # a teacher of this width or wider adapts the run to the hardware
DEFAULT_BATCH_SIZE = 128  # states per step on each device
MEMORY_FRACTION = 0.9  # of the free memory for a default batch, because predictions are slightly low
HARDWARE_SETTINGS = ("mixed_precision", "compile", "train_batch_size", "gradient_accumulation_steps")


def is_large(files):
    """Whether a teacher is large: then unset options adapt to the hardware, and a run that does not fit is refused."""
    return files.width >= LARGE_WIDTH


def measure_free_memory(settings, device: torch.device) -> tuple[int, int]:
    """Return the free bytes on a device and in CPU memory, for one of the processes on this machine.

    With --plan_for they are those of the machine that it names.
    """
    if settings.plan_for is not None:
        return planned_machine(settings.plan_for)
    return free_memory(device, local_processes())


def choose_precision(settings, files):
    """Return the settings with --mixed_precision and --compile filled in if unset."""
    has_bf16 = settings.plan_for is not None or (
        has_gpu() and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    default = "bf16" if is_large(files) and has_bf16 else "no"
    is_compiled = settings.compile
    if is_compiled is None:  # a run with a small teacher takes no longer than compiling
        is_compiled = is_large(files) and has_gpu() and has_compiler() and find_spec("triton") is not None
    return replace(settings, mixed_precision=settings.mixed_precision or default, compile=is_compiled)


def training_dtype(settings):
    """Return the dtype of matrix products."""
    return torch.float32 if settings.mixed_precision == "no" else torch.bfloat16


def place_teacher(settings, files, device):
    """Return the value of --teacher_residency, with auto resolved to the first residency that fits."""
    if settings.teacher_residency != "auto":
        return settings.teacher_residency
    return choose_residency(
        files,
        training_dtype(settings),
        settings.teacher_fp8,
        *measure_free_memory(settings, device),
        device.type == "cpu",
        local_processes(),
    )


def fit_to_hardware(settings, estimator, num_trajectories, num_ranks=1):
    """Return the settings with validation, batch size and accumulation filled in if unset.

    `num_trajectories` is that of the last resolution.

    Raises ValueError for a batch that is larger than the data of a phase.
    """
    num_buckets = len(estimator.resolutions[-1].buckets)
    counts = fill_validation_and_rollout(settings, is_large(estimator.files), num_trajectories, num_buckets)
    settings = replace(settings, **counts)
    states = count_states(settings, num_trajectories, plan_phases(settings), num_buckets)
    settings = _fit_batch(settings, estimator, min(states.values()) // num_ranks)
    check_batch(settings, states, num_ranks)
    return settings


def fit_to_cache(settings, estimator, is_given):
    """Return the number of trajectories, at most as many as --cache_gb holds.

    Raises ValueError if it holds less than a shard, or fewer trajectories than the command line sets
    (`is_given`).
    """
    wanted = settings.num_trajectories
    if settings.cache_gb is None:
        return wanted
    num_bytes = partial(_cache_bytes, settings, estimator)
    fitting = bisect_right(range(wanted + 1), 1e9 * settings.cache_gb, key=num_bytes) - 1
    needed = f"{num_bytes(wanted) / 1e9:,.3g} GB"
    if fitting < wanted and is_given:
        raise ValueError(
            f"--num_trajectories {wanted} needs {needed} of cache, and --cache_gb is {settings.cache_gb:g}. Raise "
            f"--cache_gb, or {f'lower --num_trajectories to {fitting}' if fitting > 0 else 'leave it out'}."
        )
    if fitting < min(wanted, SHARD_SIZE):
        least = num_bytes(min(wanted, SHARD_SIZE)) / 1e9
        raise ValueError(
            f"--cache_gb is {settings.cache_gb:g}, which holds less than one file of {SHARD_SIZE} trajectories and "
            f"those of validations: {least:.2g} GB. Raise it."
        )
    return fitting


def _cache_bytes(settings, estimator, num_trajectories):
    """Return the bytes of the cache with this many trajectories, and those of the largest validation."""
    settings = replace(
        settings, validation_trajectories=settings.validation_trajectories or MAX_VALIDATION_TRAJECTORIES
    )
    counts = split_trajectories(settings, num_trajectories)
    return estimator.cache_bytes(settings, counts, settings.validation_trajectories)


def count_states_per_step(settings):
    """Return the number of states of a step on each device, before the batch is fitted, which may lower it."""
    if settings.train_batch_size is None:
        return DEFAULT_BATCH_SIZE
    return settings.train_batch_size * (settings.gradient_accumulation_steps or 1)


def _fit_batch(settings, estimator, num_states):
    """Fill in the batch size and accumulation: the largest micro-batches that fit, of DEFAULT_BATCH_SIZE states."""
    batch_size, accumulation = settings.train_batch_size, settings.gradient_accumulation_steps
    if batch_size is None:
        batch_size = DEFAULT_BATCH_SIZE
        if is_large(estimator.files):
            batch_size = max(1, _largest_batch_size(settings, estimator))
        accumulation = accumulation or DEFAULT_BATCH_SIZE // batch_size
        batch_size = max(1, min(batch_size, num_states))
    return replace(settings, train_batch_size=batch_size, gradient_accumulation_steps=accumulation or 1)


def _largest_batch_size(settings, estimator):
    if settings.matching_steps:
        peak_bytes = estimator.matching_bytes(settings, DEFAULT_BATCH_SIZE)
        base_bytes = estimator.matching_base_bytes(settings)
    else:
        peak_bytes = estimator.training_bytes(settings, DEFAULT_BATCH_SIZE)
        base_bytes = estimator.base_bytes
    free_bytes = MEMORY_FRACTION * estimator.free_bytes
    return fit_batch_size(DEFAULT_BATCH_SIZE, peak_bytes, base_bytes, free_bytes)


def fit_batch_size(batch_size, peak_bytes, base_bytes, free_bytes):
    """Return `batch_size`, or the first of its halves that fits into `free_bytes`; 0 if none does.

    The whole batch needs `peak_bytes`, an empty one `base_bytes`; a part needs at most its share of the
    difference.
    """
    fitting = batch_size
    while fitting and base_bytes + (peak_bytes - base_bytes) * fitting / batch_size > free_bytes:
        fitting //= 2
    return fitting
