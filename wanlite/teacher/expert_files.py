"""The files of a teacher's experts: configs, the place of each tensor, and reading one tensor at a time."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..files.dtypes import find_non_finite
from ..files.json_files import check_regular, open_regular

Place = tuple[Path, str, tuple[int, ...]]  # file, name in the file, shape


@dataclass
class ExpertFiles:
    """One network on disk: its config in diffusers' terms, and the place of each tensor."""

    name: str  # "high", "low", or "only"
    folder: Path  # or its single file
    config: dict[str, Any]
    places: dict[str, Place] = field(repr=False)  # by diffusers' name
    scales: dict[str, torch.Tensor] = field(repr=False, default_factory=dict)  # of scaled fp8: (rows, 1, ...)

    def read(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        rows: slice | None = None,
        device: str | torch.device = "cpu",
    ) -> torch.Tensor:
        """Read one tensor by diffusers' name, or some `rows` of its first dimension, multiplied by its scale.

        It is moved as it is stored, and scaled, cast and checked on the device. Raises ValueError for values
        that are not finite.
        """
        path, stored_name, _ = self.places[name]
        with open_mapped(path) as file:
            tensor = file.get_tensor(stored_name) if rows is None else file.get_slice(stored_name)[rows]
        tensor = tensor.to(device)
        if name in self.scales:
            scale = self.scales[name] if rows is None else self.scales[name][rows]
            tensor = tensor.float() * scale.to(device)
        tensor = tensor.to(dtype)
        if find_non_finite({name: tensor}):
            raise ValueError(f"{self.folder}: {name} holds NaN or infinity. Download the expert again.")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name][2]

    @property
    def width(self) -> int:
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for *_, shape in self.places.values())

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in {path for path, *_ in self.places.values()})


def open_mapped(path: Path) -> Any:
    """Open a safetensors file for its tensors; the whole file is mapped as private memory.

    Raises OSError if this machine's memory cannot take the mapping.
    """
    try:
        return safe_open(path, "pt")
    except RuntimeError as error:
        raise OSError(
            f"{path}: {path.stat().st_size / 1e9:,.1f} GB cannot be mapped into this machine's memory "
            f"({error}). Choose the official or diffusers layout, whose shards are smaller, or add swap."
        ) from None


@dataclass
class TeacherFiles:
    """A Wan folder whose headers have been read."""

    folder: Path
    layout: str  # "official", "diffusers" or "ComfyUI"
    experts: dict[str, ExpertFiles]  # "high" and "low", or "only"
    boundary: float | None

    @property
    def config(self) -> dict[str, Any]:
        return next(iter(self.experts.values())).config

    @property
    def width(self) -> int:
        return next(iter(self.experts.values())).width

    @property
    def num_parameters(self) -> int:
        return sum(expert.num_parameters for expert in self.experts.values())

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over every expert's files: all of a small one, 64 samples of a large one."""
        return sampled_digest(
            (expert.name, path)
            for expert in self.experts.values()
            for path in sorted({path for path, *_ in expert.places.values()})
        )


def sampled_digest(files: Iterable[tuple[str, Path]]) -> str:
    """Return a sha256 over (name, path) pairs: all of a small file, 64 samples of a large one."""
    digest = hashlib.sha256()
    for name, path in files:
        size = check_regular(path).st_size
        digest.update(f"{name} {path.name} {size}".encode())
        with open_regular(path) as file:
            for start in range(0, size, max(1 << 20, size // 64)):
                file.seek(start)
                digest.update(file.read(1 << 20))
    return digest.hexdigest()
