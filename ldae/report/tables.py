"""Tables in Markdown, put between the markers of a text, so that no figure in it is typed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

MISSING = "–"


def markdown(table: pd.DataFrame | Sequence[Mapping[str, Any]], left: Collection[str] | None = None) -> str:
    """A Markdown table of a frame's columns, without its index, and without a line break at its end; empty without rows.

    Text and whole numbers stand as they are, other numbers with one decimal, and a dash where there is none.

    Args:
        table: the frame, or its rows by the names of the columns.
        left: the columns that are aligned to the left, by default the first; the others are aligned to the right.
    """
    import pandas as pd

    table = pd.DataFrame(table, dtype=object)
    left = table.columns[:1] if left is None else left
    rule = ["---" if name in left else "---:" for name in table.columns]
    if table.empty:
        return ""
    rows = [list(table.columns), rule, *table.itertuples(index=False, name=None)]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(value: Any) -> str:
    if value is None or value != value:  # pandas writes NaN for None
        return MISSING
    return f"{value:.1f}" if isinstance(value, float) else str(value).replace("|", r"\|")


def fill(path: str | Path, marker: str, text: str):
    """Replaces what stands between two lines `<!-- marker -->` of a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there are not two of them.
    """
    path, line = Path(path), f"<!-- {marker} -->"
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}: give one that holds the line {line!r} twice")
    parts = path.read_text().split(line)
    if len(parts) != 3:
        raise ValueError(f"{path} must hold the line {line!r} twice, got it {len(parts) - 1} times")
    before, _, after = parts
    path.write_text(f"{before}{line}\n{text}\n{line}{after}")
