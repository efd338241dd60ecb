"""One reader for every JSON file -> a dict, or one OSError that names the file, the fault and what to do.

Only regular files are opened, without blocking, and the cost of reading a file is bounded before it is parsed.
"""

import errno
import io
import json
import math
import os
import reprlib
import stat
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .downloads import find_replacement

MAX_DIGITS = 300  # of an integer; the largest float has 309
MAX_KEPT = 2**20  # bytes of a downloaded file that is kept in memory
MAX_SHOWN = 80  # characters of a value in a message
MAX_JSON = 4 * 2**20  # bytes: the header of a student of eight hundred blocks


class Limits(NamedTuple):
    """The most that a JSON file of one origin may hold, and what to do about a file that cannot be read.

    Lists and objects take two bytes each in the file and a hundred in memory.
    """

    max_bytes: int
    max_containers: int
    remedy: str
    owner: str
    accepts_nan: bool = False  # and infinity, as Python writes them
    accepts_large: bool = False  # numbers that no float holds, for a reader that checks all of them


SAVED = Limits(MAX_JSON, 2**16, "Copy it again or save the student again.", "a student's settings or header")
# A tokenizer of 256,000 pieces has 17 MB, and a list for each piece.
DOWNLOADED = Limits(3 * 2**24, 2**20, "Download it again.", "a file of a Wan checkpoint", True)
OWN = Limits(2**25, 2**19, "Copy it again.", "a file of a run", accepts_nan=True)


def check_regular(path: str | Path) -> os.stat_result:
    """Return the status of a regular file that may be read; raises OSError for any other, without opening it."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error.strerror) from None
    if not stat.S_ISREG(status.st_mode):
        raise _irregular(path)
    if not os.access(path, os.R_OK):
        raise _unreadable(path, os.strerror(errno.EACCES))
    return status


def _unreadable(path, reason):
    return OSError(f"{path}: cannot be read ({reason}). Expected a regular file that you may read.")


class RegularFile(io.FileIO):
    """A regular file for reading whose errors, of a disk or a network, name it."""

    def __init__(self, descriptor: int, path: str | Path):
        super().__init__(descriptor, "rb")
        self.path = path

    def read(self, size: int | None = -1, /) -> bytes:
        return self._named(super().read, -1 if size is None else size)

    def readall(self) -> bytes:
        return self._named(super().readall)

    def readinto(self, buffer: Any, /) -> int:
        return self._named(super().readinto, buffer)

    def read_at(self, buffer: Any, start: int) -> int:
        """Read into a buffer from a position; several threads may. Returns the number of bytes, 0 at the end."""
        return self._named(os.preadv, self.fileno(), [buffer], start)

    def _named(self, read, *arguments):
        try:
            return read(*arguments)
        except OSError as error:
            raise OSError(
                f"{self.path}: cannot be read ({error.strerror}). Check its disk, or copy the file from elsewhere."
            ) from None


def _irregular(path):
    return OSError(
        f"{path}: not a regular file. Expected one; a folder, pipe, device or socket is never opened."
    )


def open_regular(path: str | Path) -> RegularFile:
    """Open a regular file for reading; raises OSError for a folder, pipe, device or socket instead of waiting."""
    flags = (
        os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    )
    try:
        number = os.open(path, flags)
    except OSError as error:
        raise _unreadable(path, error.strerror) from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise _irregular(path)
    return RegularFile(number, path)


def read_first_bytes(path: str | Path, count: int = 64) -> bytes:
    with open_regular(path) as file:
        return file.read(count)


def read_json(path: str | Path, limits: Limits = SAVED) -> dict[str, Any]:
    """Return the object in a JSON file as a dict; raises OSError for anything else.

    A downloaded file is read once in a process, as long as it stays the same.
    """
    if limits is DOWNLOADED and (status := check_regular(path)).st_size <= MAX_KEPT:
        return dict(_read_unchanged(Path(path), (status.st_ino, status.st_size, status.st_mtime_ns)))
    return _read_json(path, limits)


@lru_cache(maxsize=64)
def _read_unchanged(path: Path, version: tuple[int, ...]) -> dict[str, Any]:
    return _read_json(path, DOWNLOADED)


def _read_json(path: str | Path, limits: Limits) -> dict[str, Any]:
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limits.max_bytes:  # nothing of it is read
            raise OSError(f"{path}: {size:,} bytes, too large for {limits.owner}. {limits.remedy}")
        content = file.read(limits.max_bytes + 1)
    if replacement := find_replacement(content[:64]):
        raise OSError(f"{path}: {replacement}.")
    return parse_json(content, path, limits)


def parse_json(content: bytes, source: str | Path, limits: Limits = SAVED) -> dict[str, Any]:
    """Turn bytes into a dict; `source` names their file in errors.

    Duplicate keys, NaN (unless `limits` accept it), a byte-order mark, numbers that no float holds (unless `limits` accept
    them) and deep nesting are refused.
    """
    if len(content) > limits.max_bytes:
        raise OSError(f"{source}: more than {limits.max_bytes:,} bytes, too large for {limits.owner}.")
    if (count := content.count(b"[") + content.count(b"{")) > limits.max_containers:
        raise OSError(f"{source}: {count:,} lists and objects, too many for {limits.owner}.")
    try:
        found = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=refuse_duplicates,
            parse_constant=float if limits.accepts_nan else _refuse_constant,
            parse_int=int if limits.accepts_large else _parse_integer,
            parse_float=float if limits.accepts_large else _parse_float,
        )
    except RecursionError:
        raise OSError(f"{source}: not JSON (nested too deeply). {limits.remedy}") from None
    except ValueError as error:  # includes JSONDecodeError and UnicodeDecodeError
        raise OSError(f"{source}: not JSON ({str(error).partition(';')[0]}). {limits.remedy}") from None
    if not isinstance(found, dict):
        raise OSError(
            f"{source}: holds a {type(found).__name__}, expected an object {{...}}. {limits.remedy}"
        )
    return found


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs; raises ValueError for a key that occurs twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"duplicate key {shown(name)}")
        found[name] = value
    return found


def _parse_integer(text: str) -> int:
    if len(text) > MAX_DIGITS:  # arithmetic with floats would overflow
        raise ValueError(f"{text[:20]}... is out of range")
    return int(text)


def _parse_float(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{shown(text[:20])} is out of range")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def shown(name: str) -> str:
    """Return a name of any length and content as at most 200 printable characters."""
    return (name if name[:200].isprintable() else ascii(name[:200]))[:200]


def shorten(value: object) -> str:
    """Return the repr of a value of any size and depth as at most MAX_SHOWN printable characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


_SHORT = reprlib.Repr()  # it looks at the first entries and levels only
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = MAX_SHOWN
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 2 * MAX_SHOWN
