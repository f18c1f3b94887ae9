"""Signals that reach a command."""

import os
import signal
import sys

import pytest

from ldae.interruption import Interruption


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="there is no SIGCHLD here, and torch sets no handler")
def test_the_death_of_a_worker_is_noted_once_however_often_a_run_asks_for_it():
    """A run asks at each batch. A handler that wrapped itself each time would run out of the stack in a long one."""
    calls = []

    def raises(number, frame):
        calls.append(number)
        raise RuntimeError("a worker died")

    before = signal.signal(signal.SIGCHLD, raises)
    try:
        with Interruption("go on") as interruption:
            for _ in range(2 * sys.getrecursionlimit()):
                interruption.note_deaths()
            os.kill(os.getpid(), signal.SIGCHLD)
            assert calls == [signal.SIGCHLD]
            assert str(interruption.death) == "a worker died"
        assert signal.getsignal(signal.SIGCHLD) is raises
    finally:
        signal.signal(signal.SIGCHLD, before)
