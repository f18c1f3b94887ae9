"""Checkpoints of a run: model, averaged weights and optimizer as safetensors, the rest as JSON, and the digests of these files.

A checkpoint is written whole or not at all, and one that was damaged later is not used. The order of the images, their crops
and the noise depend on the seed and the step alone, so the state of no random generator is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict as dcp

from ldae.files import atomic_write, damage, read_json, remove

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

FULL = dcp.StateDictOptions(full_state_dict=True)  # whole tensors, gathered from shards, on every process
SAVED = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # the same, on the first process's CPU only


@contextmanager
def averaged_weights(model: torch.nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """A context in which the model holds its averaged weights; without `ema` it keeps its own."""
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


def full_state(
    model: torch.nn.Module, ema: EMAModel | None = None, options: dcp.StateDictOptions = SAVED
) -> dict[str, torch.Tensor]:
    """The model's weights and buffers, gathered from all processes.

    Args:
        ema: if given, the averaged weights take the place of the model's own.
        options: say on which processes and devices the tensors are: `FULL` or `SAVED`.
    """
    with averaged_weights(model, ema):
        # clones: the gathered tensors may be the model's own
        return {name: value.clone() for name, value in dcp.get_model_state_dict(model, options=options).items()}


class Checkpoints:
    """The checkpoints in a folder: `checkpoint-00000500` and so on, the newest `keep` of them."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder), keep

    def last(self, report: Callable[[str], object] = lambda line: None) -> Path | None:
        """The newest whole checkpoint, or None.

        Args:
            report: is given a line for each newer one, which says what is damaged.
        """
        for checkpoint in reversed(self.found()):
            if (reason := damage(checkpoint)) is None:
                return checkpoint
            report(f"{checkpoint} is damaged ({reason}): it is not used.")
        return None

    def found(self) -> list[Path]:
        """All checkpoints, damaged ones too, the oldest first."""
        return sorted(path for path in self.folder.glob("checkpoint-????????") if path.name[-8:].isdecimal())

    def stop(self, step: int, what: str, names: list[str]):
        """Ends a run whose loss or gradient is not finite.

        Args:
            step: the step of that loss or gradient.
            what: which it is, such as "loss is nan".
            names: of the images of its batch.

        Raises:
            FloatingPointError: naming the step, its images and the checkpoint to go on from.
        """
        last = self.last()
        good = (
            f"The last good checkpoint, {last}, is whole; --resume goes on from it with the same options."
            if last
            else "There is no checkpoint yet."
        )
        raise FloatingPointError(
            f"the {what} at step {step}, on a batch of {', '.join(names)}. {good} "
            "A new run with a lower --base_learning_rate or --max_grad_norm often helps."
        )

    def save(self, accelerator: Accelerator, model, optimizer, ema: EMAModel | None, state: dict[str, Any]) -> Path:
        """Writes the checkpoint of a step, unless it is there, and removes the oldest and damaged newer ones.

        Args:
            state: what else the run needs, in JSON's types: at least "step". The checkpoint's also has "averaged_steps" and, of
                fp16, "loss_scale".
        """
        state = {**state, "averaged_steps": None if ema is None else ema.optimization_step}
        if optimizer.scaler is not None:
            state["loss_scale"] = optimizer.scaler.state_dict()
        files = {"model": full_state(model)}
        if ema is not None:
            files["ema"] = full_state(model, ema)
        moments = dcp.get_optimizer_state_dict(model, optimizer.optimizer, options=SAVED).get("state", {})
        files["optimizer"] = {f"{name}/{key}": v.clone() for name, of in moments.items() for key, v in of.items()}
        final = self.folder / f"checkpoint-{state['step']:08d}"
        if accelerator.is_main_process:
            for left in self.folder.glob(".checkpoint-*"):  # by a process that was killed
                remove(left)
            if not final.exists() or damage(final) is not None:
                remove(final)
                with atomic_write(final, sealed=True) as partial:
                    partial.mkdir()
                    for name, tensors in files.items():
                        save_file(tensors, partial / f"{name}.safetensors")
                    (partial / "state.json").write_text(json.dumps(state, indent=2, allow_nan=False))
            older = [path for path in self.found() if path <= final]
            # a newer one is damaged, or the run would have gone on from it
            for old in {*self.found()}.difference(older[-self.keep :]):
                remove(old)
        accelerator.wait_for_everyone()
        return final

    @staticmethod
    def load(checkpoint: Path, model, optimizer, ema: EMAModel | None):
        """Puts a checkpoint's tensors back into the model, the optimizer with its loss scale, and the averaged weights."""
        saved = read_state(checkpoint)
        if ema is not None:
            dcp.set_model_state_dict(model, load_file(checkpoint / "ema.safetensors"), options=FULL)
            ema.shadow_params = [parameter.detach().clone() for parameter in model.parameters()]
            ema.optimization_step = saved["averaged_steps"]
        dcp.set_model_state_dict(model, load_file(checkpoint / "model.safetensors"), options=FULL)
        state = dcp.get_optimizer_state_dict(model, optimizer.optimizer, options=FULL)
        for name, value in load_file(checkpoint / "optimizer.safetensors").items():
            parameter, key = name.split("/")
            state["state"][parameter][key] = value
        dcp.set_optimizer_state_dict(model, optimizer.optimizer, state, options=FULL)
        if optimizer.scaler is not None and "loss_scale" in saved:  # a run may go on in another precision
            optimizer.scaler.load_state_dict(saved["loss_scale"])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state that `Checkpoints.save` was given."""
    return read_json(checkpoint / "state.json")


def validate_unchanged(was: dict[str, Any], given: dict[str, Any]):
    """Validates that a run is resumed with the options that it was started with.

    Args:
        was, given: the run's options and those of the command line. An option that only one of them has is not compared.

    Raises:
        ValueError: naming the options that differ.
    """
    changed = [
        f"{name} was {was[name]!r}, is {value!r}" for name, value in given.items() if was.get(name, value) != value
    ]
    if changed:
        raise ValueError(f"--resume must go on with the run's own options, but {'; '.join(changed)}")
