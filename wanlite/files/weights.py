"""A safetensors file of any origin -> its header and its tensors, or one OSError that names the fault.

The cost of a file is bounded before it is refused, and nothing in it is executed. Format: 8 bytes with the
header's length, a JSON header {name: dtype, shape, data_offsets}, the tensors.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .downloads import find_replacement
from .dtypes import BYTES_PER_VALUE, STUDENT_DTYPES
from .json_files import DOWNLOADED, MAX_JSON, open_regular, parse_json, read_first_bytes, shown

if TYPE_CHECKING:
    import torch

MAX_DIMENSIONS = 8
LARGE = 2**26  # bytes of a file that several threads read
READERS = 4  # threads: most of a read is the kernel's copy into new pages
AHEAD = 16  # tensors: those of a student on a GPU do not fill the memory of the CPU
READ_AT_ONCE = 2**20  # bytes: small enough to be hashed while they are in the processor's cache


class Entry(NamedTuple):
    """The place of one tensor in its file; `start` and `stop` count bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class WeightsFile:
    """A safetensors file, opened once: header, hash and tensors come from the same bytes, even if the file is
    replaced meanwhile.

    `entries` is {name: Entry}; `metadata` the header's own dict of strings; `sha256` the file's digest once
    its tensors were read with `is_hashed`. Raises OSError for an incomplete file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.sha256: str | None = None
        self._hash: Any = None
        self.file = open_regular(path)
        try:
            self.size = os.fstat(self.file.fileno()).st_size
            self.entries, self.metadata = self._read_header()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> "WeightsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    @property
    def num_bytes(self) -> int:
        return sum(entry.stop - entry.start for entry in self.entries.values())

    def tensors(self, is_hashed: bool = False) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield (name, tensor), read into memory on the CPU: the tensors do not change with the file."""
        import torch  # here: the scripts check headers before they import torch

        dtypes = {name: getattr(torch, theirs) for name, theirs in STUDENT_DTYPES.items()}
        self._hash = hashlib.sha256(self._header) if is_hashed else None

        def read(name):
            dtype, shape, start, _ = self.entries[name]
            tensor = torch.empty(shape, dtype=dtypes[dtype])
            self._fill(memoryview(tensor.view(-1).view(torch.uint8).numpy().data), start)
            return name, tensor

        names = sorted(self.entries, key=lambda name: self.entries[name].start)
        is_large = self.size >= LARGE and not is_hashed
        yield from _map_ahead(read, names) if is_large else map(read, names)
        if self._hash:
            self.sha256 = self._hash.hexdigest()  # tensors tile the file behind its header, in this order

    def _fill(self, memory: memoryview, start: int) -> None:
        """Read bytes from `start` on; several threads may do so at once, unless the file is hashed."""
        while memory:
            chunk = memory[:READ_AT_ONCE] if self._hash else memory
            if not (count := self.file.read_at(chunk, start)):
                raise self._broken("it became shorter while it was read")
            if self._hash:
                self._hash.update(chunk[:count])
            memory, start = memory[count:], start + count

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        beginning = self.file.read(8)
        length = int.from_bytes(beginning, "little")
        if len(beginning) < 8 or not 2 <= length <= min(self.size - 8, MAX_JSON):
            raise self._broken(self._describe(beginning + self.file.read(56)))
        self._header = beginning + self.file.read(length)
        header = parse_json(self._header[8:], f"{self.path}, header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._broken("its metadata are not strings")
        entries = {name: self._entry(name, found, 8 + length) for name, found in header.items()}
        self._check_tiling(entries, 8 + length)
        return entries, metadata

    def _check_tiling(self, entries: dict[str, Entry], end: int) -> None:
        """Refuse tensors that do not fill the file exactly from `end`, the end of its header."""
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != end:
                raise self._broken(
                    f"{shown(name)} begins at byte {entry.start:,}, expected {end:,}: tensors overlap or "
                    "leave gaps"
                )
            end = entry.stop
        if fault := describe_length(end, self.size):
            raise self._broken(fault)

    def _entry(self, name: str, found: Any, data_start: int) -> Entry:
        """Turn a tensor's description, which may be anything, into an Entry."""
        if not isinstance(found, dict) or found.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._broken(f"{shown(name)} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
        if not isinstance(dtype, str) or dtype not in STUDENT_DTYPES:
            raise ValueError(
                f"{self.path}: {shown(name)} is stored as {shown(str(dtype)[:40])}, expected "
                f"{', '.join(STUDENT_DTYPES)}. Save the student again in one of them."
            )
        if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(filter(None, shape)) >= 2**60:
            raise self._broken(f"{shown(name)} lacks a shape of at most {MAX_DIMENSIONS} possible sizes")
        num_bytes = BYTES_PER_VALUE[dtype] * math.prod(shape)
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
            raise self._broken(
                f"{shown(name)} has offsets that do not fit its shape {tuple(shape)} in {dtype}"
            )
        return Entry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])

    def _describe(self, beginning: bytes) -> str:
        """Describe a file that does not begin as safetensors files do."""
        if replacement := find_replacement(beginning, is_safetensors=True):
            return replacement
        if self.size < 10:
            return f"{self.size} bytes hold no header"
        length = int.from_bytes(beginning[:8], "little")
        return f"its header has {length:,} bytes, expected 2 to {min(self.size - 8, MAX_JSON):,}"

    def _broken(self, reason: str) -> OSError:
        return OSError(
            f"{self.path}: not a complete safetensors file ({reason}). Copy it again or save the student again."
        )


def _map_ahead(read: Callable[[str], Any], names: list[str]) -> Iterator[Any]:
    """Yield the results of read(name) in order, computed by threads a few names ahead."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(names), AHEAD):
            yield from pool.map(read, names[start : start + AHEAD])


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(
        type(number) is int and 0 <= number < 2**63 for number in numbers
    )


# ---- errors of the safetensors library ---------------------------------------------------------------------


def broken_download(path: Path, fault: str) -> OSError:
    """Return the error for a downloaded file: its replacement, if it is one, otherwise the `fault`."""
    replacement = find_replacement(read_first_bytes(path))
    return OSError(f"{path}: {replacement}." if replacement else f"{path}: {fault}. Download it again.")


def broken_safetensors(path: Path, error: Exception) -> OSError:
    """Return the error for a download that safetensors refused: its replacement, or its fault in bytes."""
    if replacement := find_replacement(read_first_bytes(path), is_safetensors=True):
        return OSError(f"{path}: {replacement}.")
    fault = _find_length_fault(path) or str(error)
    if "too long" not in fault:
        fault = f"not a complete safetensors file ({fault})"
    return OSError(f"{path}: {fault}. Download it again.")


def _find_length_fault(path: Path) -> str | None:
    with open_regular(path) as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if length > min(size - 8, DOWNLOADED.max_bytes):
            return None
        try:
            header = parse_json(file.read(length), path, DOWNLOADED)
            ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            return describe_length(8 + length + max(ends), size)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None


def describe_length(end: int, size: int) -> str | None:
    """Describe how a file of `size` bytes differs from the `end` that its header implies; None if it does not."""
    if end == size:
        return None
    difference = f"{abs(size - end):,} byte{'s' * (abs(size - end) > 1)}"
    direction = "too long" if size > end else "too short"
    return f"{difference} {direction}: its tensors end at byte {end:,}, the file at {size:,}"
