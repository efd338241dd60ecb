"""Two processes, one run, on the CPU over gloo: what they learn, how they stop, what is left when one is killed."""

import os
import signal
import socket
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch

import train_distillation
from tests.conftest import SHORT_RUN
from wanlite.checkpoints import checkpoint_path, load_checkpoint
from wanlite.steps import STEPS


def start(rank, work, log):
    """Fork one of two processes as a launcher starts them; returns its number."""
    number = os.fork()
    if number:
        return number
    code = 1
    with open(log, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            code = work(rank)
        except SystemExit as end:
            code = end.code
        except BaseException:
            import traceback
            traceback.print_exc()
    os._exit(code or 0)


def together(work, folder, monkeypatch):
    """Run `work(rank)` in two processes of one group; returns their exit codes and what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}.items():
        monkeypatch.setenv(name, str(value))
    logs = [Path(f"{folder}.rank{rank}") for rank in range(2)]
    numbers = [start(rank, work, log) for rank, log in enumerate(logs)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers]
    return codes, [log.read_text() for log in logs]


def train(folder, monkeypatch, *flags, at=None):
    """Run the command that a user types in two processes; `at` is {(rank, number of a micro-batch): what happens before it}."""
    def as_typed(rank):
        numbers = iter(range(1, 10**6))

        def step(name, *arguments):
            (at or {}).get((rank, next(numbers)), lambda: None)()
            return STEPS[name](*arguments)
        train_distillation.STEPS = {name: partial(step, name) for name in STEPS}
        sys.argv = ["train_distillation.py", "--output_dir", str(folder), *map(str, (*SHORT_RUN, "--train_batch_size", 16, *flags))]
        return train_distillation.main(*train_distillation.read_settings())
    return together(as_typed, folder, monkeypatch)
