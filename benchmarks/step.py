"""Time of a training step (forward, backward, AdamW) beside baselines with the same blocks, all in one run, interleaved.

    python -m benchmarks.step --output benchmarks/results/step.json   # measures, and prints the table
    python -m benchmarks.step --table benchmarks/results/step.json    # prints the table, and puts it into README.md

Read ratios, not seconds: they survive a change of machine. "matrix products alone" is the floor: the l-DAE step's own
products, as many of each shape, without anything between them.
"""

import multiprocessing
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from benchmarks import command
from ldae import LDAEConfig, LDAEForPreTraining
from ldae.hardware import has_bf16

FLOOR = "matrix products alone"
OURS = {"l-DAE, sdpa": "sdpa", "l-DAE, eager": "eager"}
BASELINES = ("ViTMAE, sdpa", "ViTMAE, eager", "DiT")


@dataclass
class StepArguments:
    """Time a training step of l-DAE beside ViTMAE's and DiT's."""

    model_size: str = field(default="tiny", metadata={"help": "Named size: tiny, small, base, half-large, large."})
    image_size: int = field(default=64, metadata={"help": "Side of the images in pixels."})
    patch_size: int = field(default=8, metadata={"help": "Side of a patch in pixels."})
    batch_size: int = field(default=64, metadata={"help": "Images in a step."})
    steps: int = field(default=9, metadata={"help": "Timed steps of each contender."})
    warmup: int = field(default=2, metadata={"help": "Steps of each contender that are not counted."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    mixed_precision: str = field(
        default="auto",
        metadata={"help": "bf16 autocast, or auto: where it has instructions.", "choices": ["auto", "no", "bf16"]},
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a JSON file that is there."})
    table: str | None = field(default=None, metadata={"help": "Only put this JSON file's table into README.md."})


class DiTForTraining(nn.Module):
    """Diffusers' DiT predicting its input: the cost of a DiT training step without its noise."""

    def __init__(self, config: LDAEConfig):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.transformer = DiTTransformer2DModel(
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.hidden_size // config.num_attention_heads,
            in_channels=config.num_channels,
            num_layers=config.num_hidden_layers + config.decoder_num_hidden_layers,
            sample_size=config.image_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=1000,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        t, labels = torch.randint(1000, (2, len(pixel_values)), device=pixel_values.device)
        return nn.functional.mse_loss(self.transformer(pixel_values, t, labels).sample, pixel_values)


def make(name: str, config: LDAEConfig) -> nn.Module:
    """The contender of that name, with the blocks of `config`."""
    if name in OURS:
        model = LDAEForPreTraining._from_config(config, attn_implementation=OURS[name])
        model.ldae.tokenizer.spectrum.fill_(1)  # stands for a fitted tokenizer
        return model
    if name == "DiT":
        return DiTForTraining(config)
    blocks = {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
    }
    decoder = {f"decoder_{key}": value for key, value in blocks.items()}
    decoder["decoder_num_hidden_layers"] = config.decoder_num_hidden_layers
    mae = ViTMAEConfig(
        **blocks,
        **decoder,
        num_hidden_layers=config.num_hidden_layers,
        image_size=config.image_size,
        patch_size=config.patch_size,
        mask_ratio=0.0,  # every token visible, as for l-DAE
    )
    return ViTMAEForPreTraining._from_config(mae, attn_implementation=name.split(", ")[1])


class Step:
    """A contender's training step; calling it takes one."""

    def __init__(self, name: str, config: LDAEConfig, batch_size: int, device: torch.device, bf16: bool):
        torch.manual_seed(0)
        self.model = make(name, config).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.images = torch.rand(batch_size, 3, *config.image_hw, device=device) * 2 - 1
        self.device, self.bf16 = device, bf16

    def __call__(self):
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            output = self.model(self.images)
        (output if isinstance(output, torch.Tensor) else output.loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class MatrixProducts(TorchDispatchMode):
    """Counts the mm, addmm, bmm and baddbmm that run below it, by their operands' shapes, strides and types."""

    def __init__(self):
        super().__init__()
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            operands = args[1:3] if "add" in name else args[:2]
            self.seen[tuple((tuple(x.shape), x.stride(), x.dtype) for x in operands)] += 1
        return function(*args, **(kwargs or {}))

    def replay(self, device: torch.device) -> Callable[[], None]:
        """A call making the same products as often, on tensors of its own, with nothing between them."""
        work = []
        for operands, count in self.seen.items():
            a, b = (torch.empty_strided(*x[:2], dtype=x[2], device=device).normal_() for x in operands)
            work += [(a, b, a @ b)] * count

        def products():
            for a, b, out in work:
                torch.matmul(a, b, out=out)

        return products


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: processor time with one CPU thread, so that a busy machine counts less; else the clock's."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def peak_memory(name: str, config: LDAEConfig, batch_size: int, device: str, bf16: bool, threads: int) -> int:
    """Bytes that two steps take at their peak, run in a process of its own: of the CUDA allocator, or the growth of the
    process's resident memory after its imports (weights, gradients, optimizer states and activations all count)."""
    import resource

    torch.set_num_threads(threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step = Step(name, config, batch_size, torch.device(device), bf16)
    step()
    step()
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def wants_bf16(mixed_precision: str, device: torch.device) -> tuple[bool, str]:
    """Whether to autocast to bf16, and a sentence on why."""
    has = has_bf16(device)
    if mixed_precision == "bf16" and not has:
        print(f"warning: this {device.type} has no bf16 instructions: a step may take minutes", file=sys.stderr)
    bf16 = has if mixed_precision == "auto" else mixed_precision == "bf16"
    why = "" if has else f"; this {device.type} has no bf16 instructions"
    return bf16, ("bf16 autocast" if bf16 else "float32") + why


def measure(arguments: StepArguments) -> dict:
    """The whole run, as a result to save."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    bf16, precision = wants_bf16(arguments.mixed_precision, device)
    config = LDAEConfig.from_size(
        arguments.model_size, image_size=arguments.image_size, patch_size=arguments.patch_size, latent_dim=16
    )
    common = (config, arguments.batch_size)
    names = [*OURS, *BASELINES]
    bar = tqdm(total=len(names) + (len(names) + 1) * (arguments.warmup + arguments.steps), unit="step")

    memory = {}
    spawn = multiprocessing.get_context("spawn")
    for name in names:
        bar.set_description(f"memory of {name}")
        with spawn.Pool(1) as pool:
            memory[name] = pool.apply(peak_memory, (name, *common, arguments.device, bf16, arguments.threads))
        bar.update()

    steps: dict[str, Callable] = {name: Step(name, *common, device, bf16) for name in names}
    parameters = {name: sum(p.numel() for p in step.model.parameters()) for name, step in steps.items()}
    with MatrixProducts() as products:
        steps["l-DAE, eager"]()  # sdpa makes the same products inside its kernel
    steps[FLOOR] = products.replay(device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(arguments.warmup + arguments.steps):
        for name, times in seconds.items():
            bar.set_description(name)
            duration = timed(steps[name], device)
            if i >= arguments.warmup:
                times.append(duration)
            bar.update()
    bar.close()

    return {
        "benchmark": "step",
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "contenders": {
            name: {
                "seconds": times,
                "median": statistics.median(times),
                "quartiles": statistics.quantiles(times, n=4)[::2] if len(times) > 1 else times * 2,
                "peak_memory": memory.get(name),
                "parameters": parameters.get(name),
            }
            for name, times in seconds.items()
        },
    }


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over the rounds of ours / theirs: neighbours in time, so that slow minutes cancel."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table(result: dict) -> str:
    """A result as markdown."""
    arguments, contenders, hardware = result["arguments"], result["contenders"], result["hardware"]
    machine = result["device"] if result["device"] != "cpu" else hardware["processor"]
    lines = [
        f"{machine}, {arguments['threads']} CPU thread(s), {result['precision']}; size {arguments['model_size']}, "
        f"{arguments['image_size']} px, patch {arguments['patch_size']}, batch {arguments['batch_size']}, "
        f"{arguments['steps']} steps each; torch {result['versions']['torch']}, "
        f"transformers {result['versions']['transformers']}, diffusers {result['versions']['diffusers']}; "
        f"{result['date'][:10]}.",
        "",
        "| | parameters | ms a step (quartiles) | peak MiB | " + " | ".join(f"{name} / it" for name in OURS) + " |",
        "|---|" + "---:|" * (3 + len(OURS)),
    ]
    for name, it in contenders.items():
        low, high = (f"{1000 * x:.0f}" for x in it["quartiles"])
        cells = [
            name,
            f"{it['parameters'] / 1e6:.1f} M" if it["parameters"] else "",
            f"{1000 * it['median']:.0f} ({low} to {high})",
            f"{it['peak_memory'] / 2**20:.0f}" if it["peak_memory"] else "",
            *(f"{ratio(contenders[ours]['seconds'], it['seconds']):.2f}" for ours in OURS),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(StepArguments, measure, table, "step")
