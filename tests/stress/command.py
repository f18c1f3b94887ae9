"""The command line of the scripts: measure and keep the counts, or put a file's table into docs/reliability.md."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import benchmarks.command
from benchmarks.command import FileArguments

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
run = partial(benchmarks.command.run, page=PAGE)
__all__ = ["FileArguments", "earlier", "run"]


def earlier(output: str | None, part: str) -> dict[str, Any]:
    """The counts that a JSON file holds."""
    return json.loads(Path(output).read_text())[part] if output and Path(output).exists() else {}
