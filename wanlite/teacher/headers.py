"""A downloaded safetensors file -> its header, read once while the file stays the same, and its fp8 scales. No torch."""

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, safe_open

from ..files.json_files import check_regular, open_regular
from ..files.weights import broken_safetensors
from .keys import strip_wrappers

if TYPE_CHECKING:
    import torch

MAX_HEADER, MAX_TENSORS = 2**23, 2**14  # a Wan's file has about a thousand tensors
Shape = tuple[int, ...]


class Stored(NamedTuple):
    """A tensor as a header describes it; `dtype` is safetensors' name of it."""

    dtype: str
    shape: Shape


def read_header(path: Path) -> dict[str, Stored]:
    """Return {tensor: its dtype and shape} of a safetensors file; raises OSError for an incomplete one."""
    status = check_regular(
        path
    )  # safetensors waits for a pipe, and calls a file missing that may not be read
    return _read_header(path, (status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=128)
def _read_header(path: Path, version: tuple[int, ...]) -> dict[str, Stored]:
    _check_count(path)
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: Stored(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except SafetensorError as error:
        raise broken_safetensors(path, error) from None


def _check_count(path: Path) -> None:
    """Refuse a complete header of more tensors than any model has, which would be read for minutes."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.fstat(file.fileno()).st_size - 8:
            return
        content = file.read(min(length, MAX_HEADER))
    if length > MAX_HEADER or content.count(b"{") > MAX_TENSORS:
        raise OSError(
            f"{path}: its header has {length:,} bytes, expected at most {MAX_HEADER:,} and {MAX_TENSORS:,} tensors. "
            "Download it again."
        )


def read_shapes(path: Path) -> dict[str, Shape]:
    """Return {name without wrappers: shape} of a safetensors file."""
    header = read_header(path)
    return {name: header[stored].shape for stored, name in strip_wrappers(header, path).items()}


def check_scale(scale: "torch.Tensor", name: str, num_rows: int, source: Path) -> None:
    """Refuse a scale of scaled fp8 that is not one positive float, or one a row."""
    import torch

    if not scale.is_floating_point() or scale.numel() not in (1, num_rows):
        raise ValueError(
            f"{source}: the scale of {name} is {scale.dtype} {tuple(scale.shape)}, expected one float or one a "
            f"row ({num_rows}). Choose a download in plain or scaled fp8, or in bf16."
        )
    if not (torch.isfinite(scale) & (scale > 0)).all():
        raise ValueError(
            f"{source}: the scale of {name} holds {scale.min().item()}, expected finite numbers above 0. "
            "Download it again."
        )
