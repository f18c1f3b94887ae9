"""The command line of the scripts: measure and keep the counts, or put a file's table into docs/reliability.md."""

from functools import partial
from pathlib import Path

import benchmarks.command

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
run = partial(benchmarks.command.run, page=PAGE)
