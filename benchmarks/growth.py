"""How the cost of l-DAE's training step grows: with tokens, width, depth, the share of tokens kept, and processes.

    python -m benchmarks.growth --output benchmarks/results/growth.json
    python -m benchmarks.growth --table benchmarks/results/growth.json    # puts table and plot into README.md

One quantity is varied at a time. The exponent p of cost = c x^p that is measured stands beside that of the matrix products'
floating-point operations.
"""

import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks import command
from benchmarks.contenders import Contender, flops_per_image
from benchmarks.device import in_rounds
from benchmarks.step import Task, peak_memory, wants_bf16
from ldae import LDAEConfig
from ldae.options import option
from ldae.report.drawing import BLUE, INK, LINE, panels, save_figure
from ldae.report.tables import markdown

FIGURE = Path(__file__).with_name("growth.png")
BASE = {
    "image_size": 64, "patch_size": 8, "latent_dim": 16, "hidden_size": 256, "num_attention_heads": 4,
    "num_hidden_layers": 6, "decoder_num_hidden_layers": 2,
}  # fmt: skip


@dataclass(kw_only=True)
class GrowthArguments(command.FileArguments):
    """Time l-DAE's training step at several sizes."""

    batch_size: int = option(32, "Images in a step of one process.", minimum=1)
    steps: int = option(7, "Timed steps of each size.", minimum=2)
    mixed_precision: str = option("auto", "bf16 autocast, or auto: where it is faster.", choices=("auto", "no", "bf16"))


def sizes() -> dict[str, dict[float, dict[str, Any]]]:
    """For each quantity the fields of the configuration that give it a value."""
    return {
        "tokens": {(size // 8) ** 2: {"image_size": size} for size in (32, 64, 128)},
        "width": {width: {"hidden_size": width, "num_attention_heads": width // 64} for width in (128, 256, 512)},
        "blocks": {2 * n: {"num_hidden_layers": n, "decoder_num_hidden_layers": n} for n in (2, 4, 8)},
        "share of tokens kept": {share: {"keep_ratio": share} for share in (0.25, 0.5, 1.0)},
    }


def measure(arguments: GrowthArguments) -> Iterator[dict]:
    """Seconds and peak memory of each size, each quantity's sizes taking a step in turn on one thread; then of processes."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    bf16, precision = wants_bf16(arguments.mixed_precision, device)
    result: dict[str, Any] = {"benchmark": "growth", "precision": precision, "quantities": {}}
    tasks = {
        quantity: {
            v: Task(LDAEConfig(**{**BASE, **fields}), arguments.batch_size, device, bf16, 1) for v, fields in of.items()
        }
        for quantity, of in sizes().items()
    }
    memory = {quantity: {v: _memory(task) for v, task in of.items()} for quantity, of in tqdm(tasks.items(), "memory")}
    for quantity, of in tasks.items():
        steps, found = {}, {}
        for value, task in tqdm(of.items(), quantity):
            flops = arguments.batch_size * flops_per_image(_contender(task), task.config)
            found[value] = {"peak_memory": memory[quantity][value], "flops": flops}
            steps[value] = task.step(_contender(task))
        seconds = in_rounds(steps, arguments.steps, warmup=1)
        result["quantities"][quantity] = [{"value": v, "seconds": seconds[v], **found[v]} for v in steps]
        yield result
    result["processes"] = {str(n): processes_seconds(n, arguments, bf16) for n in (1, 2)}
    yield result


def _contender(task: Task) -> Contender:
    return Contender("l-DAE", keep_ratio=task.config.keep_ratio)


def _memory(task: Task) -> int:
    """Bytes that two steps take at their peak, in a new process; it must be made by a small one, whose peak it inherits."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, (_contender(task), task))


def processes_seconds(number: int, arguments: GrowthArguments, bf16: bool) -> float:
    """The clock's median seconds of a step of train_ldae.py by so many processes, each with a whole batch and one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    options = {**BASE, "per_device_batch_size": arguments.batch_size, "mixed_precision": "bf16" if bf16 else "no"}
    command += ["-m", "train_ldae", "photos", "--dry_run", "--output_dir", "runs/growth"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = re.search(r"images/s, ([\d.]+) s a step", done.stdout)
    if found is None:
        raise RuntimeError(f"the dry run says no speed: {done.stdout}")
    return float(found[1])


def exponent(values: list[float], costs: list[float]) -> float:
    """p of the power law c x^p through the first and the last value; NaN where the first costs nothing that can be seen."""
    return math.log(costs[-1] / costs[0]) / math.log(values[-1] / values[0]) if costs[0] else math.nan


def table(result: dict) -> str:
    """A result as markdown."""
    arguments = result["arguments"]
    blocks = f"{BASE['num_hidden_layers']} + {BASE['decoder_num_hidden_layers']} blocks of width {BASE['hidden_size']}"
    head = (
        f"{result['hardware']['processor']}, 1 thread, {result['precision']}, batches of {arguments['batch_size']}. Where "
        f"nothing else is said: {blocks}, 64 tokens, all kept. {result['date'][:10]}."
    )
    rows = []
    for quantity, sizes in result["quantities"].items():
        values = [size["value"] for size in sizes]
        times, flops, memory = (
            [statistics.median(size["seconds"]) for size in sizes],
            *([size[key] for size in sizes] for key in ("flops", "peak_memory")),
        )
        costs = {"exponent of time": times, "of operations": flops, "of memory": memory}
        rows.append({
            "": quantity,
            "values": ", ".join(f"{value:g}" for value in values),
            "ms a step": ", ".join(f"{1000 * time:,.0f}" for time in times),
            "peak MiB": ", ".join(f"{peak / 2**20:,.0f}" for peak in memory),
            **{title: f"{exponent(values, cost):.2f}".replace("nan", "–") for title, cost in costs.items()},
        })  # fmt: skip
    one, two = (result["processes"][n] for n in ("1", "2"))
    foot = (
        f"Two processes, each with a batch of its own, take {two / one:.2f} times as long for a step as one: together they see "
        f"{2 * one / two:.2f} times as many images a second."
    )
    return f"{head}\n\n{markdown(rows, left=('', 'values', 'ms a step', 'peak MiB'))}\n\n{foot}"


def draw(result: dict, path: Path = FIGURE) -> Path:
    """Draws the seconds of a step against each quantity, on logarithmic axes, beside the operations at the same scale."""
    quantities = result["quantities"]
    figure, axes = panels(len(quantities), 3 * len(quantities), 2.8)
    for panel, (quantity, rows) in zip(axes, quantities.items(), strict=True):
        values, seconds = [row["value"] for row in rows], [statistics.median(row["seconds"]) for row in rows]
        rate = seconds[0] / rows[0]["flops"]
        panel.loglog(values, seconds, label="measured", color=BLUE, **LINE)
        panel.loglog(values, [rate * row["flops"] for row in rows], "--", label="as the operations", color=INK)
        panel.set_xlabel(quantity)
        panel.set_xticks(values, [f"{value:g}" for value in values])
        panel.set_yticks(seconds, [f"{taken:.2g}" for taken in seconds])
        panel.minorticks_off()
    axes[0].set_ylabel("seconds a step")
    axes[0].legend(frameon=False)
    return save_figure(figure, path)


if __name__ == "__main__":
    command.run(GrowthArguments, measure, table, draw=draw)
