"""Several processes, one run: what they agree on, what they need, and how it ends where one of them is lost."""

import re
from datetime import timedelta

import torch
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, str_to_bool

from .launch import local_processes

RANK_TIMEOUT = timedelta(
    hours=2
)  # for which ranks wait for each other: one projects and calibrates, the others cannot go on
_LOST = re.compile(
    r"gloo|NCCL|Connection (closed|reset)|Broken pipe|socket|TCPStore|timed out", re.IGNORECASE
)


def patience():
    """Return how long a rank waits for the others, as an Accelerator takes it."""
    return InitProcessGroupKwargs(timeout=RANK_TIMEOUT)


def check_devices(environment):
    """Refuse more processes on this machine than it has GPUs, unless accelerate was told that they are to
    share the CPU.
    """
    found = torch.accelerator.device_count()
    if 1 < local_processes() > found and not str_to_bool(environment.get("ACCELERATE_USE_CPU", "false")):
        raise ValueError(
            f"accelerate launch started {local_processes()} processes for as many GPUs here, torch sees "
            f"{found}. "
            "Lower its --num_processes, or set ACCELERATE_USE_CPU=true, and they share the CPU."
        )


def broadcast(found):
    """Return what rank 0 has found, on every rank: numbers that ranks compute may differ in their last bits."""
    return broadcast_object_list([found])[0]


def abort_all_ranks(accelerator, reason):
    """Raise OSError with rank 0's reason, if it has one, there; the other ranks end silently with the same
    exit code.
    """
    if reason := broadcast(reason):
        raise OSError(reason) if accelerator.is_main_process else SystemExit(2)


def is_peer_failure(error):
    """Whether an error of torch's says that another rank is gone."""
    return isinstance(error, torch.distributed.DistError) or _LOST.search(str(error)) is not None
