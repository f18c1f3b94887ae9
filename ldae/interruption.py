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
    """

    def __init__(self, remedy: str):
        self.remedy, self._waits = remedy, False
        self.number: int | None = None
        self._before: dict[int, Any] = {}
        self._noted = 0.0  # when `number` came

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # Python allows it there only
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
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

    def end(self, number: int) -> NoReturn:
        """Ends the command by a signal, which another process may have received.

        Raises:
            SystemExit: in any case.
        """
        if os.environ.get("RANK", "0") == "0":
            print(f"\nInterrupted by {signal.Signals(number).name}: {self.remedy}.", file=sys.stderr)
        raise SystemExit(128 + number)

    def _receive(self, number: int, frame: Any):
        if not self._waits or (self.number is not None and time.monotonic() - self._noted > ECHO):
            self.end(number)
        if self.number is None:
            self.number, self._noted = number, time.monotonic()
