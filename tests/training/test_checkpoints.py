"""Checkpoints: which of them count, and those of models that FSDP2 shards, on two CPU processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from ldae import files
from ldae.training.checkpoints import Checkpoints, validate_unchanged

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
    root = str(Path(__file__).parents[2])
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


class Killed(BaseException):
    """Stands for a kill: nothing catches it, and the tests let nothing clean up after it."""


@pytest.fixture
def save(tmp_path):
    """save(step, value=0, keep=2): a checkpoint of a tiny model that holds a value, written by a process of one."""
    accelerator = Accelerator(cpu=True)

    def save(step: int, value: float = 0.0, keep: int = 2) -> Path:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, value)
        optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.0))
        return Checkpoints(tmp_path, keep).save(accelerator, model, optimizer, None, {"step": step})

    return save


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(save, tmp_path):
    assert Checkpoints(tmp_path / "none").last() is None
    for step in (5, 10, 100):
        save(step)
    assert names(tmp_path) == ["checkpoint-00000010", "checkpoint-00000100"]
    assert Checkpoints(tmp_path).last().name == "checkpoint-00000100"


def test_a_checkpoint_that_is_there_is_not_written_again(save, tmp_path):
    """The end of a finished run that is resumed: were it replaced, a kill could leave neither."""
    before = {path: path.stat().st_mtime_ns for path in save(5, 1.0).iterdir()}
    again = save(5, 2.0)
    assert {path: path.stat().st_mtime_ns for path in again.iterdir()} == before
    assert load_file(again / "model.safetensors")["weight"].item() == 1


def test_what_a_kill_left_does_not_count_and_is_removed(save, tmp_path, monkeypatch):
    whole = save(5)

    def killed(path, *args, **kwargs):
        raise Killed

    with monkeypatch.context() as patches:  # while the oldest is removed
        patches.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            save(10, keep=1)
    assert names(tmp_path) == [f".{whole.name}.removed", "checkpoint-00000010"]
    assert Checkpoints(tmp_path).last().name == "checkpoint-00000010"
    (tmp_path / ".checkpoint-00000013.partial").mkdir()  # while one was written
    (tmp_path / "checkpoint-mine").mkdir()
    assert Checkpoints(tmp_path).last().name == "checkpoint-00000010"
    save(20, 3.0)
    assert names(tmp_path) == ["checkpoint-00000010", "checkpoint-00000020", "checkpoint-mine"]
    assert load_file(Checkpoints(tmp_path).last() / "model.safetensors")["weight"].item() == 3


def test_a_kill_in_the_middle_of_writing_leaves_the_one_before(save, tmp_path, monkeypatch):
    save(5)

    def killed(self, *args, **kwargs):
        raise Killed

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(Killed):
        save(10)
    assert Checkpoints(tmp_path).last().name == "checkpoint-00000005"


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "lost": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "digests.sha256"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(save, tmp_path, name, damage):
    save(5, keep=3)
    newest, said = save(10, keep=3), []
    DAMAGE[damage](newest / name)
    assert Checkpoints(tmp_path).last(said.append).name == "checkpoint-00000005"
    (line,) = said
    assert line.startswith(f"{newest} is damaged (")
    assert name in line or (name, damage) == ("digests.sha256", "flipped")  # in which a name is now another


def test_a_file_of_another_checkpoint_is_seen(save, tmp_path):
    shutil.copy(save(5, 1.0) / "model.safetensors", save(10, 2.0) / "model.safetensors")
    assert Checkpoints(tmp_path).last().name == "checkpoint-00000005"


def test_damaged_checkpoints_make_room_for_whole_ones(save, tmp_path):
    """They are not counted among those that are kept, and are not taken for the one that is to be written."""
    for step in (5, 10, 15):
        save(step, keep=3)
    for step in (10, 15):
        flip(tmp_path / f"checkpoint-{step:08d}/model.safetensors")
    save(10, 3.0, keep=2)
    assert names(tmp_path) == ["checkpoint-00000005", "checkpoint-00000010"]
    assert load_file(Checkpoints(tmp_path).last() / "model.safetensors")["weight"].item() == 3


def test_options_that_both_runs_have_must_be_equal():
    validate_unchanged({"seed": 0, "old": 1}, {"seed": 0, "new": 2})
    with pytest.raises(ValueError, match="--resume must go on with the run's own options, but seed was 0, is 1"):
        validate_unchanged({"seed": 0, "crop": "center"}, {"seed": 1, "crop": "center"})
