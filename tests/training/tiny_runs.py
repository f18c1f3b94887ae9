"""A tiny run that the tests of training make, what it leaves, and how it is disturbed."""

import json
import os
import signal
import time
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

import train_ldae
from ldae.data.images import ImageDataset
from ldae.training.checkpoints import Checkpoints
from ldae.training.recorder import Recorder

ROOT = Path(__file__).parents[2]
TINY = [
    "--image_size=16", "--patch_size=4", "--hidden_size=32", "--num_hidden_layers=1", "--num_attention_heads=2",
    "--latent_dim=4", "--per_device_batch_size=4", "--max_steps=6", "--checkpointing_steps=2", "--base_learning_rate=0.1",
    "--report_to=none", "--no_probe", "--held_out=0",
]  # fmt: skip
TOKENIZER = ("--tokenizer_type", "patch_ae", "--prediction", "latent", "--tokenizer_epochs", "1")


def train(folder: Path, output: Path, *options: str) -> Path:
    return train_ldae.main(["--data", str(folder), "--output_dir", str(output), *TINY, *options])


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


def same_run(a: Path, b: Path):
    """The two runs' weights, averages, optimizers and losses are equal bit for bit."""
    assert losses(a) == losses(b)
    for name in ("model", "ema", "optimizer"):
        x, y = (load_file(Checkpoints(run / "checkpoints").last() / f"{name}.safetensors") for run in (a, b))
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x)


def stop_at(monkeypatch, step: int):
    """Makes the next run end like a crash once `step` steps are done, before it can save anything more."""
    steps = iter(range(1, 1000))
    real = EMAModel.step

    def ema_step(self, parameters):
        if next(steps) > step:
            raise KeyboardInterrupt
        real(self, parameters)

    monkeypatch.setattr(EMAModel, "step", ema_step)


def at_step(monkeypatch, step: int, do):
    """Makes the next run do something when the weights of a step, counted from 1, have been updated."""
    steps, real = iter(range(1, 1000)), EMAModel.step

    def ema_step(self, parameters):
        real(self, parameters)
        if next(steps) == step:
            do()

    monkeypatch.setattr(EMAModel, "step", ema_step)


def let_a_worker_die(monkeypatch):
    """Makes a worker of the next run die over a batch for which the run waits."""
    real, asked = ImageDataset.__getitems__, iter(range(1, 1000))

    def getitems(self, keys):
        if get_worker_info() is not None and next(asked) == 3:  # each worker counts for itself
            time.sleep(1)  # in which the steps before are made
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, keys)

    monkeypatch.setattr(ImageDataset, "__getitems__", getitems)


def read_later(monkeypatch):
    """Makes the next runs read the figures of a step when the following step has been made, as on a GPU."""
    real = Recorder.__init__

    def init(self, *args):
        real(self, *args)
        self.lag = 1

    monkeypatch.setattr(Recorder, "__init__", init)
