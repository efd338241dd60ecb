"""A phase's states -> its micro-batches, in the order that its seed decides, from any step on."""

from contextlib import contextmanager
from functools import partial

from ..data.datasets import SeededBatches
from ..data.prefetch import PREFETCHED_BATCHES, read_ahead
from ..runtime.signals import Stopped


@contextmanager
def micro_batches(phase, run, state, teacher_data, prefetched=None):
    """Yield an iterator of a phase's micro-batches from the current step on: (tensors by name, TextTokens).

    The iterator raises Stopped before the next micro-batch where the run was asked to stop. `prefetched` is
    how many are read ahead; None stands for PREFETCHED_BATCHES on CUDA, else 0.
    """
    settings, accelerator = run.settings, run.accelerator
    data, each = phase.data(state, teacher_data, phase.first), settings.gradient_accumulation_steps
    numbers = SeededBatches(
        data.sizes,
        settings.train_batch_size * accelerator.num_processes,
        phase.seed,
        (state.progress.step - phase.first) * each,
        (phase.last - phase.first) * each,
    )
    if prefetched is None:
        prefetched = PREFETCHED_BATCHES if accelerator.device.type == "cuda" else 0
    coming = read_ahead(
        partial(_read, accelerator, data, teacher_data), numbers, accelerator.device, prefetched
    )
    try:
        yield _until_stopped(teacher_data.pace.deal(coming), state, accelerator.num_processes)
    finally:
        coming.close()


def _read(accelerator, data, teacher_data, numbers):
    """Read this process's rows of a micro-batch, and the prompts' embeddings beside them."""
    batch = data.__getitems__(data.in_order(numbers)[accelerator.process_index :: accelerator.num_processes])
    prompts = [teacher_data.training[number] for number in batch["prompt"].tolist()]
    return batch, teacher_data.words.pack(prompts)


def _until_stopped(batches, state, num_processes):
    """Yield batches; several processes stop together, after a step in which any of them was asked to."""
    for batch in batches:
        if state.is_stopping or (num_processes == 1 and state.stop is not None and state.stop.is_set):
            raise Stopped
        yield batch
