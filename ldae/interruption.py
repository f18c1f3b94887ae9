"""SIGINT and SIGTERM: where a command can go on later, it ends in a good place and says how."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which a signal may come again without being meant: from a launcher, or for each thread of a parent.
ECHO = 1.0


class Interruption:
    """A context in which SIGINT and SIGTERM end the command with one line and the status 130 or 143.

    Args:
        remedy: how to go on, the end of that line.

    Attributes:
        number: the signal that came while it was `postponed`, or None.
        death: the death of a `DataLoader`'s worker that was noted, or None.
    """

    def __init__(self, remedy: str):
        self.remedy, self._waits = remedy, False
        self.number: int | None = None
        self.death: RuntimeError | None = None
        self._before: dict[int, Any] = {}
        self._noted = 0.0  # when `number` came
        self._raises: Any = None  # torch's handler of a worker's death

    def __enter__(self) -> "Interruption":
        for number in SIGNALS:
            self._handle(number, self._receive)
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """A context in which the first signal is only noted, for whoever calls `end` in a good place; a second one ends it."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        if self.number is not None:
            self.end(self.number)

    @property
    def ends_run(self) -> bool:
        """Whether a signal or the death of a worker was noted."""
        return self.number is not None or self.death is not None

    def end(self, number: int) -> NoReturn:
        """Ends the command by a signal, which another process may have received.

        Raises:
            SystemExit: in any case.
        """
        if os.environ.get("RANK", "0") == "0":
            print(f"\nInterrupted by {signal.Signals(number).name}: {self.remedy}.", file=sys.stderr)
        raise SystemExit(128 + number)

    def note_deaths(self):
        """Notes the death of workers from now on, which torch would raise anywhere, in the middle of a step too.

        To be called once there are workers, since torch sets its handler with the first of them.
        """
        if hasattr(signal, "SIGCHLD") and callable(signal.getsignal(signal.SIGCHLD)):
            self._raises = signal.getsignal(signal.SIGCHLD)
            self._handle(signal.SIGCHLD, self._note)

    def _note(self, number: int, frame: Any):
        try:
            self._raises(number, frame)
        except RuntimeError as error:
            self.death = error

    def _handle(self, number: int, handler: Any):
        if threading.current_thread() is threading.main_thread():  # Python allows it there only
            before = signal.signal(number, handler)
            self._before.setdefault(number, before)

    def _receive(self, number: int, frame: Any):
        if not self._waits or (self.number is not None and time.monotonic() - self._noted > ECHO):
            self.end(number)
        if self.number is None:
            self.number, self._noted = number, time.monotonic()
