"""The dtypes of safetensors files, and values that are not finite; no torch is imported before it is needed."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BYTES_PER_VALUE = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # of every dtype that is read
STUDENT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # torch's names of what is saved


def find_non_finite(tensors: "Mapping[str, torch.Tensor]") -> list[str]:
    """Return the names of tensors that hold NaN or infinity; a device is waited for once.

    No memory is taken: isfinite() and sums in another dtype would copy, gigabytes for a Wan's text encoder.
    """
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    total = sum(tensor.sum().float() for tensor in floats.values())
    if math.isfinite(total):  # it may overflow although all values are finite
        return []
    return [
        name
        for name, tensor in floats.items()
        if tensor.numel() and not all(map(math.isfinite, tensor.aminmax()))
    ]
