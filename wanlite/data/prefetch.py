"""Batches that are read, and on their way to the device, while the step before them computes."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils._pytree import tree_map

PREFETCHED_BATCHES = 2  # batches that are there before they are asked for


def read_ahead(read, jobs, device, ahead=PREFETCHED_BATCHES):
    """Yield `read(job)`, tensors in dicts and tuples, for each of `jobs` in their order, with its tensors on
    `device`.

    One thread reads; it ends with this generator, also where that is closed early. What `read` raises is
    raised where its batch would have been. With `ahead` 0 there is no thread: on the CPU, whose cores compute
    the step, nothing is gained by one.
    """
    copies = Copies(device) if torch.device(device).type == "cuda" else Moves(device)
    if not ahead:
        yield from (copies.finish(*copies.start(read(job))) for job in jobs)
        return
    pool, coming = ThreadPoolExecutor(1, thread_name_prefix="reading", initializer=copies.enter), deque()
    try:
        for job in jobs:
            coming.append(pool.submit(lambda job=job: copies.start(read(job))))
            if len(coming) > ahead:
                yield copies.finish(*coming.popleft().result())
        while coming:
            yield copies.finish(*coming.popleft().result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Moves:
    """Tensors moved at once."""

    def __init__(self, device):
        self.device = device

    def enter(self):
        """Prepare a thread."""

    def start(self, batch):
        return tree_map(lambda tensor: tensor.to(self.device), batch), None

    def finish(self, batch, _):
        return batch


class Copies:
    """Tensors copied to a GPU from pinned memory in a stream of their own, beside what computes there."""

    def __init__(self, device):
        self.device, self.stream = torch.device(device), torch.cuda.Stream(device)

    def enter(self):
        """Prepare a thread: each begins on the first GPU, where it would take memory."""
        torch.cuda.set_device(self.stream.device)

    def start(self, batch):
        """Begin to copy, from any thread; returns the copies and the event after which they hold what they
        should.
        """
        with torch.cuda.stream(self.stream):
            copies = tree_map(lambda tensor: tensor.pin_memory().to(self.device, non_blocking=True), batch)
            return copies, self.stream.record_event()

    def finish(self, copies, is_there):
        """Return the copies for the current stream, which waits for them; this thread does not."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(is_there)
        tree_map(
            lambda tensor: tensor.record_stream(stream), copies
        )  # their memory is free only when that has used them
        return copies
