"""Signals -> one flag that a run checks at the points where it can stop."""

import signal
from collections.abc import Iterable
from types import FrameType

# SIGHUP: the terminal or the connection was closed.
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class Stopped(BaseException):
    """Raised in a run that was stopped by a signal."""


class StopSignal:
    """Sets `is_set` at the first of SIGNALS; the second one ends the process at once.

    SIGHUP is left ignored where it is, as under nohup.

    While `is_immediate`, the first one raises Stopped immediately: for work whose results are complete files
    on disk. Otherwise check() raises it, or the code that reads `is_set` stops. With `is_launched`, later
    signals are ignored: a scheduler signals every process and the launcher forwards it, and the launcher ends
    processes that do not stop.
    """

    def __init__(self, signals: Iterable[int] = SIGNALS, is_launched: bool = False):
        self.is_set, self.is_immediate = False, True
        self._later = signal.SIG_IGN if is_launched else signal.SIG_DFL
        self._handled = [number for number in signals if not _is_ignored(number)]
        for number in self._handled:
            signal.signal(number, self._set)

    def check(self) -> None:
        if self.is_set:
            raise Stopped

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        for each in self._handled:
            signal.signal(each, self._later)
        if self.is_immediate:
            raise Stopped


def _is_ignored(number: int) -> bool:
    """Whether SIGHUP is ignored; a shell also ignores SIGINT in the background, which a run receives by kill."""
    is_hangup = number == getattr(signal, "SIGHUP", None)
    return is_hangup and signal.getsignal(number) is signal.SIG_IGN
