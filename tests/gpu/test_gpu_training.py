"""Runs of train_ldae.py on a GPU: precisions, resuming, compiled blocks and sharding."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_ldae
from ldae.training.checkpoints import Checkpoints

ROOT = Path(__file__).parent.parent.parent
TINY = (
    "--data photos --image_size 16 --patch_size 4 --hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --latent_dim 4",
    "--per_device_batch_size 8 --max_steps 6 --checkpointing_steps 2 --report_to none --no_probe --knn_steps 0",
    "--no_torch_compile",
)
OPTIONS = " ".join(TINY).split()
PRECISIONS = ["no", "bf16", "fp16"]
if os.environ.get("LDAE_TEST_DEVICE") == "cpu":
    PRECISIONS.remove("fp16")  # accelerate has none on a CPU


@pytest.fixture(autouse=True)
def fresh_accelerate(device):
    AcceleratorState._reset_state(True)


def train(output: Path, *options: str) -> list[dict]:
    """The losses of a run's steps."""
    train_ldae.main([*OPTIONS, "--output_dir", str(output), *options])
    return losses(output)


def losses(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]


def same_run(a: Path, b: Path):
    """The two runs' losses, weights, averages and optimizers are equal bit for bit."""
    assert [entry["loss"] for entry in losses(a)] == [entry["loss"] for entry in losses(b)]
    for name in ("model", "ema", "optimizer"):
        x, y = (load_file(Checkpoints(run / "checkpoints").last() / f"{name}.safetensors") for run in (a, b))
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x), name


def stop_at(monkeypatch, step: int):
    """Makes the next run end like a crash at the beginning of a step."""
    steps = iter(range(1000))
    real = train_ldae.train_step

    def train_step(*args):
        if next(steps) == step:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(train_ldae, "train_step", train_step)


@pytest.mark.usefixtures("few_photos")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, monkeypatch, deterministic, precision):
    """In fp16 the loss scale starts too high, so that it falls from step to step and has to be taken up again."""
    real = torch.amp.GradScaler.__init__
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", lambda self, device: real(self, device, init_scale=2.0**60))
    options = ("--mixed_precision", precision)
    train(tmp_path / "whole", *options)
    with monkeypatch.context() as context:
        stop_at(context, 5)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken", *options)
    assert Checkpoints(tmp_path / "broken/checkpoints").last().name == "checkpoint-00000004"
    AcceleratorState._reset_state(True)
    train(tmp_path / "broken", *options, "--resume")
    same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_mixed_precision_learns_as_float32_does(tmp_path, precision):
    options = ("--max_steps", "40", "--base_learning_rate", "0.1", "--checkpointing_steps", "0")
    full = train(tmp_path / "full", *options, "--mixed_precision", "no")
    AcceleratorState._reset_state(True)
    mixed = train(tmp_path / "mixed", *options, "--mixed_precision", precision)
    full, mixed = ([entry["loss"] for entry in run] for run in (full, mixed))
    learned = [max(run) - run[-1] for run in (full, mixed)]
    assert learned[0] > 0.2 * full[0]
    assert learned[1] == pytest.approx(learned[0], rel=0.1)


@pytest.mark.compile
def test_compiled_run_loses_what_an_eager_one_does(tmp_path):
    options = ("--mixed_precision", "no")
    eager = train(tmp_path / "eager", *options)
    AcceleratorState._reset_state(True)
    compiled = train(tmp_path / "compiled", *options, "--torch_compile")
    assert [entry["loss"] for entry in compiled] == pytest.approx([entry["loss"] for entry in eager], rel=1e-3)


if os.environ.get("LDAE_TEST_DEVICE") != "cpu":  # accelerate does not shard on a CPU

    def test_run_sharded_by_accelerate_loses_what_a_whole_one_does(tmp_path):
        whole = train(tmp_path / "whole", "--mixed_precision", "no")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "LDAELayer", "FSDP_RESHARD_AFTER_FORWARD": "true",
        }  # fmt: skip
        command = [
            sys.executable,
            "train_ldae.py",
            *OPTIONS,
            "--mixed_precision",
            "no",
            "--output_dir",
            str(tmp_path / "sharded"),
        ]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        sharded = losses(tmp_path / "sharded")
        assert [entry["loss"] for entry in sharded] == pytest.approx([entry["loss"] for entry in whole], rel=1e-4)
