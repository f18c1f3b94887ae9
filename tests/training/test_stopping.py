"""Signals and deaths of workers: a run ends in a good place, with its cause, and goes on from there."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from tiny_runs import ROOT, TINY, at_step, let_a_worker_die, losses, same_run, train
from torch.utils.data import get_worker_info

import train_ldae
from ldae import interruption
from ldae.data.images import ImageDataset
from ldae.mistakes import is_mistake
from ldae.training.checkpoints import Checkpoints


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("options", ["", "--streaming --num_workers 2 --gradient_accumulation_steps 2"])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    folder, files, tmp_path, monkeypatch, capsys, number, status, options
):
    options = [*options.split(), "--checkpointing_steps", "0"]
    data, before = files if "--streaming" in options else folder, signal.getsignal(number)
    train(data, tmp_path / "whole", *options)
    with monkeypatch.context() as context:
        at_step(context, 3, lambda: [os.kill(os.getpid(), number) for _ in range(2)])  # a launcher's too
        with pytest.raises(SystemExit) as ended:
            train(data, tmp_path / "run", *options)
    assert ended.value.code == status
    assert capsys.readouterr().err.endswith(
        f"\nInterrupted by {number.name}: the same command with --resume goes on.\n"
    )
    assert (Checkpoints(tmp_path / "run/checkpoints").last().name, len(losses(tmp_path / "run"))) == (
        "checkpoint-00000003", 3
    )  # fmt: skip
    assert signal.getsignal(number) is before
    train(data, tmp_path / "run", *options, "--resume")
    same_run(tmp_path / "whole", tmp_path / "run")


def test_a_second_signal_ends_the_run_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "ECHO", -1)
    at_step(monkeypatch, 3, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(SystemExit) as ended:
        train(folder, tmp_path / "run")
    assert ended.value.code == 130
    assert Checkpoints(tmp_path / "run/checkpoints").last().name == "checkpoint-00000002"


def test_a_signal_after_the_last_step_ends_the_run_at_once(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(train_ldae, "finish", lambda run: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            train(folder, tmp_path / "run")
    assert ended.value.code == 143
    train(folder, tmp_path / "run", "--resume")
    assert (tmp_path / "run/README.md").exists()


def test_a_signal_ends_the_processes_of_a_run(folder, tmp_path):
    """SIGTERM to all of them, as clusters send it: the workers end at once, and the run still writes its checkpoint."""
    command = [
        sys.executable,
        str(ROOT / "train_ldae.py"),
        "--data",
        str(folder),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    command += [*TINY, "--max_steps", "100000", "--checkpointing_steps", "0", "--num_workers", "2"]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not ((tmp_path / "run/losses.jsonl").exists() and losses(tmp_path / "run")):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) >= 2
    os.killpg(run.pid, signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 143, said
    assert "Traceback" not in said
    assert "Interrupted by SIGTERM: the same command with --resume goes on." in said
    assert int(Checkpoints(tmp_path / "run/checkpoints").last().name[-8:]) == len(losses(tmp_path / "run"))
    assert not psutil.wait_procs(workers, timeout=10)[1]


def kill_a_worker(monkeypatch):
    """When a step has been made, before the next batch is asked for."""
    at_step(monkeypatch, 3, lambda: psutil.Process().children()[-1].kill())


@pytest.mark.parametrize("kill", [kill_a_worker, let_a_worker_die])
@pytest.mark.parametrize("options", ["", "--streaming --gradient_accumulation_steps 2"])
def test_a_worker_that_dies_ends_the_run_with_its_cause_and_a_checkpoint(
    folder, files, tmp_path, monkeypatch, kill, options
):
    data = files if "--streaming" in options else folder
    options = (*options.split(), "--num_workers", "2", "--max_steps", "30", "--checkpointing_steps", "0")
    train(data, tmp_path / "whole", *options)
    with monkeypatch.context() as context:
        kill(context)
        with pytest.raises(ChildProcessError) as ended:
            train(data, tmp_path / "run", *options)
    last = Checkpoints(tmp_path / "run/checkpoints").last()
    assert 30 > int(last.name[-8:]) == len(losses(tmp_path / "run")) >= 3
    assert re.fullmatch(
        rf"A process that reads images was ended by a signal: Killed\. The steps before it are in {re.escape(str(last))}; "
        r"--resume goes on from it\. Fewer --num_workers need less memory\.",
        str(ended.value),
    )
    train(data, tmp_path / "run", *options, "--resume")
    same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("images", [18, 4], ids=["fitted to the tokenizer", "held out"])
def test_a_worker_that_dies_outside_of_training_costs_nothing(folder, tmp_path, monkeypatch, capfd, images):
    """Wherever a worker of its own reads: 18 of the 22 images are trained on, and 4 held out."""
    options, died, real = ("--num_workers", "1", "--held_out", "0.2"), tmp_path / "died", ImageDataset.__getitems__

    def getitems(self, keys):
        if get_worker_info() is not None and len(self) == len(keys) == images and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, keys)

    train(folder, tmp_path / "whole", *options)
    monkeypatch.setattr(ImageDataset, "__getitems__", getitems)
    train(folder, tmp_path / "run", *options)
    assert died.exists()
    same_run(tmp_path / "whole", tmp_path / "run")
    a, b = (json.loads((tmp_path / run / "results/train.json").read_text()) for run in ("whole", "run"))
    assert a["held_out"] == b["held_out"]
    assert (
        "A process that reads images was ended by a signal: Killed. This process reads its images. Fewer --num_workers need "
        "less memory.\n"
    ) in capfd.readouterr().err


def test_a_full_disk_costs_the_steps_since_the_last_checkpoint(folder, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    train(folder, tmp_path / "whole")
    try:
        with monkeypatch.context() as context:  # files may have 20,000 bytes at most: losses, but not weights
            at_step(context, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1])))
            with pytest.raises(Exception, match="File too large") as error:
                train(folder, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert is_mistake(error.value)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-00000002"]
    train(folder, tmp_path / "run", "--resume")
    same_run(tmp_path / "whole", tmp_path / "run")
