"""Reading teacher tensors and writing student tensors, with a check that a projection uses all of both."""

import torch
from torch import Tensor


class TensorReader:
    """Reads tensors of an expert in float32 onto a device, and records their names.

    `progress` is a progress bar in bytes of the files.
    """

    def __init__(self, files, device, progress):
        self.files = files
        self.device = device
        self.progress = progress
        self.names: set[str] = set()
        self.bytes_each = files.num_bytes / files.num_parameters

    def __call__(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self.files.read(name, rows=rows, device=self.device)
        if tensor.data_ptr() % 64:  # a mapped tensor: sums depend on its alignment
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
                f"projection gave {name} the shape {tuple(tensor.shape)}, expected "
                f"{tuple(self.tensors[name].shape)} with finite values"
            )
        self.unwritten.remove(name)
        self.tensors[name].copy_(tensor)


def check_coverage(readers: list[TensorReader], writer: TensorWriter) -> list[str]:
    """Return the names of unread tensors of a second expert, of which only blocks are used.

    Raises ValueError if another tensor of a teacher was not read, or a tensor of the student not written.
    """
    dropped = []
    for position, reader in enumerate(readers):
        unread = sorted(reader.files.places.keys() - reader.names)
        unexpected = [name for name in unread if position == 0 or name.startswith("blocks.")]
        if unexpected:
            raise ValueError(
                f"{reader.files.folder}: {len(unexpected)} tensors are not those of a text-to-video Wan: "
                f"{unexpected[:5]}. Use the files of such a model."
            )
        dropped += [f"{reader.files.name}: {name}" for name in unread]
    if writer.unwritten:
        raise ValueError(
            f"{len(writer.unwritten)} tensors of the student were not projected: {sorted(writer.unwritten)[:5]}. "
            "Remove the added layers before the projection."
        )
    return dropped
