"""A dtype or a device as users give it -> torch's own, or one ValueError; what devices can do."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate.utils import parse_flag_from_env

from ..files.dtypes import STUDENT_DTYPES
from ..files.json_files import shorten

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def as_dtype(given: Any) -> torch.dtype | None:
    """Return the dtype of a student's weights, given as a dtype or by name; None and "auto" are None."""
    if given is None or (isinstance(given, str) and given == "auto"):
        return None
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if any(found is getattr(torch, name) for name in STUDENT_DTYPES.values()):
        return found
    raise ValueError(f"dtype {shorten(given)} is unknown, expected float32, float16 or bfloat16.")


def as_device(given: Any) -> torch.device:
    """Return a device, given as a device, by name, by number or as {"": device}; None is the CPU.

    accelerate's names of device maps mean the first GPU, or the CPU if there is none: a student is small.
    """
    given = given[""] if isinstance(given, Mapping) and set(given) == {""} else given
    given = "cpu" if given is None else given
    if isinstance(given, str) and given in DEVICE_MAPS:
        given = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(given)
        if not isinstance(given, torch.device) and given not in (str(found), found.index):
            raise ValueError  # torch counts modulo 256: cuda:256 is its cuda:0
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"device {shorten(given)} is unknown, expected cpu, cuda or cuda:N.") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {shorten(given)} is not available: torch finds {torch.cuda.device_count()} CUDA devices."
        )
    if found.type not in ("cpu", "cuda") and not _has(found):
        raise ValueError(f"device {shorten(given)} cannot hold weights here, expected cpu, cuda or cuda:N.")
    return found


def choose_device(wanted: str | None) -> str:
    """Return the device of --device, by default CUDA if available; raises ValueError if it is missing."""
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    number = int(wanted.partition(":")[2] or 0)
    if wanted.startswith("cuda") and number >= torch.cuda.device_count():
        raise ValueError(
            f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices. Leave the flag out, or name "
            f"cpu."
        )
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: not available on this machine. Leave the flag out, or name cpu.")
    return wanted


def _has(device: torch.device) -> bool:
    """Whether this torch can put a tensor on a device; meta tensors have no content."""
    try:
        return device.type != "meta" and torch.empty(0, device=device).device.type == device.type
    except (RuntimeError, AssertionError):  # of builds without support for the device
        return False


def drawing_dtype(device_type: str, has_bfloat16: bool) -> str:
    """Return the name of the default dtype of inference."""
    return "bfloat16" if device_type == "cuda" and has_bfloat16 else "float32"


def has_bfloat16(device: str | torch.device) -> bool:
    """Whether a device is a GPU that computes in bfloat16 without emulation."""
    if torch.device(device).type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def is_fast_in_bfloat16(device: str | torch.device) -> bool:
    """Whether a device has instructions for bfloat16: such a GPU, or a CPU with AVX-512, AMX or Arm's."""
    if torch.device(device).type != "cpu":
        return has_bfloat16(device)
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def disable_cudnn_attention() -> None:
    """Use the other attention kernels: cuDNN plans anew for each text length and batch size."""
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Use the other attention kernels inside; see disable_cudnn_attention()."""
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    disable_cudnn_attention()
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def capability_of(device: str | torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a CUDA device, None for any other."""
    return torch.cuda.get_device_capability(device) if torch.device(device).type == "cuda" else None


def prefers_cudnn_attention(capability: tuple[int, int] | None) -> bool:
    """Whether cuDNN has the fastest attention without a mask: on Hopper GPUs; it is not deterministic."""
    return capability == (9, 0) and not torch.are_deterministic_algorithms_enabled()


def use_deterministic_kernels() -> None:
    """Choose kernels whose results do not vary from one run to the next; raises in operations that have none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it only costs time


def has_gpu() -> bool:
    """Whether a run will use a GPU: there is one, and accelerate is not set to use the CPU."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def free_memory(device: str | torch.device, sharing: int = 1) -> tuple[int, int]:
    """Return the free bytes on a device, and of the CPU's memory for each of the processes `sharing` it.

    If the device is the CPU, both are the CPU's.
    """
    host = psutil.virtual_memory().available // sharing
    if torch.device(device).type != "cuda":
        return host, host
    torch.cuda.empty_cache()  # memory that torch caches counts as free
    return torch.cuda.mem_get_info(device)[0], host
