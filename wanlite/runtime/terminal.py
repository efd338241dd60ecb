"""Output that cannot end a run: a reader that left, a closed descriptor or a narrow encoding costs output and
nothing else.
"""

import io
import os
import sys

MAX_SHOWN = 3000  # characters of a line


class LastingOutput(io.FileIO):
    """A descriptor for writing; bytes that nobody takes are dropped: a closed pipe, a lost terminal, a log on
    a full disk.
    """

    def write(self, content):
        try:
            return super().write(content) or len(content)  # None of a full pipe that does not wait
        except OSError:
            return len(content)


def keep_output_open():
    """Replace sys.stdout and sys.stderr by streams that take every character and outlive their reader."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # one that was closed would be given to the next file opened
    os.close(descriptor)
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def _lasting(stream):
    if stream is None:  # closed as the process began
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    raw = LastingOutput(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
    )


def one_line(text, most=MAX_SHOWN):
    """Return text of any origin as at most `most` printable characters; control characters are escaped."""
    escaped = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text[: most + 1]
    )
    return escaped if len(escaped) <= most else f"{escaped[: most - 3]}..."
