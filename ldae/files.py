"""Files that are written whole or not at all, the digests by which damage to them is seen, and folders that one process holds."""

import glob
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil
from filelock import FileLock, Timeout

LOCK = ".lock"  # file in a folder that is held
DIGESTS = "digests.sha256"  # file in a sealed folder, in the format of `sha256sum`


@contextmanager
def atomic_write(path: str | Path, sealed: bool = False) -> Iterator[Path]:
    """Gives a path beside `path` to write a file or a folder to, and renames that to `path` when the block ends.

    A process that is killed inside the block leaves what was at `path` as it was, and so does a machine that loses power. An
    exception does so too, and what the block has written is removed. Folders above `path` are made.

    Args:
        sealed: keeps the digest of every file, by which `damage` sees what has changed: those of a folder in its `DIGESTS`,
            that of a file NAME beside it in .NAME.sha256. `sha256sum -c` reads them too.

    Raises:
        OSError: if `path` is a folder that is not empty, since no rename replaces one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        if sealed:
            seal(partial, path)
        _flush(partial)
        partial.replace(path)
        _flush_names(path.parent)
    finally:
        remove(partial)


@contextmanager
def replace_files(folder: str | Path) -> Iterator[Path]:
    """Gives an empty folder to write files to, which then take their places in `folder`, whole and sealed.

    Other files of `folder` stay, and have no digest. A process that is killed leaves a folder as it was, or one in which
    `damage` names a file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = _partial(folder / "files")
    partial.mkdir()
    try:
        yield partial
        seal(partial, folder)
        _flush(partial)
        for file in sorted(partial.iterdir(), key=lambda file: (file.name == DIGESTS, file.name)):  # the digests last
            file.replace(folder / file.name)
        _flush_names(folder)
    finally:
        remove(partial)


def _partial(path: Path) -> Path:
    """A path beside `path` that is this process's own. What killed processes of this machine left for `path` is removed."""
    machine = f"@{socket.gethostname()}.partial"
    for left in path.parent.glob(glob.escape(f".{path.name}.") + "*" + glob.escape(machine)):
        process = left.name.removesuffix(machine).rpartition(".")[2]
        if process.isdecimal() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            remove(left)
    return path.with_name(f".{path.name}.{os.getpid()}{machine}")


def seal(written: Path, path: Path):
    """Writes the digests of what is to stand at `path` and is `written` elsewhere: a file, or the files of a folder."""
    files = sorted(written.iterdir()) if written.is_dir() else [written]
    lines = [f"{_digest(file)}  {file.name if written.is_dir() else path.name}\n" for file in files]
    digests = written / DIGESTS if written.is_dir() else digests_of(path)
    digests.write_text("".join(lines))
    _flush(digests)


def digests_of(path: Path) -> Path:
    """The file of the digests of a sealed folder, or of a sealed file."""
    return path / DIGESTS if path.is_dir() else path.with_name(f".{path.name}.sha256")


def damage(path: str | Path) -> str | None:
    """What has happened to a sealed file or folder since it was written, in words that name the file; None: nothing."""
    path = Path(path)
    digests, folder = digests_of(path), path if path.is_dir() else path.parent
    if not digests.is_file():
        return f"{digests.name} is missing"
    text = digests.read_text(errors="replace")
    if not re.fullmatch(r"([0-9a-f]{64}  .+\n)+", text):
        return f"{digests.name} is damaged"
    for line in text.splitlines():
        digest, name = line.split("  ", 1)
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} is not what was written"
    return None


def read_json(path: str | Path) -> dict[str, Any]:
    """What a file of JSON holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it holds no JSON object.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; remove it to go on without it") from error
    return content


def write_json(path: str | Path, content: dict[str, Any]):
    """Writes indented JSON, whole or not at all; what JSON has no type for becomes its text."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n")


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


def validate_writable(folder: str | Path, name_of_option: str = "--output_dir"):
    """Validates that a folder, which need not be there, can be written to: before any work whose results would be lost.

    It is tried, and nothing is left of that. The first of several processes tries it for all.

    Raises:
        ValueError: naming the option, if it cannot.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    folder, new = Path(folder).expanduser(), []
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name_of_option}: the folder {str(folder)!r} cannot be written to ({error.strerror}); choose another"
        ) from error
    finally:
        for path in new:
            with suppress(OSError):  # it was not made, or another process uses it already
                path.rmdir()


def remove(path: Path):
    """Removes a file or a folder, if it is there. A folder is renamed first, so that nobody finds half of it under its name."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.startswith("."):
        remove(hidden := path.with_name(f".{path.name}.removed"))  # of a process that was killed
        path = path.replace(hidden)
    shutil.rmtree(path)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _flush(path: Path):
    """Waits until a file, or a folder with its files, has reached the disk."""
    if not path.is_dir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return
    for inner in path.iterdir():
        _flush(inner)
    _flush_names(path)


def _flush_names(folder: Path):
    if os.name == "posix":  # elsewhere a folder cannot be opened
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
