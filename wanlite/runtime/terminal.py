"""Output that cannot end a run: a closed pipe or descriptor, or a narrow encoding, loses only output."""

import io
import os
import sys
import textwrap
import warnings
from typing import Any, TextIO

MAX_COLUMNS = 100
MAX_SHOWN = 3000  # characters of a line


class LastingOutput(io.FileIO):
    """A descriptor for writing that drops undeliverable bytes: a closed pipe, a lost terminal, a full disk."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or len(content)  # None for a full pipe in non-blocking mode
        except OSError:
            return len(content)


def keep_output_open() -> None:
    """Replace sys.stdout and sys.stderr by streams that take every character and outlive their reader."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # the next file opened would get the number of a closed one
    os.close(descriptor)
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def _lasting(stream: Any) -> TextIO:
    if stream is None:  # closed when the process started
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    raw = LastingOutput(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
    )


def hide_loading_bars() -> None:
    """Hide the bars of transformers, which would appear in a log even for a small text encoder."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def print_plain_warnings() -> None:
    """Print each Python warning as one line, without the place in the code that a user cannot change."""
    warnings.formatwarning = lambda message, *_, **__: f"WARNING: {one_line(str(message))}\n"


def labelled(label: str, text: str) -> str:
    """Return text behind a label, wrapped to MAX_COLUMNS; a longer word, as a path, is not broken."""
    return textwrap.fill(
        f"{label:8} {text}",
        MAX_COLUMNS,
        subsequent_indent=" " * 9,
        break_long_words=False,
        break_on_hyphens=False,
    )


def one_line(text: str, most: int = MAX_SHOWN) -> str:
    """Return any text as at most `most` printable characters; control characters are escaped."""
    escaped = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text[: most + 1]
    )
    return escaped if len(escaped) <= most else f"{escaped[: most - 3]}..."
