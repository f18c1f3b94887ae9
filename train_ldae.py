"""Pre-trains l-DAE: `accelerate launch train_ldae.py [recipe.yaml] [--options]`. `--help` lists the options."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ldae.mistakes import run_command
from ldae.optimization import learning_rate
from ldae.options import DataArguments, TrainArguments, parse_arguments
from ldae.training import tokenizer_stage
from ldae.training.folder import validate
from ldae.training.outputs import finish, look
from ldae.training.rehearsal import rehearse
from ldae.training.run import Run


def train_step(run: Run, batches: Iterable[dict[str, Any]]):
    """Makes one optimizer step on its micro-batches, over which the gradients are averaged.

    Raises:
        FloatingPointError: if a loss or gradient is not finite; the last checkpoint is whole. Where fp16's scaled gradient is
            not, the weights and their averages stay as they are, and the scale falls.
    """
    accelerator, model, optimizer, train_args = run.accelerator, run.model, run.optimizer, run.train_args
    rate = learning_rate(run.progress, run.peak_learning_rate, train_args.warmup_ratio)
    for group in optimizer.param_groups:
        group["lr"] = rate
    losses, names = [], []
    for micro_step, batch in enumerate(batches):
        with accelerator.accumulate(model):
            loss = model(**run.inputs(batch, micro_step)).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), train_args.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        names.append(batch["name"])
    if run.ema is not None and not optimizer.step_was_skipped:
        run.ema.step(model.parameters())
    run.advance()
    run.recorder.record(losses, norm, rate, names, run.ends)


def train(
    model_args, data_args: DataArguments, train_args: TrainArguments, model: torch.nn.Module | None = None
) -> Path:
    """Makes one pre-training run and returns its folder.

    Args:
        model_args, data_args, train_args: as `ldae.options.parse_arguments` gives them.
        model: replaces the l-DAE of the options by another pre-training model. It needs `forward(pixel_values, **noise)`, whose
            output has a `loss`, and `sample_noise(batch_size, generator=)`, which returns a dictionary of tensors with one row
            for each image. If its attribute `uses_labels` is true, its forward is also given `labels` (B,).

    Raises:
        FileExistsError, FileNotFoundError, ValueError: before any training, for what cannot work; a `ValueError` also for an
            unreadable image with --on_bad_image error, and for --resume with other options than the run's.
        FloatingPointError: if a loss or gradient is not finite; the last checkpoint is whole.
        SystemExit: with the status 130 or 143, after SIGINT or SIGTERM; the last step is in a checkpoint.
        ChildProcessError: if a worker that reads images died; the last step is in a checkpoint.
    """
    with Run(model_args, data_args, train_args, model) as run:
        look(run)
        run.model.train()
        with run.interruption.postponed():
            for batches in run.batches():
                train_step(run, batches)
                run.end_if_interrupted()
                look(run)
                if run.checkpoint_is_due and run.progress < 1:
                    run.save_checkpoint()
            run.save_checkpoint()
        finish(run)
    return run.output_dir


def pretrain(model_args, data_args: DataArguments, train_args: TrainArguments) -> Path | None:
    """Makes the run that options describe: trains a tokenizer first where the l-DAE needs one, then the l-DAE.

    Returns:
        The run's folder; None with `dry_run`, which makes none.
    """
    validate(train_args)
    if train_args.dry_run:
        plan = rehearse(model_args, data_args, train_args, train_step)
        PartialState().print(plan)
        return None
    if (stage := tokenizer_stage.stage(model_args, data_args, train_args)) is not None:
        folder = train(*stage)
        train_args.tokenizer = str(folder)
    if not train_args.tokenizer_only:
        folder = train(model_args, data_args, train_args)
    PartialState().destroy_process_group()
    return folder


def main(argv: list[str] | None = None) -> Path | None:
    """Runs a command line, as `pretrain` does its options."""
    return pretrain(*parse_arguments(argv))


def command() -> None:
    """The command `ldae-train`."""
    run_command(main)


if __name__ == "__main__":
    command()
