"""Prefetching: batches are read and copied to the device while the previous step computes."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._pytree import tree_map

PREFETCHED_BATCHES = 2


def read_ahead(
    read: Callable[[Any], Any], jobs: Iterable, device: str | torch.device, ahead: int = PREFETCHED_BATCHES
) -> Generator[Any, None, None]:
    """Yield `read(job)`, tensors in dicts and tuples, on `device` for each of `jobs` in order.

    A thread reads `ahead` batches; it ends with this generator, even if that is closed early. An error of `read`
    is raised in place of its batch. With `ahead` 0, batches are read without a thread: on a CPU, prefetching
    would take cores from the step.
    """
    copies: Copies | Moves = Copies(device) if torch.device(device).type == "cuda" else Moves(device)
    if not ahead:
        yield from (copies.finish(*copies.start(read(job))) for job in jobs)
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="reading", initializer=copies.enter)
    pending: deque[Future] = deque()

    def start(job):
        return copies.start(read(job))

    try:
        for job in jobs:
            pending.append(pool.submit(start, job))
            if len(pending) > ahead:
                yield copies.finish(*pending.popleft().result())
        while pending:
            yield copies.finish(*pending.popleft().result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Moves:
    """Moves tensors to a device synchronously."""

    def __init__(self, device):
        self.device = device

    def enter(self):
        """Prepare a thread."""

    def start(self, batch):
        return tree_map(lambda tensor: tensor.to(self.device), batch), None

    def finish(self, batch, _):
        return batch


class Copies:
    """Copies tensors to a GPU from pinned memory, in a separate stream."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(device)

    def enter(self):
        """Select the GPU of a thread; a new thread would otherwise allocate memory on the first GPU."""
        torch.cuda.set_device(self.stream.device)

    def start(self, batch):
        """Start copying, in any thread; returns the copies and an event that marks their completion."""
        with torch.cuda.stream(self.stream):
            copies = tree_map(lambda tensor: tensor.pin_memory().to(self.device, non_blocking=True), batch)
            return copies, self.stream.record_event()

    def finish(self, copies, completion):
        """Return the copies for use in the current stream, which waits for them without blocking the thread."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(completion)
        tree_map(lambda tensor: tensor.record_stream(stream), copies)  # their memory is not reused before
        return copies
