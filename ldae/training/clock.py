"""The clock of a run, which counts what is training and nothing else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

CLOCKS = {"wall": time.monotonic, "processor": time.process_time}


class Clock:
    """Counts seconds from when it is made, of one of `CLOCKS`."""

    def __init__(self, kind: Literal["wall", "processor"]):
        self._now = CLOCKS[kind]
        self._began = self._now()

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        return self._now() - self._began

    def add(self, seconds: float):
        """Counts seconds that have passed before, as if a resumed run had never stopped."""
        self._began -= seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """A context that takes no time."""
        began = self._now()
        yield
        self._began += self._now() - began
