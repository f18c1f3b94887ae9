"""Things in words: data sets and models as parts of paths, paths without this machine's folders, and times."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def short_name(name: str) -> str:
    """A data set's or model's name as part of a file name: a folder's own name, be it a link's, or the Hub id."""
    folder = Path(name).expanduser()
    name = os.path.basename(os.path.abspath(folder)) if folder.is_dir() else name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"


def is_path(name: str) -> bool:
    """Whether a name can only be a path's: no Hub id is absolute, begins with "." or "~", or has a backslash or two slashes."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1


def relative_names(names: Iterable[str], data: str | Path) -> list[str]:
    """The names of images, each relative to the folder of the data if it lies there."""
    prefix = f"{Path(data).expanduser()}{os.sep}"
    return [name.removeprefix(prefix) for name in names]


def duration(seconds: float) -> str:
    """A time in words, such as "12 seconds", "3.5 minutes" or "40 hours"."""
    for unit, name, least in ((86400, "days", 2), (3600, "hours", 1.5), (60, "minutes", 2)):
        if seconds >= least * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.2g} seconds"


def without_local_folders(content: Any, root: Path, data: str = "") -> Any:
    """Makes results that say nothing of this machine's folders.

    Args:
        content: what JSON can hold, and paths.
        root: an absolute path below it is given relative to it; any other, by its last part.
        data: the folder of the images, whose names in texts then begin with its own name.
    """
    if isinstance(content, dict):
        return {key: without_local_folders(value, root, data) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_local_folders(value, root, data) for value in content]
    if not isinstance(content, (str, Path)):
        return content
    folder, text = Path(data).expanduser(), str(content)
    if folder.is_absolute():
        text = text.replace(f"{folder.parent.as_uri()}/", "").replace(f"{folder.parent}{os.sep}", "")
    path = Path(text)
    if not path.is_absolute():
        return text
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
