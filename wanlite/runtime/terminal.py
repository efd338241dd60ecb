"""Output that cannot end a run: a closed pipe or descriptor, or a narrow encoding, loses only output.

The error that ends a script is one line with exit code 2. Errors of files and arguments explain themselves; any other
keeps its traceback in a file that the line names.
"""

import errno
import io
import os
import re
import shutil
import sys
import tempfile
import textwrap
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

# All but ASCII, line ends, tabs, and the sequence that moves the cursor to a bar above.
CONTROL = re.compile("(?!\x1b\\[A)[^\n\r\t -~]")
MAX_COLUMNS = 100
MAX_SHOWN = 3000  # characters of a line
# In errors of torch and C++.
NO_MEMORY = re.compile("bad_alloc|allocate memory|not enough memory", re.IGNORECASE)
EXPLAINED = (
    OSError,
    ValueError,
    FloatingPointError,
)  # errors that name a file or an argument, and what to do
MAX_UNEXPECTED = 300  # characters of any other error
MAX_ERROR = 500  # characters of an error with its remedy; texts of a file in it are shorter
EXIT_CODE = 2
REMEDIES = {  # {number of an error of the system: what to do}
    errno.ENOSPC: "Free some, or choose a folder on another disk.",
    errno.EDQUOT: "Free some, or choose a folder on another disk.",
    errno.EROFS: "Choose a folder that can be written.",
    errno.EACCES: "Change its permissions, or choose another.",
    errno.EPERM: "Change its permissions, or choose another.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n 4096).",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}


class LastingOutput(io.FileIO):
    """A descriptor for writing that drops undeliverable bytes: a closed pipe, a lost terminal, a full disk."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or len(content)  # None for a full pipe in non-blocking mode
        except OSError:
            return len(content)


class PlainOutput(io.TextIOWrapper):
    """Text of any origin for a terminal or a log: control characters other than those of lines and bars are escaped."""

    def write(self, text: str) -> int:
        super().write(text if text.isprintable() else CONTROL.sub(_escape_control, text))
        return len(text)


def _escape_control(found: re.Match[str]) -> str:
    letter = found[0]
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()


def keep_output_open() -> None:
    """Replace sys.stdout and sys.stderr by streams that take every text and outlive their reader.

    An error that nothing catches is printed to them in one line, and so is each warning of Python, without the place
    in the code, which a user cannot change.
    """
    sys.excepthook = end_in_one_line
    warnings.formatwarning = lambda message, *_, **__: f"WARNING: {one_line(str(message))}\n"
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # the next file opened would get the number of a closed one
    os.close(descriptor)
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    _check_current_folder()


def _check_current_folder() -> None:
    """End the process if its folder was deleted: a library of torch would end it with a message about a file of torch."""
    try:
        os.getcwd()
    except OSError:
        name = Path(sys.argv[0] or "wanlite").name
        print(
            f"{name}: the current folder does not exist any more. Change to another one with cd.",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_CODE) from None


def _lasting(stream: Any) -> TextIO:
    if stream is None:  # closed when the process started
        raw = io.FileIO(os.devnull, "w")
        return PlainOutput(io.BufferedWriter(raw), "utf-8", errors="backslashreplace")
    raw = LastingOutput(stream.fileno(), "w", closefd=False)
    return PlainOutput(
        io.BufferedWriter(raw),
        stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
    )


def hide_loading_bars() -> None:
    """Hide the bars of transformers, which would appear in a log even for a small text encoder."""
    from transformers.utils import logging

    logging.disable_progress_bar()


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


# ---- errors ------------------------------------------------------------------------------------------------


def error_line(message: str) -> str:
    """Return an error as one printable line of at most MAX_ERROR characters; its end, the remedy, is kept."""
    text = _cut_middle(" ".join(filter(None, map(str.strip, message.splitlines()))))
    return _cut_middle(one_line(text, 10 * MAX_ERROR))  # an escape has ten characters at most


def _cut_middle(text):
    half = MAX_ERROR // 2 - 3
    return text if len(text) <= MAX_ERROR else f"{text[:half]} ... {text[-half:]}"


def print_error(script: str, error: BaseException) -> None:
    """Print an error as one line to stderr."""
    is_explained = isinstance(error, EXPLAINED) or _is_out_of_memory(error)
    message = explain(error) if is_explained else _keep_traceback(error)
    print(f"{script}: {error_line(message)}", file=sys.stderr, flush=True)


def explain(error: BaseException) -> str:
    """Return the message of an error; an error of the system gets its file, the free space and what to do."""
    if _is_out_of_memory(error):
        reason = " ".join(str(error).split())[-MAX_UNEXPECTED:] or "MemoryError"
        return f"the machine's memory is not sufficient ({reason}). End other programs, or lower sizes and batch sizes."
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    path = error.filename2 or error.filename  # of a copy, the second file is the one that is written
    reason, remedy = error.strerror or str(error), REMEDIES.get(error.errno, "")
    if not isinstance(path, (str, bytes)):  # of a connection, for example
        return f"{reason}. {remedy}".rstrip()
    place, free = os.fsdecode(path), ""
    if error.errno == errno.ENOSPC:
        folder = next(each for each in Path(place).absolute().parents if each.is_dir())
        free = f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB are free)"
    return f"{place}: {reason[:1].lower()}{reason[1:]}{free}. {remedy or 'Check the file and its disk.'}"


def _is_out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or isinstance(error, RuntimeError)
        and bool(NO_MEMORY.search(str(error)))
    )


def end_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End the process after an error that nothing caught; the value of sys.excepthook for scripts."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print_error(Path(sys.argv[0] or "wanlite").name, error)
    raise SystemExit(EXIT_CODE)


def _keep_traceback(error: BaseException) -> str:
    """Write the traceback of an error to a file; returns the message that names it."""
    name, message = type(error).__name__, " ".join(str(error).split())[:MAX_UNEXPECTED]
    found = f"{name} ({message})" if message else name
    try:
        number, path = tempfile.mkstemp(".txt", "wanlite-traceback-")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:  # a full disk
        return f"unexpected {found}"
    return f"unexpected {found}. The traceback is in {path}; please report it with the command."
