"""Signals that stop a run, and those that it leaves as they are."""

import os
import signal

import pytest

from tests.conftest import fork
from wanlite.runtime.signals import SIGNALS, Stopped, StopSignal


def receive(number, before=signal.SIG_DFL):
    """Return whether a run has been told to stop after it received a signal whose handler was `before`."""
    signal.signal(number, before)
    stop = StopSignal()
    stop.is_immediate = False
    os.kill(os.getpid(), number)
    return stop.is_set


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_a_run(number):
    def work():
        assert receive(number)
        assert signal.getsignal(number) == signal.SIG_DFL  # the second one ends the process

    assert fork(work) == 0


def test_a_closed_terminal_stops_no_run_under_nohup():
    def work():
        assert not receive(signal.SIGHUP, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    assert fork(work) == 0


def test_an_ignored_interrupt_stops_a_run():
    """A shell ignores it for commands in the background, and a user may send it by kill."""
    assert fork(lambda: pytest.fail() if not receive(signal.SIGINT, signal.SIG_IGN) else None) == 0


def test_a_signal_ends_work_that_may_end_at_once():
    def work():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
        StopSignal()
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGHUP)

    assert fork(work) == 0
