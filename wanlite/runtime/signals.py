"""Signals -> one question that a run asks where it can stop."""

import signal

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class Stopped(BaseException):
    """A run was asked to stop, and does where it is."""


class StopSignal:
    """Turns the first SIGTERM, SIGINT or SIGUSR1 into `asked`; the second one ends the process at once.

    While `is_immediate`, the first one raises Stopped there and then: for work whose results are whole files
    on disk. Else it is up to `check`, which raises it, and to whoever reads `asked`. Where `is_launched`,
    later ones change nothing: a scheduler sends its signal to every process and the launcher sends it on, and
    it is the launcher that ends who does not stop.
    """

    def __init__(self, signals=SIGNALS, is_launched=False):
        self.asked, self.is_immediate, self.later = (
            False,
            True,
            signal.SIG_IGN if is_launched else signal.SIG_DFL,
        )
        for number in signals:
            signal.signal(number, self._ask)

    def check(self):
        if self.asked:
            raise Stopped

    def _ask(self, number, frame):
        self.asked = True
        for each in SIGNALS:
            signal.signal(each, self.later)
        if self.is_immediate:
            raise Stopped
