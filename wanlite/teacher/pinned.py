"""The weights of a network -> the same in a few large buffers of pinned memory, from which a GPU copies at full speed."""

import torch
from torch import nn

BUFFER_BYTES = 2**31  # torch pins powers of two, so that a buffer for each weight would waste a third
ALIGNMENT = 512  # bytes, as of torch's own memory


def pin_together(network: nn.Module, is_pinned: bool = True) -> None:
    """Move the parameters of a network on the CPU to shared buffers, one by one; `is_pinned` requires a GPU."""
    weights = list(network.parameters())
    sizes = [-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in weights]
    buffer, start = torch.empty(0, dtype=torch.uint8), 0
    for index, (weight, size) in enumerate(zip(weights, sizes)):
        if start + size > len(buffer):
            remaining = sum(sizes[index:])
            num_bytes = max(size, min(BUFFER_BYTES, 2 ** (remaining - 1).bit_length()))
            buffer, start = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned), 0
        place = buffer[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
        weight.data = place.copy_(weight.data)
        start += size
