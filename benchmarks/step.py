"""Time of a training step (forward, backward, AdamW) beside baselines with the same blocks.

    python -m benchmarks.step --output benchmarks/results/step.json   # measures, and prints the table
    python -m benchmarks.step --table benchmarks/results/step.json    # prints the table, and puts it into README.md

Read ratios, not seconds: they survive a change of machine. On the CPU all contenders take a step in turn, and "matrix
products alone" is the lower bound: the l-DAE step's own products, as many of each shape, without anything between them.
On a GPU each contender has the card to itself, one after the other, and the bound is the card's rate of matrix products.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from benchmarks import command
from benchmarks.contenders import Contender, Step, contenders, flops_per_image
from benchmarks.device import MatrixProducts, durations, in_rounds, measured_flops, peak_flops, ratio
from ldae import LDAEConfig
from ldae.hardware import bf16_is_faster, keep_freed_memory
from ldae.options import option
from ldae.report.tables import markdown

LOWER_BOUND = "matrix products alone"


@dataclass(kw_only=True)
class StepArguments(command.FileArguments):
    """Time a training step of l-DAE beside ViTMAE's and DiT's."""

    model_size: str = option("tiny", "Named size: tiny, small, base, half-large, large.")
    num_hidden_layers: int | None = option(
        None, "Blocks of the encoder and of the decoder, in place of the size's.", minimum=1
    )
    image_size: int = option(64, "Side of the images in pixels.", minimum=1)
    patch_size: int = option(8, "Side of a patch in pixels.", minimum=1)
    batch_size: int = option(64, "Images in a step.", minimum=1)
    attention: list[str] = option(["sdpa", "eager"], "Attention implementations of l-DAE and ViTMAE.")
    keep_ratio: float = option(
        1.0, "Time l-DAE and ViTMAE also with this share of the tokens in the encoder.", exclusive_minimum=0, maximum=1
    )
    compile: bool = option(False, "Time everything also with compiled blocks.")
    steps: int = option(9, "Timed steps of each contender.", minimum=1)
    warmup: int = option(2, "Steps of each contender that are not counted.", minimum=0)
    threads: int = option(1, "CPU threads.", minimum=1)
    mixed_precision: Literal["auto", "no", "bf16"] = option("auto", "bf16 autocast, or auto: where it is faster.")
    device: str = option("cpu", "cpu or cuda.")


@dataclass(frozen=True)
class Task:
    """What every contender is asked to do."""

    config: LDAEConfig
    batch_size: int
    device: torch.device
    bf16: bool
    threads: int

    def step(self, contender: Contender) -> Step:
        """A contender's training step."""
        return Step(contender, self.config, self.batch_size, self.device, self.bf16)


def wants_bf16(mixed_precision: str, device: torch.device) -> tuple[bool, str]:
    """Whether to autocast to bf16, and what the table says of it."""
    faster = bf16_is_faster(device)
    bf16 = faster if mixed_precision == "auto" else mixed_precision == "bf16"
    why = "" if faster else f"; this {device.type} multiplies faster in float32"
    return bf16, ("bf16 autocast" if bf16 else "float32") + why


def peak_memory(contender: Contender, task: Task) -> int:
    """Bytes that two steps on the CPU take at their peak: growth of the resident memory of a process that does nothing else.

    Weights, gradients, optimizer states and activations all count; the imports do not.
    """
    import resource

    torch.set_num_threads(task.threads)
    keep_freed_memory()  # as in the process that is timed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step = task.step(contender)
    step()
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def entry(
    contender: Contender | None, task: Task, seconds: list[float], memory: int | None, parameters: int | None
) -> dict:
    """What is kept of a contender, or with None of the lower bound."""
    return {
        "contender": contender and asdict(contender),
        "seconds": seconds,
        "median": statistics.median(seconds),
        "quartiles": statistics.quantiles(seconds, n=4)[::2] if len(seconds) > 1 else seconds * 2,
        "peak_memory": memory,
        "parameters": parameters,
        "flops": contender and task.batch_size * flops_per_image(contender, task.config),
    }


def one_after_the_other(chosen: list[Contender], task: Task, warmup: int, steps: int) -> Iterator[tuple[str, dict]]:
    """Name and entry of each contender, which has the GPU to itself while it is timed."""
    for contender in tqdm(chosen, unit="contender"):
        torch.compiler.reset()  # the number of variants that it keeps of one function is limited
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(task.device)
        step = task.step(contender)
        seconds = durations(step, task.device, steps, warmup)
        memory, parameters = torch.cuda.max_memory_allocated(task.device), step.parameters()
        del step
        yield contender.name, entry(contender, task, seconds, memory, parameters)


