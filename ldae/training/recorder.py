"""What a run reports of its steps: losses.jsonl, the progress bar and the trackers."""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ldae.optimization import ENDLESS, Length
from ldae.report.results import open_losses
from ldae.training.checkpoints import Checkpoints
from ldae.training.clock import Clock

LEAST_SCALE = 2.0**-24  # of fp16's loss: at it, the gradient itself is not finite


@dataclass
class Step:
    """A step whose figures may still be on their way from the device."""

    number: int
    learning_rate: float
    names: list[list[str]]  # of the images of each micro-batch
    # on the CPU: the loss of each micro-batch, the gradient norm, the run's seconds, whether to end
    figures: torch.Tensor
    arrived: torch.cuda.Event | None


class Recorder:
    """Reports every step's loss, and stops the run at a loss or gradient that is not finite.

    With fp16, a gradient may be too large for the loss scale. Such a step has no "grad_norm", and the run goes on.

    On CUDA, a step's figures are read when the next step has been queued, so that the GPU never waits for the host; elsewhere
    they are read at once. `flush` reads what is left and must be called before anything is made of the weights.

    Args:
        state: the run's state, in which "loss" (a running mean) and "seconds" are kept up to the last step that was read.
        losses: path of losses.jsonl.
        clock: of the run, which starts with its first step.
        images_per_step: of all processes.

    Attributes:
        interrupted: whether a signal or a worker's death had reached one of the processes when they made the last step that
            was read.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        state: dict[str, Any],
        length: Length,
        losses: Path,
        checkpoints: Checkpoints,
        clock: Clock,
        images_per_step: int,
        logging_steps: int,
    ):
        self.accelerator, self.state, self.length, self.checkpoints = accelerator, state, length, checkpoints
        self.images_per_step, self.logging_steps = images_per_step, logging_steps
        self.losses = open_losses(losses, state["step"]) if accelerator.is_main_process else None
        hidden = not accelerator.is_main_process
        total = None if length.max_steps >= ENDLESS else length.max_steps  # by the clock it is known after a step
        self.bar = tqdm(initial=state["step"], total=total, desc="training", disable=hidden)
        self.waiting: deque[Step] = deque()
        self.interrupted = False
        self.lag = 1 if accelerator.device.type == "cuda" else 0
        self.first_step, self.first_second = state["step"], state["seconds"]
        self.clock = clock

    def record(
        self,
        losses: Sequence[torch.Tensor],
        norm: torch.Tensor,
        learning_rate: float,
        names: list[list[str]],
        interrupted: bool = False,
    ):
        """Takes the figures of the step that was just made, the `state["step"]`-th.

        Args:
            losses: this process's loss of each micro-batch, scalars on the device.
            norm: of the gradient, a scalar on the device.
            names: of this process's images, for each micro-batch.
            interrupted: whether a signal or a worker's death has reached this process, which all learn when they read the step.

        Raises:
            FloatingPointError: on all processes, if the loss or gradient of a step that is now read is not finite.
        """
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2 shards it
        seconds = torch.full((), self.clock.seconds, device=norm.device)  # torch.tensor would wait for the GPU
        signal = torch.full_like(seconds, interrupted)
        figures = torch.stack([*(loss.float() for loss in losses), norm, seconds, signal])
        figures = self.accelerator.reduce(figures, "mean")
        arrived = None
        if figures.is_cuda:
            figures, arrived = figures.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        self.waiting.append(Step(self.state["step"], learning_rate, names, figures.cpu(), arrived))
        while len(self.waiting) > self.lag:
            self._report(self.waiting.popleft())

    def flush(self):
        """Reads the steps whose figures have not been read; raises as `record` does."""
        while self.waiting:
            self._report(self.waiting.popleft())

    def close(self):
        """Reads what is left and closes the progress bar and the file."""
        self.flush()
        self.bar.close()
        if self.losses is not None:
            self.losses.close()

    def _falls(self) -> bool:
        """Whether fp16's loss scale can fall, so that a gradient that is not finite need not be so again."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > LEAST_SCALE

    def _report(self, step: Step):
        if step.arrived is not None:
            step.arrived.synchronize()
        *losses, norm, seconds, interrupted = step.figures.unbind()
        self.interrupted = self.interrupted or interrupted.item() > 0
        mean = torch.zeros(())
        for loss in losses:
            mean += loss / len(losses)
        overflowed = not torch.isfinite(norm)
        if not torch.isfinite(mean) or (overflowed and not self._falls()):
            what = f"gradient's norm is {norm.item()}" if torch.isfinite(mean) else f"loss is {mean.item()}"
            own = [
                name
                for loss, names in zip(losses, step.names, strict=True)
                if torch.isfinite(mean) or not torch.isfinite(loss)
                for name in names
            ]
            self.checkpoints.stop(step.number, what, gather_object(own))
        state, loss = self.state, mean.item()
        state["seconds"] = seconds.item()
        # less at first, so that the mean of a short run does not tell how it began
        kept = min(0.98, step.number / (10 + step.number))
        state["loss"] = loss if state["loss"] is None else kept * state["loss"] + (1 - kept) * loss
        images = (step.number - self.first_step) * self.images_per_step
        speed = images / max(state["seconds"] - self.first_second, 1e-9)
        entry = {
            "loss": loss, "learning_rate": step.learning_rate, "images_per_second": speed,
            "grad_norm": None if overflowed else norm.item(),
        }  # fmt: skip
        if self.losses is not None:
            self.losses.write(json.dumps({"step": step.number, **entry}) + "\n")
        self.bar.total = max(step.number, round(step.number / self.length.progress(step.number, state["seconds"])))
        rate = f"{step.learning_rate:.1e}"
        self.bar.set_postfix(loss=f"{state['loss']:.4f}", lr=rate, images_s=f"{speed:.0f}", refresh=False)
        self.bar.update()
        if step.number % self.logging_steps == 0:
            self.accelerator.log(entry, step.number)
