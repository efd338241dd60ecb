"""Signals -> one question that a run asks where it can stop."""

import signal

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class Stopped(BaseException):
    """A run was asked to stop, and does where it is."""


class StopSignal:
    """Turns the first SIGTERM, SIGINT or SIGUSR1 into `asked`; the second one ends the process at once.

    While `is_immediate`, the first one raises Stopped there and then: for work whose results are whole files on disk. Else it
    is up to `check`, which raises it, and to whoever reads `asked`.
    """

    def __init__(self, signals=SIGNALS):
        self.asked, self.is_immediate = False, True
        for number in signals:
            signal.signal(number, self._ask)

    def check(self):
        if self.asked:
            raise Stopped

    def _ask(self, number, frame):
        self.asked = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self.is_immediate:
            raise Stopped
