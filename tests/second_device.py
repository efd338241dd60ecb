"""Run a script on a simulated second device: its tensors report `second:0` and hold their numbers on the CPU.

    python tests/second_device.py train_distillation.py --output_dir DIR

Mixing two devices, or passing a tensor of the device to numpy, fails as on a GPU. Nothing else of a GPU is
simulated: no kernels, streams or rounding.
"""

import runpy
import sys
from pathlib import Path

import accelerate.state
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("second")
SECOND = torch.device("second", 0)
CROSSING = ("_to_copy", "copy_", "_foreach_copy_")  # functions that accept tensors of two devices
INDEXING = (
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
)  # functions that accept indices on the CPU


class OnDevice(torch.Tensor):
    """A tensor on the second device; `numbers` holds its values on the CPU."""

    @staticmethod
    def __new__(cls, numbers):
        on_device = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            dtype=numbers.dtype,
            storage_offset=numbers.storage_offset(),
            device=SECOND,
        )
        on_device.numbers = numbers
        return on_device

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        return compute(function, arguments, keywords or {})

    def __deepcopy__(self, memo):
        copied = OnDevice(self.numbers.clone())
        return (
            torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        )

    def __tensor_flatten__(self):  # saving uses it to tell weights from aliases
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnDevice(inner["numbers"])

    def tolist(self):
        return self.numbers.tolist()

    def numpy(self):
        raise TypeError(
            f"can't convert a tensor on {SECOND} to numpy. Use Tensor.cpu() to copy it to host memory first."
        )


class SecondDevice(TorchDispatchMode):
    """Creates tensors on the second device; functions with such a tensor among their arguments reach
    compute() directly.
    """

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        is_on_device = keywords and keywords.get("device") == SECOND
        return (
            compute(function, arguments, keywords)
            if is_on_device
            else function(*arguments, **(keywords or {}))
        )


def compute(function, arguments, keywords):
    """Compute a function of the second device on the CPU if all its arguments are on that device."""
    name, first = function._schema.name.removeprefix("aten::"), arguments[0] if arguments else None
    checked = (
        (first, *arguments[2:]) if name in INDEXING and isinstance(first, OnDevice) else (arguments, keywords)
    )
    tensors = [value for value in tree_iter(checked) if isinstance(value, torch.Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    is_mixed = any(
        tensor.dim() for tensor in tensors if not isinstance(tensor, OnDevice)
    )  # scalars may be on any device
    if (
        on_device
        and name not in CROSSING
        and (is_mixed or function._schema.is_mutable and not isinstance(tensors[0], OnDevice))
    ):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} has {len(on_device)} of {len(tensors)} "
            f"on "
            f"{SECOND}."
        )
    if name == "_conj":  # the mark of a conjugate that is not computed yet is not seen below
        function = torch.ops.aten._conj_physical.default
    device = keywords.get("device") or (arguments[0].device if name == "copy_" else SECOND)
    known = {id(tensor.numbers): tensor for tensor in on_device}  # in-place functions return the same tensor

    def outside(tensor):
        return tensor.numbers if isinstance(tensor, OnDevice) else tensor

    def inside(tensor):
        if device != SECOND or not isinstance(tensor, torch.Tensor):
            return tensor
        return known[id(tensor)] if id(tensor) in known else OnDevice(tensor)

    if "device" in keywords:
        keywords = keywords | {
            "device": torch.device("cpu") if keywords["device"] == SECOND else keywords["device"]
        }
    return tree_map(inside, function(*tree_map(outside, arguments), **tree_map(outside, keywords)))


def let_torch_fill():
    """Register the function that torch calls when it creates a tensor from Python numbers."""
    library = torch.library.Library("aten", "IMPL")
    library.impl(
        "empty_strided",
        lambda size, stride, dtype=None, **_: OnDevice(torch.empty_strided(size, stride, dtype=dtype)),
        "PrivateUse1",
    )
    library.impl(
        "_copy_from",
        lambda source, target, non_blocking=False: OnDevice(target.numbers.copy_(source)),
        "PrivateUse1",
    )
    return library


def main(script, *arguments):
    library, begin, save_file = (
        let_torch_fill(),
        accelerate.state.PartialState.__init__,
        safetensors.torch.save_file,
    )

    def start_state(state, *given, **named):
        begin(state, *given, **named)
        state.device = SECOND

    accelerate.state.PartialState.__init__ = start_state
    safetensors.torch.save_file = lambda tensors, *rest, **named: (
        save_file(  # which accepts the tensors of a GPU unchanged
            {name: tensor.cpu() for name, tensor in tensors.items()}, *rest, **named
        )
    )
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).resolve().parent)
    with SecondDevice():
        runpy.run_path(script, run_name="__main__")
    library._destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
