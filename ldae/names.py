"""Names of data sets and models as parts of paths."""

import re
from pathlib import Path


def short_name(name: str) -> str:
    """A data set's or model's name as part of a file name: a folder's own name, or the Hub id."""
    name = Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"
