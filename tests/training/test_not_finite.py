"""Losses and gradients that are not finite, fp16's among them, and figures that arrive a step later."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import losses, read_later, same_run, train

from ldae import LDAEForPreTraining
from ldae.training import run as run_module
from ldae.training.checkpoints import Checkpoints
from ldae.training.recorder import Recorder
from ldae.training.run import Run


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


def not_finite_at(monkeypatch, call: int, what: str = "loss"):
    """Makes the loss, or only its gradient, of the model's `call`-th forward in training, counted from 1, not finite."""
    real, calls = LDAEForPreTraining.forward, iter(range(1, 100))

    def forward(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        if self.training and next(calls) == call:
            output.loss = output.loss * float("nan") if what == "loss" else NoGradient.apply(output.loss)
        return output

    monkeypatch.setattr(LDAEForPreTraining, "forward", forward)


@pytest.mark.parametrize("later", [False, True], ids=["at-once", "a-step-later"])
@pytest.mark.parametrize("step", [2, 5, 6])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(folder, tmp_path, monkeypatch, what, step, later):
    """At the step of a checkpoint, which is not written then, between two, and at the last step."""
    not_finite_at(monkeypatch, step, what)
    if later:
        read_later(monkeypatch)
    last = (step - 1) // 2 * 2
    good = rf"checkpoint-0000000{last}.*whole" if last else "There is no checkpoint yet"
    with pytest.raises(FloatingPointError, match=rf"the {what}.* nan at step {step}, on a batch of .*\.png.*{good}"):
        train(folder, tmp_path / "run")
    checkpoints = sorted((tmp_path / "run/checkpoints").glob("*/*.safetensors"))
    assert len(checkpoints) == 3 * (last // 2)
    for path in checkpoints:
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    assert len(losses(tmp_path / "run")) == step - 1
    assert not (tmp_path / "run/config.json").exists()


@pytest.fixture
def fp16(monkeypatch):
    """fp16(scale): from now on, runs have accelerate's gradient scaler, as in fp16 on a GPU, with this scale at the beginning."""
    real, first = run_module._accelerator, []

    def accelerator(*args):
        made = real(*args)
        made.scaler, made.native_amp = torch.amp.GradScaler("cpu", init_scale=first[-1]), True
        made.state._mixed_precision = "fp16"
        return made

    monkeypatch.setattr(run_module, "_accelerator", accelerator)
    return first.append


def test_a_step_whose_scaled_gradient_overflows_changes_nothing(folder, tmp_path, monkeypatch, fp16):
    """Nor does it when the run is resumed in the middle of such steps: the scale falls on from where it was."""
    fp16(2.0**36)
    options = ("--max_steps", "20", "--ema_decay", "0.5")
    train(folder, tmp_path / "whole", *options)
    entries = [json.loads(line) for line in (tmp_path / "whole/losses.jsonl").read_text().splitlines()]
    assert "NaN" not in (tmp_path / "whole/losses.jsonl").read_text()
    skipped = [entry["grad_norm"] is None for entry in entries]
    number = sum(skipped)
    assert skipped == [True] * number + [False] * (20 - number)
    assert 3 < number < 18
    state = json.loads((Checkpoints(tmp_path / "whole/checkpoints").last() / "state.json").read_text())
    assert (state["averaged_steps"], state["loss_scale"]["scale"]) == (20 - number, 2.0 ** (36 - number))
    with monkeypatch.context() as context:
        calls, real = iter(range(1, 1000)), Run.advance
        context.setattr(
            Run, "advance", lambda run: (real(run), next(calls) == number - 1 and os.kill(os.getpid(), signal.SIGINT))
        )
        with pytest.raises(SystemExit):
            train(folder, tmp_path / "broken", *options)
    train(folder, tmp_path / "broken", *options, "--resume")
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_gradient_that_no_scale_makes_finite_stops_the_run(folder, tmp_path, monkeypatch, fp16):
    fp16(2.0**-22)
    monkeypatch.setattr(
        LDAEForPreTraining, "forward", lambda *a, real=LDAEForPreTraining.forward, **k: poisoned(real(*a, **k))
    )
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan at step 2"):
        train(folder, tmp_path / "run")


def poisoned(output):
    output.loss = NoGradient.apply(output.loss)
    return output


def test_a_loss_that_is_not_finite_names_the_images_of_its_micro_batch(folder, tmp_path, monkeypatch):
    not_finite_at(monkeypatch, 5)
    with pytest.raises(FloatingPointError, match=r"is nan at step 3, on a batch of") as error:
        train(folder, tmp_path / "run", "--gradient_accumulation_steps", "2")
    assert str(error.value).count(".png") == 4


def test_figures_that_are_read_a_step_later_are_the_same(folder, tmp_path, monkeypatch):
    train(folder, tmp_path / "at-once", "--image_steps", "3")
    read_later(monkeypatch)
    waiting, real = [], Recorder._report

    def report(self, step):
        waiting.append(self.state["step"] - step.number)
        real(self, step)

    monkeypatch.setattr(Recorder, "_report", report)
    train(folder, tmp_path / "later", "--image_steps", "3")
    assert waiting == [1, 0, 0, 0, 1, 0]  # images and checkpoints are made of weights whose loss has been read
    same_run(tmp_path / "at-once", tmp_path / "later")
    a, b = (json.loads((tmp_path / name / "results/train.json").read_text()) for name in ("at-once", "later"))
    assert (a["loss"], a["steps"]) == (b["loss"], b["steps"])
