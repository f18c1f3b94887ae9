"""The processes of an ablation's runs, which end when it ends, however it ends."""

import ctypes
import signal
import subprocess
import sys
from pathlib import Path
from threading import Lock

LINUX = sys.platform == "linux"
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None) if LINUX else None, 1


class Processes:
    """A context from which no process lives on: an exception ends all with SIGTERM, at which a run writes a checkpoint.

    A process is also sent SIGTERM when this one is killed, on Linux.
    """

    def __init__(self):
        self._running: set[subprocess.Popen] = set()
        self._lock, self._ended = Lock(), False

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind, *exception):
        if kind is None:
            return
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()

    def run(self, command: list[str], log: Path, environment: dict[str, str]) -> int:
        """Runs a command to its end, its output appended to a log; returns its status."""
        with log.open("a") as file:
            with self._lock:
                if self._ended:
                    return -signal.SIGTERM
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    process_group=0 if sys.platform != "win32" else None,  # Ctrl-C reaches the ablation alone
                    preexec_fn=_end_with_parent if LINUX else None,
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.remove(process)


def _end_with_parent():
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
