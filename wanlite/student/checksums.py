"""A checksum of a student's tensors, saved in the metadata of their file and compared when they are loaded.

It finds damage by a disk or a copy at the speed of memory: a changed bit always changes it. Against intent there is
`sha256`. Files that other programs saved have no checksum, or a different layout, and are not compared.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..files.dtypes import STUDENT_DTYPES
from ..files.weights import WeightsFile

CHECKSUM, LAYOUT = "checksum", "checksum_layout"  # keys of the metadata
WORD = 8  # bytes


def sum_words(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bytes as words of 64 bits, modulo 2**64, () int64 on its device."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    size = len(content) // WORD * WORD
    return content[:size].view(torch.int64).sum() + content[size:].sum()


def make_checksum(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the checksum of {name: tensor} as metadata of their file."""
    layout = ((name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())
    return {
        CHECKSUM: _digest_sums({name: sum_words(tensor) for name, tensor in tensors.items()}),
        LAYOUT: _digest(layout),
    }


def check_checksum(file: WeightsFile, sums: Mapping[str, Tensor]) -> None:
    """Raise OSError if the `sums`, {name: sum_words(tensor)}, differ from the checksum of a file that has one."""
    layout = (
        (name, f"torch.{STUDENT_DTYPES[entry.dtype]}", entry.shape) for name, entry in file.entries.items()
    )
    if not sums or file.metadata.get(LAYOUT) != _digest(layout):
        return
    if _digest_sums(sums) != file.metadata[CHECKSUM]:
        raise OSError(
            f"{file.path}: its tensors differ from the checksum that they were saved with. Copy the file again; "
            f"if another program changed them, it must remove {CHECKSUM} from the metadata."
        )


def _digest_sums(sums: Mapping[str, Tensor]) -> str:
    names = sorted(sums)
    values = torch.stack([sums[name] for name in names]).tolist() if names else []  # waits for a device once
    return _digest(zip(names, values))


def _digest(rows: Iterable[tuple]) -> str:
    return hashlib.sha256(json.dumps(sorted(map(list, rows))).encode()).hexdigest()
