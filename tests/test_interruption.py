"""Signals that reach a command."""

import os
import signal

import pytest

from ldae.interruption import Interruption


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="there is no SIGCHLD here, and torch sets no handler")
def test_the_death_of_a_worker_is_noted():
    def raises(number, frame):
        raise RuntimeError("a worker died")

    before = signal.signal(signal.SIGCHLD, raises)
    try:
        with Interruption("go on") as interruption:
            interruption.note_deaths()
            assert not interruption.ends_run
            os.kill(os.getpid(), signal.SIGCHLD)
            assert str(interruption.death) == "a worker died"
            assert interruption.ends_run
        assert signal.getsignal(signal.SIGCHLD) is raises
    finally:
        signal.signal(signal.SIGCHLD, before)
