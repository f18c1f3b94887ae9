"""What a run would be and cost: `train_ldae.py --dry_run` takes its first steps in a folder that is thrown away."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from ldae.names import duration, short_name
from ldae.optimization import ENDLESS
from ldae.training import tokenizer_stage
from ldae.training.run import Run

WARMUP, STEPS = 2, 8
TrainStep = Callable[[Run, Iterable[dict[str, Any]]], None]


def rehearse(model_args, data_args, train_args, train_step: TrainStep) -> str:
    """Fits the tokenizer, takes a few steps, and leaves nothing.

    Args:
        model_args, data_args, train_args: as `ldae.options.parse_arguments` gives them.
        train_step: makes one optimizer step of a run on its micro-batches.

    Returns:
        Lines that say what would be trained on what, with how much memory, and how long it would take without probes.

    Raises:
        ValueError: for a model whose tokenizer is trained first; and as `Run` does.
    """
    if tokenizer_stage.stage(model_args, data_args, train_args) is not None:
        raise ValueError("--dry_run trains no tokenizer: give a trained one with --tokenizer FOLDER")
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        trial = replace(train_args, output_dir=folder, resume=False, report_to=["none"], knn_steps=0, probe=False)
        with Run(model_args, data_args, trial) as run:
            run.model.train()
            times = []
            for batches in islice(run.batches(), WARMUP + STEPS):
                train_step(run, batches)
                run.recorder.flush()
                if run.loader.death is not None:
                    raise ChildProcessError(f"{run.loader.death} Fewer --num_workers need less memory.")
                times.append(time.perf_counter())
            run.recorder.close()
            run.accelerator.end_training()
            waits = [after - before for before, after in zip(times[WARMUP - 1 :], times[WARMUP:], strict=False)]
            seconds = statistics.median(waits) if waits else times[-1] - began
            return _describe(run, times[0] - began, seconds, len(waits))


def _describe(run: Run, preparation: float, seconds: float, measured: int) -> str:
    config, model = run.unwrapped.config, run.unwrapped
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.ldae)]
    (height, width), (p, q), (rows, columns) = config.image_hw, config.patch_hw, config.grid_hw
    tokens = rows * columns
    kept = "" if config.keep_ratio == 1 else f", of which the encoder sees {config.keep_ratio:.0%}"
    number = "a stream" if run.images.streaming else f"{len(run.images):,} images"
    facts = {
        "model": f"l-DAE {run.model_args.model_size}: {config.num_hidden_layers} + {config.decoder_num_hidden_layers} blocks "
        f"of width {config.hidden_size}, {millions[0]:.1f} M parameters, {millions[1]:.1f} M of them the encoder's",
        "images": f"{short_name(run.data_args.data)}: {number} at {height} x {width} px, {tokens} patches of {p} x {q}{kept}",
        "step": f"{run.images_per_step} images; learning rate up to {run.peak_learning_rate:.1e}",
        "memory": _memory(run.accelerator.device),
        "speed": f"{run.images_per_step / seconds:,.0f} images/s, {seconds:.3g} s a step (median of {max(measured, 1)})",
        "time": _length(run, preparation, seconds),
    }
    return "\n".join(f"{name + ':':<9}{fact}" for name, fact in facts.items())


def _length(run: Run, preparation: float, seconds: float) -> str:
    """The time before a run's first step and that of its steps, their number and epochs: by max_steps, or by the clock."""
    length = run.length
    total = length.max_steps * seconds if length.max_steps < ENDLESS else float("inf")
    if length.max_minutes is not None:
        total = min(total, 60 * length.max_minutes)
    steps = min(length.max_steps, max(1, round(total / seconds)))
    epochs = "" if run.images.streaming else f", {steps * run.images_per_step / len(run.images):.3g} epochs"
    clock = " of the processor" if length.max_minutes is not None and run.train_args.clock == "processor" else ""
    number = f"{steps:,} step{'s' * (steps != 1)}"
    return f"{duration(total)}{clock}, after {duration(preparation)} until the first step: {number}{epochs}"


def _memory(device: torch.device) -> str:
    process = psutil.Process().memory_info().rss / 2**30
    if device.type != "cuda":
        return f"{process:.1f} GiB"
    used, whole = torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.mem_get_info(device)[1] / 2**30
    return f"{used:.1f} GiB of the GPU's {whole:.0f}, and {process:.1f} GiB of the host's"
