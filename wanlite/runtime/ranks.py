"""Several processes of one run: limits, broadcasts, and the end of all when one is lost."""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, str_to_bool

from .launch import local_processes

RANK_TIMEOUT = timedelta(hours=2)  # while rank 0 projects and calibrates, the others wait
_LOST = re.compile(
    r"gloo|NCCL|Connection (closed|reset)|Broken pipe|socket|TCPStore|timed out", re.IGNORECASE
)


def process_group_options() -> InitProcessGroupKwargs:
    """Return the timeout of a rank that waits for the others, as an Accelerator takes it."""
    return InitProcessGroupKwargs(timeout=RANK_TIMEOUT)


def check_devices(environment: Mapping[str, str]) -> None:
    """Refuse more processes on this machine than GPUs, unless accelerate is set to use the CPU."""
    found = torch.accelerator.device_count()
    if 1 < local_processes() > found and not str_to_bool(environment.get("ACCELERATE_USE_CPU", "false")):
        raise ValueError(
            f"accelerate launch started {local_processes()} processes, one for each GPU; torch finds {found}. "
            "Lower its --num_processes, or set ACCELERATE_USE_CPU=true, to share the CPU."
        )


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every rank: numbers that ranks compute may differ in their last bits."""
    return broadcast_object_list([value])[0]


def abort_all_ranks(accelerator: Any, reason: str | None) -> None:
    """Raise OSError with rank 0's reason, if it has one; the other ranks end silently with the same exit code."""
    if reason := broadcast(reason):
        raise OSError(reason) if accelerator.is_main_process else SystemExit(2)


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error of torch means that another rank is gone."""
    return isinstance(error, torch.distributed.DistError) or _LOST.search(str(error)) is not None
