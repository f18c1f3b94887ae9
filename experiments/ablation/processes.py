"""The processes of an ablation's runs, which end when it ends, however it ends."""

import ctypes
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import IO

import joblib
import torch

PR_SET_PDEATHSIG = 1
# what a new process calls to end with its parent; it is made here, since no library can be loaded safely between fork and exec
END_WITH_PARENT = (
    partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM) if sys.platform == "linux" else None
)


class Processes:
    """A context from which no process lives on: an exception ends all with SIGTERM, at which a run writes a checkpoint.

    A process is also sent SIGTERM when this one is killed, on Linux.

    Args:
        workers: how many run at a time; each has its share of the machine.
    """

    def __init__(self, workers: int = 1):
        self._workers, self._slots = workers, Queue[int]()
        for slot in range(workers):
            self._slots.put(slot)
        self._running: set[subprocess.Popen] = set()
        self._lock, self._ended = Lock(), False

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object):
        if kind is None:
            return
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()

    def run(self, command: list[str], log: Path) -> int:
        """Runs a command to its end, once a worker is free, its output appended to a log; returns its status."""
        slot = self._slots.get()
        try:
            with log.open("a") as file:
                return self._run(command, file, _environment(slot, self._workers))
        finally:
            self._slots.put(slot)

    def _run(self, command: list[str], output: IO[str], environment: dict[str, str]) -> int:
        with self._lock:
            if self._ended:
                return -signal.SIGTERM
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0 if sys.platform != "win32" else None,  # Ctrl-C reaches the ablation alone
                preexec_fn=END_WITH_PARENT,
            )
            self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.remove(process)


def _environment(slot: int, workers: int) -> dict[str, str]:
    """A share of the cores, unless OMP_NUM_THREADS says otherwise, and a GPU of its own where there are several."""
    environment = {"OMP_NUM_THREADS": str(max(1, joblib.cpu_count() // workers)), **os.environ}
    if (count := torch.cuda.device_count()) > 1:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % count]
    return environment
