"""Things in words: data sets and models as parts of paths, and times."""

import re
from pathlib import Path


def short_name(name: str) -> str:
    """A data set's or model's name as part of a file name: a folder's own name, or the Hub id."""
    name = Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"


def duration(seconds: float) -> str:
    """A time in words, such as "12 seconds", "3.5 minutes" or "40 hours"."""
    for unit, name, least in ((86400, "days", 2), (3600, "hours", 1.5), (60, "minutes", 2)):
        if seconds >= least * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.2g} seconds"
