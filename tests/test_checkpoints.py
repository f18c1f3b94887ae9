"""Checkpoints of models that FSDP2 shards, on two CPU processes; whole models are covered by test_train.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SHARDED = """
import sys
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import fully_shard
from ldae import LDAEConfig, LDAEForPreTraining
from ldae.training.checkpoints import Checkpoints

accelerator = Accelerator(cpu=True)
config = LDAEConfig(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, latent_dim=4)

def build(seed):
    torch.manual_seed(seed)
    model = LDAEForPreTraining(config)
    model.ldae.tokenizer.spectrum.fill_(1)
    if sys.argv[2] == "sharded":
        for layer in [*model.ldae.layers, *model.decoder.layers]:
            fully_shard(layer)
        fully_shard(model)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    return model, optimizer, EMAModel(model.parameters())

def step(model, optimizer, ema):
    torch.manual_seed(1)
    model(torch.rand(4, 3, 16, 16), **model.sample_noise(4)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.step(model.parameters())

checkpoints = Checkpoints(sys.argv[1])
first = build(0)
for _ in range(2):
    step(*first)
folder = checkpoints.save(accelerator, *first, {"step": 2})
second = build(5)
checkpoints.load(folder, *second)
step(*first)
step(*second)
checkpoints.save(accelerator, *first, {"step": 3})
checkpoints.save(accelerator, *second, {"step": 4})
"""


def run(folder: Path, kind: str, processes: int) -> dict[int, dict[str, torch.Tensor]]:
    script = folder.with_suffix(".py")
    script.write_text(SHARDED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    subprocess.run(
        [sys.executable, *launcher, str(script), str(folder), kind], check=True, env=environment, timeout=300
    )
    return {
        step: {
            f"{name}/{key}": value
            for name in ("model", "ema", "optimizer")
            for key, value in load_file(folder / f"checkpoint-{step:08d}/{name}.safetensors").items()
        }
        for step in (3, 4)
    }


@pytest.mark.slow
def test_sharded_models_are_saved_whole_and_loaded_back(tmp_path):
    sharded = run(tmp_path / "sharded", "sharded", 2)
    assert all(torch.equal(sharded[3][name], sharded[4][name]) for name in sharded[3])  # loading changed nothing
    whole = run(tmp_path / "whole", "whole", 1)
    assert sharded[3].keys() == whole[3].keys()
    for name, value in whole[3].items():
        torch.testing.assert_close(sharded[3][name], value, rtol=1e-3, atol=1e-5)
