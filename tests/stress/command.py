"""The command line of the scripts: measure and keep the counts, or put a file's table into docs/reliability.md."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import benchmarks.command
from benchmarks.command import FileArguments

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
__all__ = ["FileArguments", "earlier", "run"]


def run(options: type, measure: Callable[[Any], Iterator[dict]], table: Callable[[dict], str]):
    """The command line of a script, as `benchmarks.command.run`."""
    benchmarks.command.run(options, measure, table, PAGE)


def earlier(output: str | None, part: str) -> dict[str, Any]:
    """The counts that a JSON file holds."""
    return json.loads(Path(output).read_text())[part] if output and Path(output).exists() else {}
