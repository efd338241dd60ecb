"""Progress of long work: a bar in a terminal, plain lines in a log."""

import os
import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS = 10.0  # between two lines in a log
# Without the rate, the phase and the loss fit into 80 columns.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def track(total: int, description: str, done: int = 0, is_hidden: bool = False, leave: bool = False) -> Any:
    """Return the progress of `total` units, a context manager with update(), describe() and close().

    In a terminal it is a bar, which stays there if `leave`; elsewhere it is a line of plain text every SECONDS,
    so work that takes less has none.
    """
    make = Bar if sys.stderr is not None and sys.stderr.isatty() else Lines
    return make(total, description, done, is_hidden or "TQDM_DISABLE" in os.environ, leave)


def print_above(accelerator: Any, text: str) -> None:
    """Print a line on rank 0, above a bar if there is one."""
    if accelerator.is_main_process:
        tqdm.write(text, file=sys.stdout)


class Bar(tqdm):
    """A bar that is redrawn in place."""

    def __init__(self, total, description, done, is_hidden, leave):
        super().__init__(
            total=total, desc=description, initial=done, disable=is_hidden, leave=leave, bar_format=BAR
        )

    def describe(self, description, note=""):
        """Change the description, and the note behind the times, at the next redraw."""
        self.set_description_str(description, refresh=False)
        self.set_postfix_str(note, refresh=False)


class Lines:
    """Lines of plain text on stderr, without control characters."""

    def __init__(self, total, description, done, is_hidden, leave):
        self.total, self.description, self.note = total, description, ""
        self.first = self.done = done
        self.is_hidden = is_hidden
        self.began = self.printed = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def update(self, count=1):
        """Count units of finished work; print a line if the last one is SECONDS old."""
        self.done += count
        now = time.monotonic()
        if not self.is_hidden and now - self.printed >= SECONDS:
            self.printed = now
            print(self.format_line(now - self.began), file=sys.stderr, flush=True)

    def describe(self, description, note=""):
        """Change the description, and the note behind the count."""
        self.description, self.note = description, note

    def format_line(self, seconds):
        """Return the line after `seconds` of work."""
        left = seconds / max(self.done - self.first, 1) * (self.total - self.done)
        note = f", {self.note}" if self.note else ""
        return f"{self.description} {self.done:,}/{self.total:,}{note}, {tqdm.format_interval(left)} left"

    def close(self):
        """End the progress; nothing is printed."""
