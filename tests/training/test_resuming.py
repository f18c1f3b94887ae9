"""Runs that are stopped and go on: bit for bit as if they had not been, and told what has changed since."""

import json
import shutil

import pytest
from tiny_runs import losses, same_run, stop_at, train

from ldae.data.images import ImageDataset
from ldae.data.sources import load_examples
from ldae.training.checkpoints import Checkpoints
from ldae.training.clock import CLOCKS
from ldae.training.run import Run


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--num_workers 2 --gradient_accumulation_steps 2 --crop random_resized",
        "--streaming",
        "--streaming --num_workers 2 --gradient_accumulation_steps 2 --crop random_resized",
    ],
    ids=["plain", "workers-accumulation-crops", "stream", "stream-workers-accumulation-crops"],
)
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(folder, files, tmp_path, monkeypatch, options):
    options = options.split()
    data = files if "--streaming" in options else folder
    train(data, tmp_path / "whole", *options)
    with monkeypatch.context() as context:
        stop_at(context, 5)
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "broken", *options)
    assert Checkpoints(tmp_path / "broken/checkpoints").last().name == "checkpoint-00000004"
    train(data, tmp_path / "broken", *options, "--resume")
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_checkpoints_are_written_by_minutes_too(folder, tmp_path, monkeypatch):
    """Steps of half a minute, and a checkpoint each minute."""
    saved, real, seconds = [], Run.save_checkpoint, iter(range(0, 10000, 30))
    monkeypatch.setitem(CLOCKS, "wall", lambda: next(seconds))
    monkeypatch.setattr(Run, "save_checkpoint", lambda run: (real(run), saved.append(run.state["step"])))
    train(folder, tmp_path / "run", "--checkpointing_steps", "0", "--checkpointing_minutes", "1")
    assert saved == [2, 4, 6]


def test_a_run_that_the_clock_ended_is_not_trained_further(folder, tmp_path):
    options = ("--max_minutes", "0.00001", "--warmup_ratio", "0")
    train(folder, tmp_path / "run", *options)
    weights, before = (tmp_path / "run/model.safetensors").read_bytes(), losses(tmp_path / "run")
    train(folder, tmp_path / "run", *options, "--resume")
    assert losses(tmp_path / "run") == before
    assert (tmp_path / "run/model.safetensors").read_bytes() == weights


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(folder, tmp_path, monkeypatch, capsys):
    train(folder, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    path = tmp_path / "broken/checkpoints/checkpoint-00000006/ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    train(folder, tmp_path / "broken", "--resume")
    assert "checkpoint-00000006 is damaged (ema.safetensors is not what was written)" in capsys.readouterr().out
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_run_whose_held_out_images_change_measures_them_anew(folder, tmp_path, capsys):
    """Any one of them, by its name: the loss on other images would be set beside references on these."""
    data = shutil.copytree(folder, tmp_path / "data")
    options = ["--held_out", "0.5"]
    output = train(data, tmp_path / "run", *options)
    first = (output / "held_out.jsonl").read_text()
    train(data, output, *options, "--resume")
    assert (output / "held_out.jsonl").read_text() == first
    path = sorted(data.glob("*/*.png"))[3]
    path.rename(path.with_name("zz.png"))
    capsys.readouterr()
    train(data, output, *options, "--resume")
    assert "have changed since the run was started" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in (output / "held_out.jsonl").read_text().splitlines()] == [6]
    assert (output / "held_out.jsonl").read_text() != first


def test_a_run_whose_images_change_is_told_when_it_is_resumed(folder, tmp_path, monkeypatch, capsys):
    data = shutil.copytree(folder, tmp_path / "data")
    with monkeypatch.context() as context:
        stop_at(context, 5)
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "unchanged")
    train(data, tmp_path / "unchanged", "--resume")
    assert "have changed" not in capsys.readouterr().out
    for path in sorted(data.glob("a/*.png"))[:5]:
        path.unlink()
    output = train(data, tmp_path / "run", "--resume")
    said = capsys.readouterr().out
    assert f"The images of --data '{data}' have changed since the run was started: from step 5 on" in said
    now = ImageDataset(load_examples(str(data), "train"), (16, 16)).fingerprint()
    assert json.loads((output / "results/train.json").read_text())["data"]["fingerprint"] == now


def test_torn_lines_of_losses_are_named_and_left_out(folder, tmp_path, capsys):
    output = train(folder, tmp_path / "run")
    lines = (output / "losses.jsonl").read_text().splitlines()
    (output / "losses.jsonl").write_text("\n".join([lines[0], '{"st}', "[1]", *lines[3:5], lines[5][:9]]))
    train(folder, output, "--resume")
    said = capsys.readouterr().out
    assert [f"losses.jsonl, line {number}: damaged, and left out." in said for number in range(1, 7)] == [
        False, True, True, False, False, False
    ]  # fmt: skip
    assert (output / "losses.jsonl").read_text().splitlines() == [lines[0], *lines[3:5]]


def test_a_run_without_a_whole_checkpoint_is_not_started_afresh_unasked(folder, tmp_path):
    output = train(folder, tmp_path / "run")
    for state in output.glob("checkpoints/*/state.json"):
        state.unlink()
    with pytest.raises(ValueError, match=r"--resume: every checkpoint in .* is damaged; pass --overwrite too"):
        train(folder, output, "--resume")
    assert len(list(output.glob("checkpoints/*"))) == 2
    train(folder, output, "--resume", "--overwrite")
    assert Checkpoints(output / "checkpoints").last().name == "checkpoint-00000006"
