"""Micro-batches of a phase from any step on, in an order that depends on the seed alone."""

from contextlib import contextmanager
from functools import partial

from ..data.datasets import SeededBatches
from ..data.prefetch import PREFETCHED_BATCHES, read_ahead
from ..runtime.signals import Stopped


@contextmanager
def micro_batches(phase, run, state, teacher_data, prefetched=None):
    """Yield an iterator of a phase's micro-batches from the current step on: (tensors by name, TextTokens).

    After a signal to stop, the iterator raises Stopped instead of yielding. `prefetched` micro-batches are
    read ahead; None means PREFETCHED_BATCHES on CUDA, else 0.
    """
    accelerator = run.accelerator
    data = phase.data(state, teacher_data, phase)
    numbers = SeededBatches(
        data.sizes,
        phase.batch_size * accelerator.num_processes,
        phase.seed,
        (state.progress.step - phase.first) * phase.accumulation,
        (phase.last - phase.first) * phase.accumulation,
    )
    if prefetched is None:
        prefetched = PREFETCHED_BATCHES if accelerator.device.type == "cuda" else 0
    upcoming = read_ahead(
        partial(_read, accelerator, data, teacher_data), numbers, accelerator.device, prefetched
    )
    try:
        yield _until_stopped(teacher_data.pace.count_batches(upcoming), state, accelerator.num_processes)
    finally:
        upcoming.close()


def _read(accelerator, data, teacher_data, numbers):
    """Return the rows of a micro-batch that belong to this process, and the embeddings of their prompts."""
    batch = data.__getitems__(data.in_order(numbers)[accelerator.process_index :: accelerator.num_processes])
    prompts = [teacher_data.training[number] for number in batch["prompt"].tolist()]
    return batch, teacher_data.prompt_embeddings.pack(prompts)


def _until_stopped(batches, state, num_processes):
    """Yield batches until a signal to stop; several processes stop after the same step."""
    for batch in batches:
        if state.is_stopping or (num_processes == 1 and state.stop is not None and state.stop.is_set):
            raise Stopped
        yield batch
