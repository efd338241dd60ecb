"""Jobs -> tensors on disk, shard by shard: each is computed once, by one of the ranks, and written atomically."""

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

SHARD_SIZE = 64  # trajectories or prompts a file; also the batch of the teacher and of the text encoder
EXACT = (
    "timestep",
    "noise_level",
    "first_token",
    "prompt",
    "text",
    "length",
)  # all other tensors are stored in int8
SCALE = "_scale"  # ends the name of the scales of a tensor in int8
MAX_IDLE_SECONDS = 3600  # after which a partial file is taken for that of a killed run


def fill_shards(
    accelerator,
    folder: Path,
    jobs: Sequence[tuple],
    make: Callable[..., dict[str, Tensor]],
    description: str,
    unit: str = "solve",
    in_step: bool = False,
) -> int:
    """Compute the shards that are missing in `folder`, SHARD_SIZE jobs each, shared out over the ranks.

    `make(*columns of the jobs)` returns tensors. With `in_step`, every rank computes as many shards of as many
    jobs as any other: a short shard is filled up with the jobs before it, and a rank without a shard of its own
    computes the last one again and does not write it. Returns the number of shards.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    num_shards = -(-len(jobs) // SHARD_SIZE)
    missing = [index for index in range(num_shards) if not shard_path(folder, index).exists()]
    (missing,) = broadcast_object_list([missing])  # as seen by one rank: others may already be writing
    if rank == 0:
        remove_leftovers(folder)
    mine = missing[rank::ranks]
    if in_step:
        mine += missing[-1:] * (-(-len(missing) // ranks) - len(mine))
    sizes = [min(SHARD_SIZE, len(jobs) - index * SHARD_SIZE) for index in mine]
    is_hidden = rank > 0 or not mine
    with tqdm(total=sum(sizes), desc=description, unit=unit, leave=False, disable=is_hidden) as progress:
        for number, (index, size) in enumerate(zip(mine, sizes)):
            start = index * SHARD_SIZE
            before = min(start, SHARD_SIZE - size) if in_step else 0
            tensors = make(*zip(*jobs[start - before : start + size]))
            if rank + number * ranks < len(missing):
                write_shard(folder, index, _stored(tensors, before))
            progress.update(size)
    accelerator.wait_for_everyone()
    return num_shards


def _stored(tensors, start):
    """Return the rows from `start` on, on the CPU and in the dtypes of a file."""
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

    Of normal values in 64 x 64, an error of 0.01 standard deviations. A value that is not finite makes its scale
    so as well.
    """
    tensor = tensor.float()
    scale = tensor.abs().amax(tuple(range(3, tensor.ndim)) or -1, keepdim=True) / 127
    return (tensor / scale.clamp(min=1e-30)).nan_to_num().round().to(torch.int8), scale


def dequantize(shard: Mapping[str, Tensor], name: str, *index) -> Tensor:
    """Return the entries `index` of a shard's tensor as numbers, whether it is stored in int8 or as it is."""
    values = shard[name][index]
    return values * shard[name + SCALE][index] if name + SCALE in shard else values


def compute_once(accelerator, folder: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of `make()`, {name: tensor} on the CPU, which `folder` keeps."""
    # either all ranks compute it or none: they may need each other
    (is_there,) = broadcast_object_list([shard_path(folder, 0).exists()])
    if not is_there:
        made = make()
        if accelerator.is_main_process:
            write_shard(folder, 0, made)
    accelerator.wait_for_everyone()
    # mapped tensors would lie where the file has them, and sums depend on that
    return {name: tensor.clone() for name, tensor in read_shard(folder, 0).items()}


def write_shard(folder: Path, index: int, tensors: Mapping[str, Tensor]) -> None:
    """Write one shard atomically; other runs may be writing the same one.

    Raises FloatingPointError, and writes nothing, where a tensor is not finite.
    """
    if odd := [name for name, tensor in tensors.items() if not all(map(math.isfinite, tensor.aminmax()))]:
        raise FloatingPointError(
            f"{folder}: {odd[0]} came out NaN or infinite and is not kept. Lower --guidance_scale and "
            f"--guidance_scale_2, add --mixed_precision no, or check the teacher's files."
        )
    partial = folder / f".shard-{index:05d}-{uuid4().hex}.partial"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:  # of the library, for a full disk
        partial.unlink(missing_ok=True)
        raise OSError(f"{partial}: {error}. Free some space; the shards so far are kept.") from None
    os.replace(partial, shard_path(folder, index))


def remove_leftovers(folder: Path) -> None:
    """Delete the partial files of killed runs: those that did not change for MAX_IDLE_SECONDS."""
    for partial in folder.glob(".shard-*.partial"):
        with suppress(FileNotFoundError):  # it has just been renamed
            if time.time() - partial.stat().st_mtime > MAX_IDLE_SECONDS:
                partial.unlink()


def read_shard(folder: Path, index: int) -> dict[str, Tensor]:
    """Return a shard's tensors, memory-mapped."""
    path = shard_path(folder, index)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise OSError(
            f"{path}: no such file. The machines of a run need one disk under --output_dir and --cache_dir; on one "
            f"machine, it was deleted."
        ) from None
    except SafetensorError as error:
        raise OSError(f"{path}: damaged ({error}). Delete it: the same command computes it again.") from None


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"
