"""What it takes to start: imports, `--help`, and a whole run of one step, beside the import of transformers' ViT.

python -m benchmarks.startup --output benchmarks/results/startup.json
python -m benchmarks.startup --table benchmarks/results/startup.json    # puts the table into README.md
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks import command
from benchmarks.device import in_rounds
from ldae.options import option
from ldae.report.tables import markdown

PEER = "import of transformers' ViT and its image processor"
COMMANDS = {
    "import torch": ["-c", "import torch"],
    PEER: ["-c", "from transformers import ViTImageProcessor, ViTModel"],
    "import ldae": ["-c", "import ldae"],
    "train_ldae.py --help": ["train_ldae.py", "--help"],
    "probe_ldae.py --help": ["probe_ldae.py", "--help"],
    "train_ldae.py, one step": ["train_ldae.py", "--max_steps", "1", "--no_probe", "--report_to", "none"],
}


@dataclass(kw_only=True)
class StartupArguments(command.FileArguments):
    """Time imports and commands as whole processes."""

    rounds: int = option(5, "Timed rounds, after one that is not counted.", minimum=1)


def measure(arguments: StartupArguments) -> Iterator[dict]:
    """Rounds of all commands in turn: for each [processor seconds, the clock's seconds] of every round."""
    calls = {name: [sys.executable, *words] for name, words in COMMANDS.items()}
    yield {"benchmark": "startup", "seconds": in_rounds(calls, arguments.rounds, 1, seconds_of)}


def seconds_of(words: list[str]) -> list[float]:
    """[processor seconds, the clock's seconds] of a command; what a training writes is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        if "--max_steps" in words:
            words = [*words, "--output_dir", f"{folder}/run"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return [after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, clock]


def table(result: dict) -> str:
    """A result as markdown."""
    seconds = result["seconds"]
    head = (
        f"{result['hardware']['processor']}, medians of {result['arguments']['rounds']} rounds; {result['date'][:10]}."
    )
    rows = []
    for name, taken in seconds.items():
        processor, clock = (statistics.median(values) for values in zip(*taken, strict=True))
        part = statistics.median(a[0] / b[0] for a, b in zip(taken, seconds[PEER], strict=True))
        rows.append({
            "": name, "processor seconds": processor, "of the import of ViT": f"{part:.2f}", "seconds by the clock": clock,
        })  # fmt: skip
    return f"{head}\n\n{markdown(rows)}"


if __name__ == "__main__":
    command.run(StartupArguments, measure, table)
