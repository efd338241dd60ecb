"""A component's file, .pth or safetensors -> tensors by name, and a diffusers network filled with them.

A pickle is opened only for tensors, mapped, and no code in it runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from ..files.json_files import open_regular
from ..files.weights import broken_download
from .headers import Shape, check_scale
from .keys import is_scale, is_weight, scaled_weight, strip_wrappers
from .names import SPIECE

if TYPE_CHECKING:
    import torch


def read_weights(path: Path, half: "torch.dtype") -> "dict[str, torch.Tensor]":
    """Return a component's weights by name.

    `half` is the dtype of safetensors' weights that are stored in float16, or in float8 with a scale.
    """
    if path.suffix == ".pth":
        return read_pickle(path)
    with safe_open(path, "pt") as file:
        scales = {scaled_weight(name): file.get_tensor(name) for name in file.keys() if is_scale(name)}
        names = [name for name in file.keys() if is_weight(name) and name != SPIECE]
        if lost := sorted(scales.keys() - set(names)):
            raise ValueError(f"{path}: there is a scale of {lost[0]} but no such weight. Download it again.")
        return {
            short: _scale(file.get_tensor(name), scales.get(name), half, name, path)
            for name, short in strip_wrappers(names, path).items()
        }


def _scale(
    tensor: "torch.Tensor", scale: "torch.Tensor | None", half: "torch.dtype", name: str, path: Path
) -> "torch.Tensor":
    """Return a stored weight in the dtype to compute in, multiplied by its scale."""
    import torch

    if not tensor.is_floating_point():
        raise ValueError(
            f"{path}: {name} is stored as {tensor.dtype}, expected floats. Choose a file in fp16, bf16 or scaled "
            "fp8."
        )
    if scale is not None:
        check_scale(scale, name, tensor.shape[0] if tensor.ndim else 1, path)
        return (tensor.float() * scale.float().reshape(-1, *[1] * (tensor.ndim - 1))).to(half)
    return tensor if tensor.dtype in (torch.float32, torch.bfloat16) else tensor.to(half)


def read_pickle(path: Path) -> "dict[str, torch.Tensor]":
    """Return the tensors of a .pth file by name, mapped; no other object in it is created."""
    import torch

    open_regular(path).close()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise broken_download(path, f"cannot be read as tensors ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise ValueError(f"{path}: holds objects other than tensors by name. Download it again.")
    return {name: content[stored] for stored, name in strip_wrappers(content, path).items()}


def shapes_of(tensors: "dict[str, torch.Tensor]") -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def fill(network_class: Any, config: Any, tensors: "dict[str, torch.Tensor]", path: Path) -> Any:
    """Return a network of exactly these tensors, which take no memory before they are read."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        network = network_class(**config) if isinstance(config, dict) else network_class(config)
    check_shapes(path, shapes_of(network.state_dict()), shapes_of(tensors))
    network.load_state_dict(tensors, strict=True, assign=True)
    return network


def check_shapes(path: Path, expected: dict[str, Shape], held: dict[str, Shape]) -> None:
    """Raise ValueError if tensors are missing, unknown or of another shape than expected."""
    names = expected.keys() | held.keys()
    if wrong := sorted(name for name in names if expected.get(name) != held.get(name)):
        raise ValueError(
            f"{path}: {len(wrong)} tensors differ from those that its sizes imply, first {wrong[0]}: found "
            f"{held.get(wrong[0], 'none')}, expected {expected.get(wrong[0], 'none')}. Download it again."
        )
