"""What a user may call a dtype or a device -> torch's own, or one ValueError."""

from collections.abc import Mapping

import psutil
import torch
from accelerate.utils import parse_flag_from_env

SHARED_OUT = ("auto", "balanced", "balanced_low_0", "sequential")
STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what a student's weights are kept in


def as_dtype(asked):
    """Return a dtype that is asked for by itself or by name; None stays None, and "auto", diffusers' word for
    it, is.
    """
    asked = None if isinstance(asked, str) and asked == "auto" else asked
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if asked is None or any(found is dtype for dtype in STORED_DTYPES):
        return found
    raise ValueError(f"dtype {asked!r} is unknown, expected float32, float16 or bfloat16.")


def as_device(asked):
    """Return a device that is asked for by itself, by name, by number or as {"": device}; None is the CPU.

    Of accelerate's words for sharing a model out all are the first GPU, or the CPU: a student is small.
    """
    asked = asked[""] if isinstance(asked, Mapping) and set(asked) == {""} else asked
    asked = "cpu" if asked is None else asked
    if isinstance(asked, str) and asked in SHARED_OUT:
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(asked)
        if not isinstance(asked, torch.device) and asked not in (str(found), found.index):
            raise ValueError  # torch counts modulo 256: cuda:256 is its cuda:0
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"device {asked!r} is unknown, expected cpu, cuda or cuda:N.") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {asked!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices."
        )
    if found.type not in ("cpu", "cuda") and not _has(found):
        raise ValueError(f"device {asked!r} holds no weights here, expected cpu, cuda or cuda:N.")
    return found


def _has(device):
    """Whether this torch can put a tensor there; on meta nothing is put anywhere."""
    try:
        return device.type != "meta" and torch.empty(0, device=device).device.type == device.type
    except (RuntimeError, AssertionError):  # how builds without a device's support say it
        return False


def drawing_dtype(device_type, has_bfloat16):
    """Return the name of the dtype in which a student draws where none is asked for."""
    return "bfloat16" if device_type == "cuda" and has_bfloat16 else "float32"


def has_bfloat16(device):
    """Whether a device computes in bfloat16 itself; of one that is no GPU it is not asked."""
    if torch.device(device).type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def disable_cudnn_attention():
    """Leave attention to the other kernels: cuDNN plans anew for each length of text and number of rows."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def has_gpu():
    """Whether a run will be on a GPU: there is one, and accelerate was not told to leave it."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def free_memory(device, sharing=1):
    """Return the bytes that are free on a device, and in the CPU's memory, which so many processes are
    `sharing`; the same where the device is the CPU."""
    host = psutil.virtual_memory().available // sharing
    if torch.device(device).type != "cuda":
        return host, host
    torch.cuda.empty_cache()  # what torch keeps for later counts as free
    return torch.cuda.mem_get_info(device)[0], host
