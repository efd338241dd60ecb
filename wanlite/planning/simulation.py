"""Work on tensors that have shapes and no contents -> the bytes alive at its peak; nothing is allocated."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import UntypedStorage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

FLOAT32_NORMS = "2.12"  # the first torch whose RMSNorm is in float32 under autocast


def simulate_peak(work: Callable[[], Any], device_type: str = "cpu") -> int:
    """Return the bytes alive at the peak of `work()` on a device; it runs on tensors without contents."""
    fused_norms = FusedNorms() if device_type == "cuda" else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryMeter() as meter, fused_norms:
        work()
    return meter.peak_bytes


def extrapolate_depth(peak_of: Callable[[int], int], depth: int) -> int:
    """Return `peak_of(depth)` for a network of equal blocks, extrapolated from one block and two."""
    first = peak_of(1)
    return first if depth == 1 else first + (peak_of(2) - first) * (depth - 1)


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of tensors that are created inside: those alive now, and the most at any time."""

    def __init__(self):
        super().__init__()
        self.alive_bytes = 0
        self.peak_bytes = 0
        self._counted: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "prim":  # reads a tensor's device, which is half of all calls
            return function(*args, **kwargs)
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        outputs = function(*args, **kwargs)
        for storage in _storages(outputs):
            if storage._cdata not in inputs and storage not in self._counted:  # else a view
                self._count(storage)
        return outputs

    def _count(self, storage):
        self._counted[storage] = size = storage.nbytes()
        self.alive_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        weakref.finalize(storage, self._release, size)

    def _release(self, size):
        self.alive_bytes -= size


def _storages(tree: Any) -> list[UntypedStorage]:
    return [item.untyped_storage() for item in tree_iter(tree) if isinstance(item, torch.Tensor)]


class FusedNorms(TorchFunctionMode):
    """Computes RMSNorm as a GPU does, in one kernel that keeps only its input for the backward pass."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not functional.rms_norm:
            return function(*args, **kwargs)
        states, shape = args
        weight = kwargs["weight"]
        # The simulation runs on the CPU, so its autocast is that of the CPU.
        if torch.is_autocast_enabled("cpu") and torch.__version__ >= FLOAT32_NORMS:
            states, weight = states.float(), weight.float()
        return torch.native_layer_norm(states, shape, weight, None, kwargs["eps"])[0]
