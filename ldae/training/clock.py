"""The clock of a run, which counts what is training and nothing else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

CLOCKS = {"wall": time.monotonic, "processor": time.process_time}


class Clock:
    """Counts seconds of one of `CLOCKS`, from its start."""

    def __init__(self, kind: Literal["wall", "processor"]):
        self._now = CLOCKS[kind]
        self.start()

    def start(self, after: float = 0.0):
        """Counts from now on, after the seconds that a run has had before it was resumed."""
        self._began = self._now() - after

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        return self._now() - self._began

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """A context whose time is not counted."""
        began = self._now()
        yield
        self._began += self._now() - began
