"""One reader for every text file of any size -> its lines, each of bounded length. No torch.

Only regular files are opened, and another kind of file is refused by its first bytes.
"""

import codecs
import io
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TextIO

from .json_files import open_regular

MAX_LINE = 2**20  # characters: a prompt has hundreds, a row of metadata thousands
HEAD = 2**10  # bytes by which another kind of file is recognised
BLOCK = 2**20  # bytes
COMPRESSED = (  # first bytes of gzip, zip, xz, bzip2 and zstd files
    b"\x1f\x8b",
    b"PK\x03\x04",
    b"\xfd7zXZ",
    b"BZh",
    b"\x28\xb5\x2f\xfd",
)


def open_text(path: str | Path, newline: str | None = None, errors: str = "strict") -> TextIO:
    """Open a regular file of UTF-8 text; raises OSError for other than regular files, ValueError for other content."""
    file = open_regular(path)
    head = file.read(HEAD)
    fault = None
    if head.startswith(COMPRESSED):
        fault = "is compressed, expected text. Unpack it"
    elif head.decode("utf-8-sig", "replace").lstrip()[:14].lower().startswith(("<!doctype html", "<html")):
        fault = "is a web page, expected a file of prompts. Download the file itself"
    if fault:
        file.close()
        raise ValueError(f"{path}: {fault}.")
    file.seek(0)
    buffered = io.BufferedReader(file)  # type: ignore[type-var]
    return io.TextIOWrapper(buffered, encoding="utf-8-sig", errors=errors, newline=newline)


def bounded_lines(file: TextIO, path: str | Path) -> Iterator[str]:
    """Yield the lines of open_text(); raises ValueError for zero bytes and for a line of more than MAX_LINE characters.

    Lines end at line ends alone: a JSON string may hold other separators.
    """
    for number in count(1):
        line = file.readline(MAX_LINE + 1)
        check_no_zeros(line, path)
        if len(line) > MAX_LINE:
            raise too_long(path, f"line {number}")
        if not line:
            return
        yield line


def check_no_zeros(text: str, path: str | Path) -> None:
    """Raise ValueError for text with zero bytes."""
    if "\0" in text:
        raise ValueError(f"{path}: holds zero bytes: it is UTF-16, or not text. Save it as UTF-8.")


def too_long(path: str | Path, place: str) -> ValueError:
    """Return the error for a line, a row or an item of more than MAX_LINE characters."""
    return ValueError(
        f"{path}: {place} has more than {MAX_LINE:,} characters, too many for a prompt. Write it again."
    )


def locate_undecodable(path: Path) -> tuple[int, int]:
    """Return (byte from 0, line from 1) of the first byte of a file that is not UTF-8 text."""
    start, line, rest = 0, 1, b""
    with open_regular(path) as file:
        while True:
            block = file.read(BLOCK)
            content = rest + block
            try:
                _, used = codecs.utf_8_decode(content, "strict", not block)
            except UnicodeDecodeError as error:
                return start + error.start, line + content.count(b"\n", 0, error.start)
            if not block:
                raise AssertionError(f"{path} is UTF-8 text")
            start, line, rest = start + used, line + content.count(b"\n", 0, used), content[used:]
