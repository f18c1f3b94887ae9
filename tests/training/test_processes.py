"""Two processes make the run that one makes, and go on when they are killed."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny_runs import ROOT, TINY, TOKENIZER, losses, same_run, train

from ldae.options import parse_arguments
from ldae.seeds import mix_seed
from ldae.training.checkpoints import Checkpoints
from ldae.training.run import Run


def launch(folder: Path, output: Path, *options: str, script: Path = ROOT / "train_ldae.py") -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        str(script),
        "--data",
        str(folder),
        "--output_dir",
        str(output),
        *TINY,
        *options,
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_train_a_tokenizer_then_the_ldae_and_probe_as_one(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data/train")
    shutil.copytree(folder, tmp_path / "data/val")
    options = ("--probe", "--knn_steps", "3", *TOKENIZER)
    two = launch(tmp_path / "data", tmp_path / "two", *options)
    assert two.wait(300) == 0, two.stderr.read()
    train(tmp_path / "data", tmp_path / "one", *options, "--per_device_batch_size", "8")
    a, b = (json.loads((tmp_path / name / "results/probe-data.json").read_text()) for name in ("two", "one"))
    assert a["data"] == b["data"]
    for part in ("protocols", "floor"):
        for name in ("knn", "linear-fast"):  # an image of 22 may change sides by rounding
            assert a[part][name]["accuracy"] == pytest.approx(b[part][name]["accuracy"], abs=100 / 22 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_two_processes_killed_and_resumed(folder, files, tmp_path, streaming):
    """Two processes are one with twice the batch, to rounding; killed and resumed they are themselves, bit for bit."""
    options = ("--max_steps", "40", "--checkpointing_steps", "2", *streaming)
    data = files if streaming else folder
    whole = launch(data, tmp_path / "whole", *options)
    assert whole.wait(300) == 0, whole.stderr.read()
    broken = launch(data, tmp_path / "broken", *options)
    while not (tmp_path / "broken/checkpoints/checkpoint-00000002").exists():
        assert broken.poll() is None, broken.stderr.read()
        time.sleep(0.01)
    processes = [
        broken,
        *psutil.Process(broken.pid).children(recursive=True),
    ]  # workers have process groups of their own
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    assert Checkpoints(tmp_path / "broken/checkpoints").last().name < "checkpoint-00000040"  # killed before its end
    resumed = launch(data, tmp_path / "broken", *options, "--resume")
    assert resumed.wait(300) == 0, resumed.stderr.read()
    same_run(tmp_path / "whole", tmp_path / "broken")
    train(data, tmp_path / "one", *options, "--per_device_batch_size", "8")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.slow
def test_a_worker_that_dies_ends_both_processes_with_a_checkpoint(files, tmp_path):
    """The other process is in the same step, and waits for the gradient of the one that has no images for it."""
    options = ["--streaming", "--gradient_accumulation_steps", "2", "--num_workers", "2"]
    options += ["--max_steps", "30", "--checkpointing_steps", "0"]
    script = tmp_path / "dying.py"
    script.write_text(
        "import os, train_ldae\n"
        "from pytest import MonkeyPatch\n"
        "from tiny_runs import let_a_worker_die\n"
        "if os.environ['RANK'] == '1':\n"
        "    let_a_worker_die(MonkeyPatch())\n"
        "train_ldae.command()\n"
    )
    broken = launch(files, tmp_path / "broken", *options, script=script)
    _, said = broken.communicate(timeout=300)
    assert broken.returncode != 0
    last = Checkpoints(tmp_path / "broken/checkpoints").last()
    assert 30 > int(last.name[-8:]) == len(losses(tmp_path / "broken")) >= 3
    (line,) = [line for line in said.splitlines() if "dying.py: error: " in line]
    assert "was ended by a signal: Killed. The steps before it are in" in line
    assert f"{last}; --resume goes on from it." in line
    for output, more in ((tmp_path / "whole", []), (tmp_path / "broken", ["--resume"])):
        run = launch(files, output, *options, *more)
        assert run.wait(300) == 0, run.stderr.read()
    same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_an_unreadable_image_ends_both_processes_with_one_line(folder, tmp_path):
    """The other process waits for a gradient, and its connection breaks."""
    data = shutil.copytree(folder, tmp_path / "data")
    last = torch.randperm(22, generator=torch.Generator().manual_seed(mix_seed(0, 0)))[-1]  # of the first epoch
    unreadable = sorted(data.glob("*/*.png"))[last]
    unreadable.write_bytes(b"no image")
    options = ["--on_bad_image", "error", "--pca_patches", "16", "--max_steps", "30", "--checkpointing_steps", "1"]
    run = launch(data, tmp_path / "run", *options)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 1  # torchrun's
    (line,) = [line for line in said.splitlines() if "train_ldae.py: error: " in line]
    assert f"train_ldae.py: error: unreadable image (--on_bad_image error): {unreadable}: " in line
    assert said.count("Traceback") == 1  # torchrun's
    assert Checkpoints(tmp_path / "run/checkpoints").last() is not None


def test_every_process_takes_its_part_of_all_noise(folder, tmp_path):
    """Whatever tensors a model's noise holds."""
    options = ["--data", str(folder), "--output_dir", str(tmp_path / "run"), *TINY]
    with Run(*parse_arguments(options)) as run:
        images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
        run.sample_noise = lambda size, generator: {
            "noise": torch.rand(size, 5, generator=generator), "keep": torch.arange(2 * size).view(size, 2)
        }  # fmt: skip
        run.images_per_batch = 12  # of three processes
        parts = []
        for index in range(3):
            run.accelerator = SimpleNamespace(process_index=index, device=torch.device("cpu"))
            parts.append(run.inputs({"pixel_values": images}, micro_step=0))
        generator = torch.Generator().manual_seed(mix_seed(0, 0, 0))
        assert torch.equal(torch.cat([part["noise"] for part in parts]), torch.rand(12, 5, generator=generator))
        assert torch.equal(torch.cat([part["keep"] for part in parts]), torch.arange(24).view(12, 2))
        assert all(torch.equal(part["pixel_values"], -torch.ones(4, 3, 16, 16)) for part in parts)
