"""Jobs -> shards of tensors on disk, each computed once by one of the ranks and written atomically."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

SHARD_SIZE = 64  # trajectories or prompts per file; also the batch size of the teacher and the text encoder
EXACT = (
    "timestep",
    "noise_level",
    "first_token",
    "prompt",
    "text",
    "length",
)  # stored as they are; other tensors in int8
SCALE = "_scale"  # suffix of the name of a tensor's scales
MAX_IDLE_SECONDS = 3600  # a partial file that is unchanged for longer belongs to a killed run


def fill_shards(
    accelerator,
    folder: Path,
    jobs: Sequence[tuple],
    make: Callable[..., dict[str, Tensor]],
    description: str,
    unit: str = "solve",
    in_step: bool = False,
) -> int:
    """Compute the missing shards of SHARD_SIZE jobs in `folder`, divided over the ranks; returns their number.

    `make(*columns of the jobs)` returns tensors. With `in_step`, all ranks compute the same number of shards of
    the same number of jobs, as a sharded teacher requires: a short shard also computes the jobs before it, and a
    rank without a shard computes the last one without writing it. The result includes shards that existed.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    num_shards = -(-len(jobs) // SHARD_SIZE)
    missing = [index for index in range(num_shards) if not shard_path(folder, index).exists()]
    (missing,) = broadcast_object_list([missing])  # rank 0's list, since other ranks may already write
    if rank == 0:
        remove_leftovers(folder)
    own = missing[rank::ranks]
    if in_step:
        own += missing[-1:] * (-(-len(missing) // ranks) - len(own))
    sizes = [min(SHARD_SIZE, len(jobs) - index * SHARD_SIZE) for index in own]
    is_hidden = rank > 0 or not own
    with tqdm(total=sum(sizes), desc=description, unit=unit, leave=False, disable=is_hidden) as progress:
        for number, (index, size) in enumerate(zip(own, sizes)):
            start = index * SHARD_SIZE
            before = min(start, SHARD_SIZE - size) if in_step else 0
            tensors = make(*zip(*jobs[start - before : start + size]))
            if rank + number * ranks < len(missing):
                write_shard(folder, index, _select_rows(tensors, before))
            progress.update(size)
    accelerator.wait_for_everyone()
    return num_shards


def _select_rows(tensors, start):
    """Return the rows from `start` on, on the CPU and in the dtypes of a shard."""
    stored = {}
    for name, tensor in tensors.items():
        rows = tensor[start:]
        if name in EXACT:
            stored[name] = rows.cpu()
        else:
            stored[name], stored[name + SCALE] = (part.cpu() for part in quantize(rows))
    return stored


def quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor (n, K, C, ...) in int8 and its scales in float32, one for each of n, K and C.

    The error is 0.01 standard deviations for normal values (64 x 64). The scale of a value that is not finite is
    not finite either.
    """
    tensor = tensor.float()
    scale = tensor.abs().amax(tuple(range(3, tensor.ndim)) or -1, keepdim=True) / 127
    return (tensor / scale.clamp(min=1e-30)).nan_to_num().round().to(torch.int8), scale


def dequantize(shard: Mapping[str, Tensor], name: str, *index) -> Tensor:
    """Return the entries `index` of a shard's tensor, in float32 if it is stored in int8."""
    values = shard[name][index]
    return values * shard[name + SCALE][index] if name + SCALE in shard else values


def compute_once(accelerator, folder: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of `make()`, {name: tensor} on the CPU; they are computed once and kept in `folder`."""
    # All ranks compute the tensors or none does, because a sharded teacher needs all of them.
    (exists,) = broadcast_object_list([shard_path(folder, 0).exists()])
    if not exists:
        tensors = make()
        if accelerator.is_main_process:
            write_shard(folder, 0, tensors)
    accelerator.wait_for_everyone()
    # Copies, because sums depend on the alignment of mapped tensors.
    return {name: tensor.clone() for name, tensor in read_shard(folder, 0).items()}


def write_shard(folder: Path, index: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a shard atomically; several runs may write the same one.

    Raises FloatingPointError for a tensor that is not finite, before anything is written.
    """
    non_finite = [name for name, tensor in tensors.items() if not all(map(math.isfinite, tensor.aminmax()))]
    if non_finite:
        raise FloatingPointError(
            f"{folder}: {non_finite[0]} has NaN or infinity and is not stored. Lower --guidance_scale and "
            "--guidance_scale_2, add --mixed_precision no, or check the teacher's files."
        )
    partial = folder / f".shard-{index:05d}-{uuid4().hex}.partial"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:  # the disk is full
        partial.unlink(missing_ok=True)
        raise OSError(f"{partial}: {error}. Free some space; complete shards are kept.") from None
    os.replace(partial, shard_path(folder, index))


def remove_leftovers(folder: Path) -> None:
    """Delete the partial files of killed runs, which have not changed for MAX_IDLE_SECONDS."""
    for partial in folder.glob(".shard-*.partial"):
        with suppress(FileNotFoundError):  # it was renamed in the meantime
            if time.time() - partial.stat().st_mtime > MAX_IDLE_SECONDS:
                partial.unlink()


def read_shard(folder: Path, index: int) -> dict[str, Tensor]:
    """Return a shard's tensors, memory-mapped."""
    path = shard_path(folder, index)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise OSError(
            f"{path}: no such file. All machines of a run need one shared disk under --output_dir and --cache_dir; on "
            "a single machine, the file was deleted."
        ) from None
    except SafetensorError as error:
        raise OSError(f"{path}: damaged ({error}). Delete it; the same command computes it again.") from None


def shard_path(folder: Path, index: int) -> Path:
    """Return the path of a shard."""
    return folder / f"shard-{index:05d}.safetensors"
