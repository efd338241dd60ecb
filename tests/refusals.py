"""Limits on the time and memory of a rejection, and the config of the student that the tests break."""

import contextlib
import gc
import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from train_distillation import WanLiteStudent

SMALL = dict(
    hidden_size=16,
    depth=1,
    num_heads=2,
    ffn_dim=32,
    num_channels=4,
    text_dim=8,
    freq_dim=256,
    patch_size=[1, 2, 2],
    cross_attn_norm=True,
    eps=1e-6,
    rope_max_seq_len=32,
)
EXECUTED = "executed"  # the file that a payload would leave
MAX_SECONDS, MAX_MEGABYTES, MAX_LETTERS = 1, 200, 3000
ALARM = 10  # seconds, after which a load counts as blocked
REFUSED = []  # Cost of each refusal in a test


class Blocked(BaseException):
    """A load did not return."""


class Cost(NamedTuple):
    seconds: float
    busy: float  # CPU time of this process, which other load on the machine does not change
    megabytes: float


def process_memory(name):
    """Return a line of /proc/self/status in MB."""
    return next(
        int(line.split()[1]) / 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name)
    )


def state():
    """Return the state that a load may not change: torch's settings, threads and open files."""
    counted = [
        len(os.listdir(folder)) for folder in ("/proc/self/task", "/proc/self/fd") if os.path.isdir(folder)
    ]
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        threading.active_count(),
        *counted,
    )


@contextlib.contextmanager
def watched(costs):
    """Append the cost of the block to `costs`; fail if it does not return or changes the state."""

    def raise_blocked(*_):
        raise Blocked

    before, resident = state(), None
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM is the peak from here on
        resident = process_memory("VmRSS:")
    previous = signal.signal(signal.SIGALRM, raise_blocked)
    signal.setitimer(signal.ITIMER_REAL, ALARM)
    gc.freeze()  # the objects of imports and other tests, through which collections would look
    start, work = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        seconds, busy = time.perf_counter() - start, time.process_time() - work
        gc.unfreeze()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert state() == before
    costs.append(Cost(seconds, busy, 0 if resident is None else process_memory("VmHWM:") - resident))


def check_refused(arguments, error, words):
    costs = []
    with watched(costs), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            WanLiteStudent.from_pretrained(**arguments)
        except (OSError, ValueError, TypeError) as refused:
            raised, message = type(refused), str(refused)
        else:
            pytest.fail("the student was loaded")
    assert raised is error, message  # not a subclass, such as the errors of the libraries
    assert [word for word in words if word not in message] == [], message
    assert len(message) < MAX_LETTERS and message.isprintable(), message[:MAX_LETTERS]
    assert costs[0].busy < MAX_SECONDS and costs[0].megabytes < MAX_MEGABYTES, costs[0]
    REFUSED.extend(costs)


def check_broken(folder, broken, error, words):
    """Break a folder and load it."""
    arguments = broken(folder) or {}
    if folder.exists():
        os.utime(folder, (0, 0))  # no save is under way there, so the folder is read only once
    check_refused({"pretrained_model_name_or_path": folder} | arguments, error, words)


def rows(*tables):
    """Return parameters whose ids are the first entries of the rows."""
    return [
        pytest.param(broken, error, words, id=sentence.encode("unicode_escape").decode()[:120])
        for table in tables
        for sentence, broken, error, *words in table
    ]
