"""Files that are written whole or not at all, and folders that one process holds."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = ".lock"  # file in a folder that is held


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path` to write a file or a folder to, and renames that to `path` when the block ends.

    A process that is killed inside the block leaves what was at `path` as it was. An exception does so too, and what the
    block has written is removed. Folders above `path` are made.

    Raises:
        OSError: if `path` is a folder that is not empty, since no rename replaces one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)  # of a process that was killed
    try:
        yield partial
        partial.replace(path)
    finally:
        _remove(partial)


def write_json(path: str | Path, content: dict[str, Any]):
    """Writes indented JSON, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def hold_folder(folder: str | Path) -> Iterator[None]:
    """A context in which no other process, nor another call in this one, can hold the folder.

    The operating system lets go of the lock when its process ends, however it ends, so a file that is left behind locks nothing.

    Raises:
        FileExistsError: if the folder is held, naming the process that holds it.
    """
    path = Path(folder) / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = path.read_text() if path.exists() else ""
        raise FileExistsError(
            f"{str(folder)!r} is in use by {holder or 'another process'}; wait until it ends, or choose another --output_dir"
        ) from None
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _remove(path: Path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
