"""Jobs -> shards of tensors on disk, each computed once by one of the ranks and written atomically.

A shard is named by its jobs, so that a run with more of them reuses the shards of a shorter one. It carries the
sha256 of its tensors and its jobs. Both are checked at the start of a run: a shard that is damaged, or of other
jobs, is computed again.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files.atomic import flush
from ..files.cache import fingerprint
from ..files.dtypes import find_non_finite
from ..files.json_files import check_regular
from ..runtime.progress import track

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
CONTENT, JOBS = "sha256", "jobs"  # keys of the metadata of a shard
CHECKED_AT_ONCE = 4  # shards: each takes a core, and a fast disk keeps up with four
MISSING = "is missing"
MAX_IDLE_SECONDS = 3600  # a partial file that is unchanged for longer belongs to a killed run


def fill_shards(
    accelerator,
    folder: Path,
    jobs: Sequence[tuple],
    make: Callable[..., dict[str, Tensor]],
    description: str,
    in_step: bool = False,
    irreplaceable: str = "",
) -> list[Path]:
    """Compute the missing and damaged shards of SHARD_SIZE jobs in `folder`, divided over the ranks.

    `make(*columns of the jobs)` returns tensors. With `in_step`, all ranks compute the same number of shards of
    the same number of jobs, as a sharded teacher requires: a short shard also computes the jobs before it, and a
    rank without a shard computes the last one without writing it. `irreplaceable` is the name of shards that cannot
    be computed again, in the OSError for a missing or damaged one. Returns the paths of all shards, in the order of
    the jobs.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    jobs_by_shard = [jobs[start : start + SHARD_SIZE] for start in range(0, len(jobs), SHARD_SIZE)]
    paths = [shard_path(folder, index, own_jobs) for index, own_jobs in enumerate(jobs_by_shard)]
    missing = _find_missing(accelerator, paths, jobs_by_shard, irreplaceable)
    if rank == 0:
        remove_leftovers(folder)
    own = missing[rank::ranks]
    if in_step:
        own += missing[-1:] * (-(-len(missing) // ranks) - len(own))
    sizes = [len(jobs_by_shard[index]) for index in own]
    is_hidden = rank > 0 or not own
    with track(sum(sizes), description, is_hidden=is_hidden) as progress:
        for number, (index, size) in enumerate(zip(own, sizes)):
            start = index * SHARD_SIZE
            before = min(start, SHARD_SIZE - size) if in_step else 0
            tensors = make(*zip(*jobs[start - before : start + size]))
            if rank + number * ranks < len(missing):
                write_shard(paths[index], _select_rows(tensors, before), jobs_by_shard[index])
            progress.update(size)
    accelerator.wait_for_everyone()
    return paths


def _find_missing(accelerator, paths, jobs_by_shard, irreplaceable) -> list[int]:
    """Return the shards that are missing or damaged, the same on all ranks; each rank checks a share of them."""
    own = range(len(paths))[accelerator.process_index :: accelerator.num_processes]
    with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:  # hashing needs no lock of Python's
        found = list(pool.map(lambda index: find_fault(paths[index], jobs_by_shard[index]), own))
    # Gathered before a rank writes: all ranks divide the same list.
    faults = sorted(gather_object([(index, fault) for index, fault in zip(own, found) if fault]))
    if faults and irreplaceable:
        index, fault = faults[0]
        raise OSError(
            f"{paths[index]}: {irreplaceable} {fault}, and training is past that step. Put it back, "
            "or add --overwrite to start again."
        )
    for index, fault in faults:
        if fault != MISSING:
            accelerator.print(f"{paths[index]}: {fault}; it is computed again")
    return [index for index, _ in faults]


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
    path = shard_path(folder)
    # All ranks compute the tensors or none does, because a sharded teacher needs all of them.
    (fault,) = broadcast_object_list([accelerator.is_main_process and find_fault(path)])
    if fault:
        if fault != MISSING:
            accelerator.print(f"{path}: {fault}; it is computed again")
        tensors = make()
        if accelerator.is_main_process:
            write_shard(path, tensors)
    accelerator.wait_for_everyone()
    # Copies, because sums depend on the alignment of mapped tensors.
    return {name: tensor.clone() for name, tensor in read_shard(path).items()}


# ---- files -------------------------------------------------------------------------------------------------


def shard_path(folder: Path, index: int = 0, jobs: Sequence[tuple] = ()) -> Path:
    """Return the path of the shard of these jobs, which are those of the run from `index` * SHARD_SIZE on."""
    digest = f"-{fingerprint(jobs)[:16]}" if jobs else ""
    return folder / f"shard-{index:05d}{digest}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor], jobs: Sequence[tuple] = ()) -> None:
    """Write a shard atomically; several runs may write the same one. `jobs` are those that it was computed for.

    Raises FloatingPointError for a tensor that is not finite, before anything is written.
    """
    non_finite = [name for name, tensor in tensors.items() if not all(map(math.isfinite, tensor.aminmax()))]
    if non_finite:
        raise FloatingPointError(
            f"{path.parent}: {non_finite[0]} has NaN or infinity and is not stored. Lower --guidance_scale and "
            "--guidance_scale_2, add --mixed_precision no, or check the teacher's files."
        )
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {CONTENT: _hash_content(stored), JOBS: _describe_jobs(path, jobs)}
    unfinished = path.parent / f".{path.stem}-{uuid4().hex}.partial"
    try:
        save_file(stored, unfinished, metadata)
        flush(unfinished)
    except SafetensorError as error:  # the disk is full
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{unfinished}: {error}. Free some space; complete shards are kept.") from None
    os.replace(unfinished, path)


def _hash_content(tensors):
    """Return a digest of names, dtypes, shapes and bytes, in which the order of the tensors does not count."""
    return fingerprint(
        {
            name: (str(tensor.dtype), tuple(tensor.shape), _hash_bytes(tensor))
            for name, tensor in tensors.items()
        }
    )


def _hash_bytes(tensor):
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().data).hexdigest()


def _describe_jobs(path, jobs):
    """Return a shard's place and jobs in JSON: the shard of another place or name differs."""
    return json.dumps([path.parent.name, path.name, jobs])


def find_fault(path: Path, jobs: Sequence[tuple] = ()) -> str | None:
    """Return how a shard differs from the one written for `jobs`, None if it does not; the file is read once.

    It takes about half a second per GB and core, for the sha256: 15 s for a cache of 30 GB on one core, which is
    then in memory for the first epoch. A shard of an earlier version, without a digest, counts as damaged.
    """
    if not os.path.lexists(path):
        return MISSING
    try:
        check_regular(path)  # safetensors would wait for a pipe
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        is_intact = _hash_content(tensors) == metadata.get(CONTENT)
    except Exception as error:  # of a library, about any bytes
        return f"cannot be read ({str(error).partition(chr(10))[0]})"
    if not is_intact:
        return "differs from its sha256"
    if metadata.get(JOBS) != _describe_jobs(path, jobs):
        return "is of other prompts, seeds or images"
    return _find_misfit(tensors, jobs)


def _find_misfit(tensors, jobs):
    """Return how tensors do not fit the jobs, in case a shard was written by other code."""
    if non_finite := find_non_finite(tensors):
        return f"{non_finite[0]} holds NaN or infinity"
    rows = {
        name: tensor for name, tensor in tensors.items() if name != "text"
    }  # of all prompts in one tensor
    if "text" in tensors and len(tensors["text"]) != tensors["length"].sum():
        return "has another number of tokens than its lengths imply"
    if jobs and (odd := [name for name, tensor in rows.items() if len(tensor) != len(jobs)]):
        return f"has {len(rows[odd[0]])} rows of {odd[0]}, expected {len(jobs)}"
    if jobs and "prompt" in rows and rows["prompt"].tolist() != [job[0] for job in jobs]:
        return "has other numbers of prompts than its jobs"
    return None


def remove_leftovers(folder: Path) -> None:
    """Delete the partial files of killed runs, which have not changed for MAX_IDLE_SECONDS."""
    for partial in folder.glob(".shard-*.partial"):
        with suppress(FileNotFoundError):  # it was renamed in the meantime
            if time.time() - partial.stat().st_mtime > MAX_IDLE_SECONDS:
                partial.unlink()


class Shard(dict):
    """The memory-mapped tensors of a shard that fill_shards() checked, by name."""

    def __init__(self, path: Path):
        self.path, self.version = path, _version(path)
        super().__init__(load_file(path))

    def check_unchanged(self) -> None:
        """Raise OSError if the file was written to since it was opened: behind its new end, reading would be fatal.

        A file that was deleted or replaced by another remains as it was for its readers.
        """
        with suppress(FileNotFoundError):
            inode, *version = _version(self.path)
            if inode == self.version[0] and version != self.version[1:]:
                raise OSError(
                    f"{self.path}: was changed while the run reads it, perhaps by a program that copies files into the "
                    "cache. The same command checks it, and continues from the last checkpoint."
                )


def _version(path):
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def read_shard(path: Path) -> Shard:
    """Open a shard."""
    try:
        return Shard(path)
    except FileNotFoundError:
        raise OSError(
            f"{path}: no such file. All machines of a run need one shared disk under --output_dir and --cache_dir; on "
            "a single machine, the file was deleted."
        ) from None
    except SafetensorError as error:
        raise OSError(f"{path}: damaged ({error}). Delete it; the same command computes it again.") from None
