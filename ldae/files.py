"""Files that are written whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def _remove(path: Path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