def in_turn(chosen: list[Contender], task: Task, warmup: int, steps: int) -> Iterator[tuple[str, dict]]:
    """Name and entry of each contender and of the lower bound: each round takes one step of all, after the warm-up rounds."""
    memory = {}
    spawn = multiprocessing.get_context("spawn")
    for contender in tqdm(chosen, "memory", unit="contender"):
        with spawn.Pool(1) as pool:
            memory[contender] = pool.apply(peak_memory, (contender, task))

    models = {contender: task.step(contender) for contender in chosen}
    with MatrixProducts() as products:
        task.step(Contender("l-DAE", "eager"))()  # sdpa makes the same products inside its kernel
    calls: dict[str, Callable[[], None]] = {contender.name: step for contender, step in models.items()}
    calls[LOWER_BOUND] = products.replay(task.device)
    times = in_rounds(calls, steps, warmup)
    for contender, step in models.items():
        yield contender.name, entry(contender, task, times[contender.name], memory[contender], step.parameters())
    yield LOWER_BOUND, entry(None, task, times[LOWER_BOUND], None, None)


def measure(arguments: StepArguments) -> Iterator[dict]:
    """The result to save, again after each contender that is done."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    bf16, precision = wants_bf16(arguments.mixed_precision, device)
    sizes = {"image_size": arguments.image_size, "patch_size": arguments.patch_size, "latent_dim": 16}
    if arguments.num_hidden_layers is not None:
        sizes["num_hidden_layers"] = arguments.num_hidden_layers
    config = LDAEConfig.from_size(arguments.model_size, **sizes)
    task = Task(config, arguments.batch_size, device, bf16, arguments.threads)
    chosen = contenders(arguments.attention, arguments.keep_ratio, arguments.compile)
    result: dict[str, Any] = {
        "benchmark": "step",
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "peak_flops": peak_flops(device) if bf16 else None,
        "measured_flops": measured_flops(device, torch.bfloat16 if bf16 else torch.float32),
        "contenders": {},
    }
    run = one_after_the_other if device.type == "cuda" else in_turn
    for name, measured in run(chosen, task, arguments.warmup, arguments.steps):
        result["contenders"][name] = measured
        yield result


def conditions(result: dict) -> str:
    """Says on what and how a result was measured, in a sentence."""
    arguments, hardware, versions = result["arguments"], result["hardware"], result["versions"]
    machine = hardware["processor"] if result["device"] == "cpu" else result["device"]
    threads = f", {arguments['threads']} CPU thread(s)" if result["device"] == "cpu" else ""
    text = (
        f"{machine}{threads}, {result['precision']}; size {arguments['model_size']}, "
        f"{arguments['image_size']} px, patch {arguments['patch_size']}, batch {arguments['batch_size']}, "
        f"{arguments['steps']} steps each; torch {versions['torch']}, transformers {versions['transformers']}, "
        f"diffusers {versions['diffusers']}; {result['date'][:10]}."
    )
    if rate := result.get("measured_flops"):
        text += f" One large matrix product runs at {rate / 1e12:.{0 if rate > 1e13 else 2}f} TFLOP/s"
        text += f", of {peak / 1e12:.0f} published." if (peak := result["peak_flops"]) else "."
    return text


def table(result: dict) -> str:
    """A result as markdown."""
    found, batch_size = result["contenders"], result["arguments"]["batch_size"]
    fastest: dict[tuple, str] = {}  # of the l-DAEs that differ in their attention only
    for name, it in found.items():
        if name.startswith("l-DAE"):
            kind = it["contender"]["keep_ratio"], it["contender"]["compiled"]
            fastest[kind] = min(name, fastest.get(kind, name), key=lambda name: found[name]["median"])
    rates = {"MFU, published rate": result.get("peak_flops"), "MFU, measured rate": result.get("measured_flops")}
    rows = []
    for name, it in found.items():
        middle, low, high = (1000 * x for x in (it["median"], *it["quartiles"]))
        used = {
            title: f"{it['flops'] / it['median'] / rate:.0%}" if it["flops"] else ""
            for title, rate in rates.items()
            if rate
        }
        rows.append({
            "": name,
            "parameters": f"{it['parameters'] / 1e6:.1f} M" if it["parameters"] else "",
            "ms a step (quartiles)": f"{middle:.0f} ({low:.0f} to {high:.0f})",
            "images/s": f"{batch_size / it['median']:,.0f}" if it["parameters"] else "",
            "peak MiB": f"{it['peak_memory'] / 2**20:.0f}" if it["peak_memory"] else "",
            **used,
            **{f"{best} / it": f"{ratio(found[best]['seconds'], it['seconds']):.2f}" for best in fastest.values()},
        })  # fmt: skip
    return f"{conditions(result)}\n\n{markdown(rows)}"


if __name__ == "__main__":
    command.run(StepArguments, measure, table)
