"""from_pretrained and save_pretrained of WanLiteStudent: a folder -> a student in memory, and back."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights

from ..files.dtypes import find_non_finite
from ..files.file_names import CONFIG
from .building import config_defaults
from .checksums import CHECKSUM, check_checksum, sum_words
from .config import student_arguments
from .layout import check_variant
from .loading import open_student
from .saving import check_savable, save_student, strip_compiled_prefix
from .weights import all_tensor_shapes, check_hashes, check_weights, pinned_hashes


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading weights: dtype, device and expected digests."""

    dtype: torch.dtype | None
    device: torch.device
    is_hashed: bool = False
    sha256: Any = None  # one digest, or {file name: digest}


def refuse_unknown(arguments, accepted, left_to_stock):
    """Raise TypeError for arguments that are not accepted; those in `left_to_stock` may be given if they are empty."""
    unknown = {name for name, value in arguments.items() if value or name not in left_to_stock}
    if unknown:
        raise TypeError(
            f"WanLiteStudent.from_pretrained does not take {', '.join(sorted(unknown))}; it takes "
            f"{', '.join(accepted)}. Loading never projects a teacher or quantises: quantise the student after "
            "loading it."
        )


def read_student(student_class, folder, variant, options):
    """Return (constructor arguments, {name: tensor}, {file name: sha256}) of a saved student.

    Headers and config are compared before anything is built. Raises OSError for files that are missing or
    broken, and ValueError for content that is not this student's.
    """
    with open_student(folder, variant) as (config, files):
        try:
            arguments = student_arguments(config, config_defaults(student_class))
        except ValueError as error:
            raise ValueError(f"{files[0].path.parent / CONFIG}: {error}") from None
        check_weights(files, arguments)
        tensors = _read_tensors(student_class, files, options)
        return arguments, tensors, {file.path.name: file.sha256 for file in files}


def _read_tensors(student_class, files, options):
    """Return {name: tensor} on the device of the options; the device checks the weights."""
    pinned, tensors = pinned_hashes(files, options.sha256), {}
    is_hashed = pinned is not None or options.is_hashed
    for file in files:
        sums = {}
        for name, tensor in file.tensors(is_hashed):
            stored = tensor.to(options.device)
            if CHECKSUM in file.metadata:
                sums[name] = sum_words(stored)
            is_kept_in_fp32 = any(part in student_class._keep_in_fp32_modules for part in name.split("."))
            tensors[name] = stored.to(options.device, None if is_kept_in_fp32 else options.dtype)
        check_checksum(file, sums)
    check_hashes(files, pinned)
    for name in find_non_finite(tensors):
        path = next(file.path for file in files if name in file.entries)
        raise ValueError(
            f"{path}: {name} holds NaN or infinity as {tensors[name].dtype}. Load an earlier save, or use a dtype "
            "with a larger range."
        )
    return tensors


def build_student(student_class, arguments, tensors, device):
    """Return a student of these tensors in eval mode, without a second copy of them or random numbers."""
    with init_empty_weights(), torch.random.fork_rng(devices=[]):  # rotary tables are still created
        student = student_class(**arguments)
    student.load_state_dict(tensors, strict=True, assign=True)
    student.rope.to(device)  # the tensors are already on the device
    return student.eval()


def make_loading_info(digests):
    """Return the loading info of diffusers, with the sha256 of each file."""
    lists = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return {name: [] for name in lists} | {"sha256": digests}


def check_save_options(save_directory, safe_serialization, variant, max_shard_size):
    """Raise ValueError for options whose result could not be loaded again."""
    if not safe_serialization:
        raise ValueError(
            "safe_serialization=False requests a pickle; students are saved as safetensors only. Leave it out."
        )
    check_variant(variant)
    if not str(save_directory):
        raise ValueError("save_directory is empty, expected a folder.")
    is_size = isinstance(max_shard_size, str) or isinstance(max_shard_size, int) and max_shard_size >= 1
    if not is_size:
        raise ValueError(
            f"max_shard_size is {max_shard_size!r}, expected bytes, at least 1, or a text such as '5GB'."
        )


def write_student(student, folder, is_main_process, variant, max_shard_size):
    """Save config and weights atomically on the main process; every rank calls it if the student is sharded."""
    if is_main_process is None:
        is_main_process = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    tensors = strip_compiled_prefix(student.state_dict())
    if is_main_process:
        check_savable(tensors, all_tensor_shapes(student.config), folder)
        save_student(folder, _without_path(student.to_json_string()), tensors, variant, max_shard_size)
    return is_main_process


def _without_path(config):
    """Return the JSON text of a config without the path that the student was loaded from."""
    settings = {name: value for name, value in json.loads(config).items() if name != "_name_or_path"}
    return f"{json.dumps(settings, indent=2, sort_keys=True)}\n"
