"""Files that anybody may have written -> JSON, safetensors headers, tensors; or one OSError that says what is
wrong.

Only regular files are opened, without blocking; nothing is executed; what a file may cost before it is
refused is bounded. Source: the safetensors format: 8 bytes with the header's length, a JSON header {name:
dtype, shape, data_offsets}, the tensors.
"""

import hashlib
import json
import math
import mmap
import os
from pathlib import Path
from typing import NamedTuple

from .atomic import came_instead_of_safetensors, open_regular, unwrapped, wrong_length

MAX_JSON = 4 * 2**20  # bytes: the header of a student of eight hundred blocks
MAX_PARTS = 2**16  # lists and objects in it: two bytes each in the file, a hundred in memory
MAX_DIMENSIONS = 8
ALIGNED = 64  # bytes: of a tensor that lies otherwise, sums differ in the last bit; it is read, not mapped
READ_AT_ONCE = 2**20  # bytes: what was read is hashed while it lies in the processor's cache
BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # what a student's weights are stored as


class Entry(NamedTuple):
    """Where one tensor lies in its file; `start` and `stop` count bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_json(path, most=MAX_JSON):
    """Return the object in a JSON file of at most so many bytes as a dict."""
    with open_regular(path) as file:
        return parse_json(file.read(most + 1), path, most)


def parse_json(content, source, most=MAX_JSON):
    """Turn bytes into a dict; duplicate keys, NaN, a byte-order mark, 5 000-digit numbers and deep nesting
    are refused.
    """
    if len(content) > most:
        raise OSError(f"{source}: more than {most:,} bytes, which no settings or header of a student take.")
    if (parts := content.count(b"[") + content.count(b"{")) > MAX_PARTS:
        raise OSError(
            f"{source}: {parts:,} lists and objects, which no settings or header of a student have."
        )
    try:
        found = json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise OSError(
            f"{source}: not JSON of ours (nested too deeply). Copy it again or save the student again."
        ) from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are among them
        reason = str(error).partition(";")[0]
        raise OSError(f"{source}: not JSON ({reason}). Copy it again or save the student again.") from None
    if not isinstance(found, dict):
        raise OSError(f"{source}: holds a {type(found).__name__}, expected an object {{...}}.")
    return found


def _unique(pairs):
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key {shown(name)} stands there twice")
        found[name] = value
    return found


def _refuse_constant(name):
    raise ValueError(f"{name} is no number")


def shown(name):
    """Show a name that may be anything: a novel, a newline, half a character."""
    return name[:200] if name.isprintable() else ascii(name[:200])


class WeightsFile:
    """A safetensors file, opened once: header, hash and tensors are of the same bytes, whatever is renamed or
    written over it.

    `entries` is {name: Entry}; `metadata` the header's own dict of strings; `sha256` the file's digest once
    its tensors were read with `is_hashed`. Raises OSError where the file is not whole.
    """

    def __init__(self, path):
        self.path, self._hash = Path(path), None
        self.sha256: str | None = None
        self.file = open_regular(path)
        try:
            self.size = os.fstat(self.file.fileno()).st_size
            self.entries, self.metadata = self._read_header()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    @property
    def num_bytes(self):
        return sum(entry.stop - entry.start for entry in self.entries.values())

    def tensors(self, is_mapped=True, is_hashed=False):
        """Yield (name, tensor), on the CPU and writable, mapped from the file or read into memory; to be
        hashed it is read.
        """
        import torch  # here: the scripts check headers before torch is there

        dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        is_mapped, self._hash = (
            is_mapped and not is_hashed,
            hashlib.sha256(self._header) if is_hashed else None,
        )
        content = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY) if is_mapped else None
        for name, (dtype, shape, start, stop) in sorted(self.entries.items(), key=lambda item: item[1].start):
            if is_mapped and start % ALIGNED == 0 and start < stop:
                tensor = torch.frombuffer(
                    content, dtype=dtypes[dtype], count=math.prod(shape), offset=start
                ).view(shape)
            else:
                tensor = torch.empty(shape, dtype=dtypes[dtype])
                self._fill(memoryview(tensor.view(-1).view(torch.uint8).numpy()), start)
            yield name, tensor
        if self._hash:
            self.sha256 = self._hash.hexdigest()  # tensors tile the file behind its header, in this order

    def _fill(self, memory, start):
        self.file.seek(start)
        while memory:
            if not (count := self.file.readinto(memory[:READ_AT_ONCE])):
                raise self._broken("it became shorter while it was read")
            if self._hash:
                self._hash.update(memory[:count])
            memory = memory[count:]

    def _read_header(self):
        beginning = self.file.read(8)
        length = int.from_bytes(beginning, "little")
        if len(beginning) < 8 or not 2 <= length <= min(self.size - 8, MAX_JSON):
            raise self._broken(self._what_it_is(beginning + self.file.read(56)))
        self._header = beginning + self.file.read(length)
        header = parse_json(self._header[8:], f"{self.path}, header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._broken("its metadata are not strings")
        entries = {name: self._entry(name, found, 8 + length) for name, found in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != end:
                raise self._broken(
                    f"{shown(name)} begins at byte {entry.start:,}, expected {end:,}: tensors overlap or "
                    f"leave gaps"
                )
            end = entry.stop
        if fault := wrong_length(end, self.size):
            raise self._broken(fault)
        return entries, metadata

    def _entry(self, name, found, data_start):
        """Turn a tensor's description, which may be anything, into an Entry."""
        if not isinstance(found, dict) or found.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._broken(f"{shown(name)} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BYTES:
            raise ValueError(
                f"{self.path}: {shown(name)} is stored as {shown(str(dtype)[:40])}, expected "
                f"{', '.join(BYTES)}. Save "
                "the student again in one of them."
            )
        if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(filter(None, shape)) >= 2**60:
            raise self._broken(
                f"{shown(name)} has no shape of at most {MAX_DIMENSIONS} whole numbers that fits any file"
            )
        if (
            not _are_sizes(offsets)
            or len(offsets) != 2
            or offsets[1] - offsets[0] != BYTES[dtype] * math.prod(shape)
        ):
            raise self._broken(
                f"{shown(name)} has offsets that do not fit its shape {tuple(shape)} in {dtype}"
            )
        return Entry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])

    def _what_it_is(self, beginning):
        """Say what a file is that does not begin as safetensors do."""
        if instead := came_instead_of_safetensors(beginning):
            return instead
        if self.size < 10:
            return f"{self.size} bytes hold no header"
        length = int.from_bytes(beginning[:8], "little")
        return f"its header has {length:,} bytes, expected 2 to {min(self.size - 8, MAX_JSON):,}"

    def _broken(self, reason):
        return OSError(
            f"{self.path}: not a whole safetensors file ({reason}). Copy it again or save the student again."
        )


def without_wrappers(names):
    """Return the names that a wrapped network's tensors have inside the wrapper, None where no one wrapper
    explains them.
    """
    try:
        inside = set(unwrapped(names, "weights").values())
    except ValueError:
        return None
    return inside if inside != set(names) else None


def _are_sizes(numbers):
    return isinstance(numbers, list) and all(
        type(number) is int and 0 <= number < 2**63 for number in numbers
    )
