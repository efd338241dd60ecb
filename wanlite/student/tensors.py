"""The teacher's tensors to read and the student's tensors to write: a projection uses all of both."""

import torch
from torch import Tensor


class TensorReader:
    """Reads an expert's tensors in float32 onto a device and records their names.

    `progress` is a bar in bytes of the files.
    """

    def __init__(self, files, device, progress):
        self.files, self.device, self.progress = files, device, progress
        self.names: set[str] = set()
        self.bytes_each = files.num_bytes / files.num_parameters

    def __call__(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self.files.read(name, rows=rows).to(self.device)
        if tensor.data_ptr() % 64:  # mapped from the file: sums would depend on the position in it
            tensor = tensor.clone()
        self.names.add(name)
        self.progress.update(round(tensor.numel() * self.bytes_each))
        return tensor


class TensorWriter:
    """Writes each of the student's tensors once, in its shape and with finite values."""

    def __init__(self, student):
        self.tensors = student.state_dict()
        self.unwritten = set(self.tensors)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if tensor.shape != self.tensors[name].shape or not torch.isfinite(tensor).all():
            raise AssertionError(
                f"projection made {name} {tuple(tensor.shape)}, expected {tuple(self.tensors[name].shape)} with "
                f"finite values"
            )
        self.unwritten.remove(name)
        self.tensors[name].copy_(tensor)


def check_coverage(readers: list[TensorReader], writer: TensorWriter) -> list[str]:
    """Return the names of unread tensors of a second expert, which gives its blocks only.

    Raises ValueError for any other tensor of a teacher that was not read, and for one of the student that was
    not written.
    """
    dropped = []
    for position, reader in enumerate(readers):
        unread = sorted(reader.files.places.keys() - reader.names)
        unexpected = [name for name in unread if position == 0 or name.startswith("blocks.")]
        if unexpected:
            raise ValueError(
                f"{reader.files.folder}: {len(unexpected)} tensors have no place in the student: {unexpected[:5]}. "
                f"Take the files of a text-to-video Wan."
            )
        dropped += [f"{reader.files.name}: {name}" for name in unread]
    if writer.unwritten:
        raise ValueError(
            f"{len(writer.unwritten)} tensors of the student got no value: {sorted(writer.unwritten)[:5]}. Load "
            f"the weights of a student that has them, or remove them from it."
        )
    return dropped
