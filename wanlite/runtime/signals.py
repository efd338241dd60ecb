"""Signals -> one flag that a run checks at the points where it can stop."""

import signal
from collections.abc import Iterable
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class Stopped(BaseException):
    """Raised in a run that was stopped by a signal."""


class StopSignal:
    """Sets `is_set` at the first SIGTERM, SIGINT or SIGUSR1; the second one ends the process at once.

    While `is_immediate`, the first one raises Stopped immediately: for work whose results are complete files
    on disk. Otherwise check() raises it, or the code that reads `is_set` stops. With `is_launched`, later
    signals are ignored: a scheduler signals every process and the launcher forwards it, and the launcher ends
    processes that do not stop.
    """

    def __init__(self, signals: Iterable[int] = SIGNALS, is_launched: bool = False):
        self.is_set, self.is_immediate = False, True
        self._later = signal.SIG_IGN if is_launched else signal.SIG_DFL
        for number in signals:
            signal.signal(number, self._set)

    def check(self) -> None:
        if self.is_set:
            raise Stopped

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        for each in SIGNALS:
            signal.signal(each, self._later)
        if self.is_immediate:
            raise Stopped
