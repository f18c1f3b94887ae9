"""Runs commands of the package in forked processes, in which everything is imported already."""

import contextlib
import importlib
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ldae.mistakes import run_command

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds, after which a command hangs

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
torch.set_num_threads(1)


def warm_up(module: str, argv: Sequence[str]):
    """Runs a command once, and then imports here what it had imported late."""
    before = set(sys.modules)
    with tempfile.NamedTemporaryFile("r") as file:
        outcome = run(module, argv, limit=10 * LIMIT, note_modules=file.name)
        assert outcome.kind == "worked", outcome.text
        names = file.read().split()
    for name in names:
        if name not in before and "__mp_main__" not in name:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


@dataclass
class Outcome:
    """How a command ended.

    Args:
        status: the exit status; negative, the signal that ended it.
        text: what it wrote, both streams.
        seconds: by the clock.
    """

    status: int
    text: str
    seconds: float

    @property
    def kind(self) -> str:
        """One word: worked, refused (status 2 and one line that says what is wrong), or killed; or what must not be: traceback,
        hang, crash, unclear."""
        if self.status == 0:
            return "worked"
        if "Traceback (most recent call last)" in self.text:
            return "traceback"
        if self.status == -signal.SIGALRM:
            return "hang"
        if self.status == -signal.SIGKILL:
            return "killed"
        if self.status < 0:
            return "crash"
        lines = [line for line in re.split(r"[\r\n]", self.text) if ": error: " in line]
        return "refused" if self.status == 2 and len(lines) == 1 else "unclear"


def run(
    module: str,
    argv: Sequence[str],
    kill_after: float | None = None,
    limit: float = LIMIT,
    note_modules: str | None = None,
) -> Outcome:
    """Runs `main(argv)` of a module as its command does.

    Args:
        kill_after: seconds after which it and its children are killed, by SIGKILL.
        limit: seconds after which it is ended for hanging.
        note_modules: a file to write the names of all modules to that it has imported at its end.
    """
    main = importlib.import_module(module).main
    read, write = os.pipe()
    sys.stdout.flush()
    began = time.monotonic()
    if (child := os.fork()) == 0:
        _be_the_command(module, argv, main, write, note_modules)
    os.close(write)
    os.set_blocking(read, False)
    end, number = (began + limit, signal.SIGALRM) if kill_after is None else (began + kill_after, signal.SIGKILL)
    parts: list[bytes] = []
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        with contextlib.suppress(BlockingIOError):
            while part := os.read(read, 1 << 16):
                parts.append(part)
        if done:
            break
        if time.monotonic() >= end:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, number)
            end = time.monotonic() + 10
            number = signal.SIGKILL
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):  # loaders' workers, and what an ablation has started
        os.killpg(child, signal.SIGKILL)
    os.close(read)
    text = b"".join(parts).decode(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), text, time.monotonic() - began)


def _be_the_command(module: str, argv: Sequence[str], main, write: int, note_modules: str | None):
    """The child's part: does not return."""
    status = 1
    try:
        tqdm.set_lock(threading.RLock())  # a killed child may have held the parent's, which all children share
        os.setsid()
        for number in (1, 2):
            os.dup2(write, number)
        sys.argv = [f"{module}.py", *argv]
        run_command(main)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        if note_modules is not None:
            Path(note_modules).write_text(" ".join(list(sys.modules)))
        os._exit(status)
