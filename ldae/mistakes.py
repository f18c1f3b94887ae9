"""How a command ends at its user's mistake: with one line and status 2, where a fault of the program shows its traceback."""

import dis
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm

from ldae.progress import hide_bars_of_libraries

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"ldae", "experiments", "benchmarks", "app.py"}
MISTAKES = (ValueError, OSError, ImportError, FloatingPointError)  # what checks raise
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a disk, a user's part of it, or the largest file allowed
SYSTEM = {  # where an error of the operating system is about the user's files
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
}  # fmt: skip


def run_command(main: Callable[[], Any]) -> None:
    """Runs a command's `main`. A mistake of its user ends the program with one line on stderr and status 2.

    A mistake is what a check of ours has raised, or an error of the operating system about a file or a full disk. Anything else
    is a fault of the program or of a library, and goes on as it is, unless another process has met a mistake and left this one
    alone. Ctrl-C ends it with one line, too. With `--debug` on the command line, which is taken off it, all go on as they are.
    """
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    hide_bars_of_libraries()
    try:
        main()
    except Exception as error:
        if debug or not (is_mistake(error) or _was_said()):
            raise
        if is_mistake(error) and is_first():
            # a bar that the mistake has left behind keeps to its own line
            tqdm.write(f"{program()}: error: {' '.join(_sentence(error).split())}", file=sys.stderr)
        sys.stdout.flush()
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if debug:
            raise
        if is_first():
            tqdm.write(f"{program()}: stopped; what was written is whole", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


@contextmanager
def reading(name_of_option: str, source: str | Path) -> Iterator[None]:
    """A context in which a library reads what a user gave. Whatever the library raises there becomes a mistake about that.

    Raises:
        ValueError: for an exception that no check of ours raised, with its first cause.
    """
    try:
        yield
    except Exception as error:
        if is_mistake(error):
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {cause}"[:500]
        raise ValueError(f"{name_of_option}: {str(source)!r} cannot be used ({reason}); --debug shows where") from error


def is_mistake(error: BaseException) -> bool:
    """Whether a `raise` statement of this project made the error, or the operating system did for a file or a full disk."""
    if _of_system(error):
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return isinstance(error, MISTAKES) and last is not None and _is_ours(last) and _is_raise_statement(last)


def program() -> str:
    """What the program is called: the name of its file, or `python -m MODULE`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name


def is_first() -> bool:
    """Whether no other process of the command has said what is wrong.

    Before the processes know each other they all read one command line, and the first one speaks for them.
    """
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("mistakes", 1) == 1
    except RuntimeError:  # the process that kept count has ended
        return True


def _was_said() -> bool:
    """Whether another process has said what is wrong. A library here then meets the end of that process."""
    try:
        return dist.is_initialized() and dist.distributed_c10d._get_default_store().add("mistakes", 0) > 0
    except RuntimeError:  # the process that kept count has ended
        return False


def _is_ours(traceback: TracebackType) -> bool:
    file = Path(traceback.tb_frame.f_code.co_filename).resolve()
    parts = file.relative_to(ROOT).parts if file.is_relative_to(ROOT) else ()
    return bool(parts) and (parts[0] in PACKAGES or (len(parts) == 1 and file.stem.endswith("_ldae")))


def _is_raise_statement(traceback: TracebackType) -> bool:
    """Whether the frame has raised by itself: what a built-in function raises, such as int("x"), also ends in our frame."""
    return dis.opname[traceback.tb_frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"


def _sentence(error: BaseException) -> str:
    if _fills_disk(error):
        return f"{error}: make room on the disk, or choose a folder on another"
    if isinstance(error, OSError) and _of_system(error):
        return f"{error.filename}: {error.strerror}; choose another file or folder, or put this one right"
    return str(error)


def _of_system(error: BaseException) -> bool:
    named = isinstance(error, OSError) and error.errno in SYSTEM and error.filename is not None
    return named or _fills_disk(error)


def _fills_disk(error: BaseException) -> bool:
    """Whether a disk was full. Libraries in Rust, such as safetensors, raise their own errors, which give the number in words."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(int(number) in FULL for number in re.findall(r"\(os error (\d+)\)", str(error)))
