"""Runs of train_ldae.py on a tiny model and a handful of images."""

import itertools
import json
import os
import shutil
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import TINY, TOKENIZER, at_step, losses, same_run, train
from torch.utils.data import DataLoader

import train_ldae
from ldae import LDAEForPreTraining
from ldae.data.images import ImageDataset
from ldae.data.sources import load_examples
from ldae.options import default_learning_rate
from ldae.report.results import environment
from ldae.training import probing
from ldae.training import run as run_module
from ldae.training.clock import CLOCKS
from ldae.training.run import Run

GOLDEN = Path(__file__).with_name("golden_losses.json")


@pytest.mark.compile
def test_a_compiled_run_loses_what_an_eager_one_does(folder, tmp_path):
    """After a tokenizer, which is not compiled."""
    options = (*TOKENIZER, "--num_hidden_layers", "3", "--decoder_num_hidden_layers", "2")
    train(folder, tmp_path / "eager", *options)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train(folder, tmp_path / "compiled", *options, "--torch_compile")
    # five blocks share what one compiles; encoder and decoder may each be compiled once
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert losses(compiled) == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
    LDAEForPreTraining.from_pretrained(compiled)


def test_a_loader_that_was_left_before_its_end_changes_no_run(folder, tmp_path):
    """accelerate would end a step at the end of the last loader that it knows, whoever has left it there."""
    options = ("--gradient_accumulation_steps", "2")
    train(folder, tmp_path / "first", *options)
    left = iter(Accelerator(cpu=True).prepare(DataLoader([0, 1])))
    assert [next(left), next(left)] == [0, 1]
    assert GradientState().end_of_dataloader
    train(folder, tmp_path / "second", *options)
    same_run(tmp_path / "first", tmp_path / "second")
    assert list(left) == []  # so that accelerate forgets it


def test_golden_losses(folder, tmp_path):
    """A refactor reproduces the curve; to write it anew after a meant change, remove the file and run this test twice."""
    train(folder, tmp_path / "run", "--max_steps", "12", "--loss_units", "image")
    now = {"losses": losses(tmp_path / "run"), "made_on": {k: environment()[k] for k in ("versions", "hardware")}}
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(now, indent=1) + "\n")
        pytest.fail("there was no golden loss curve; it was written, look at it")
    golden = json.loads(GOLDEN.read_text())
    assert now["losses"][-1] < 0.9 * now["losses"][0]
    if golden["made_on"] == now["made_on"]:
        assert now["losses"] == golden["losses"]
    assert now["losses"] == pytest.approx(golden["losses"], rel=1e-3)  # other processors round otherwise


def test_the_folder_of_a_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data/train")
    shutil.copytree(folder, tmp_path / "data/val")
    output = train(tmp_path / "data", tmp_path / "run", "--probe", "--knn_steps", "4", "--image_steps", "3")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "modeling_ldae.py", "README.md",
                 "configuration_ldae.py", "denoised.png", "filters.png", "spectrum.png", "images/step-00000003.png",
                 "results/train.json"):  # fmt: skip
        assert (output / name).is_file(), name
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "checkpoint-00000004", "checkpoint-00000006"
    ]  # fmt: skip
    result = json.loads((output / "results/train.json").read_text())
    assert (result["steps"], result["images_seen"], result["data"]["num_images"]) == (6, 24, 22)
    probe = json.loads((output / "results/probe-data.json").read_text())
    assert set(probe["protocols"]) == {"knn", "linear-fast"} == set(probe["floor"]) - {"description"}
    # the result is the averaged model, with the tokenizer that PCA gave
    model = LDAEForPreTraining.from_pretrained(output)
    ema = load_file(output / "checkpoints/checkpoint-00000006/ema.safetensors")
    assert all(torch.equal(value, ema[name]) for name, value in model.state_dict().items())
    assert model.ldae.tokenizer.spectrum.sum() > 0


def test_two_splits_without_the_labels_of_one_are_trained_on_and_not_probed(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "data/val")
    for path in folder.glob("*/*.png"):
        (tmp_path / "data/train").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "data/train")
    output = train(tmp_path / "data", tmp_path / "run", "--probe", "--knn_steps", "2")
    assert f"Accuracy is not measured on '{tmp_path}/data': the training split has no labels" in capsys.readouterr().out
    assert [path.name for path in (output / "results").iterdir()] == ["train.json"]


def test_a_stream_is_all_that_is_read(files, tmp_path, monkeypatch):
    """No other split is prepared on disk for probes that cannot be."""
    streamed, real = [], datasets.load_dataset

    def load_dataset(*args, streaming=False, **kwargs):
        streamed.append(streaming)
        return real(*args, streaming=streaming, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    output = train(files, tmp_path / "run", "--streaming", "--probe", "--knn_steps", "2")
    assert streamed == [True]
    assert len(losses(output)) == 6


def test_online_probes_see_some_images(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "data/train")
    shutil.copytree(folder, tmp_path / "data/val")
    made, real = [], probing.Subject

    def subject(*args, **kwargs):
        made.append(real(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(probing, "Subject", subject)
    monkeypatch.setattr(probing, "KNN_IMAGES", 8)
    train(tmp_path / "data", tmp_path / "run", "--knn_steps", "2", "--probe")
    assert [(len(s.train), len(s.validation)) for s in made] == [(8, 8)] * 3 + [(22, 22)]
    assert made[0].train is made[1].train  # decoded once
    assert set(made[0].train.labels) == {0, 1}


def test_nothing_is_trained_for_a_run_that_will_be_refused(folder, tmp_path, monkeypatch):
    """A tokenizer would be trained first, perhaps for hours."""
    ae = ["--tokenizer_type", "patch_ae", "--prediction", "latent", "--input_space", "latent"]
    monkeypatch.setattr(train_ldae, "train", lambda *args: pytest.fail("a tokenizer was trained"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(FileExistsError, match=r"output_dir .*full.* holds files that are of no run"):
        train(folder, tmp_path / "full", *ae)
    monkeypatch.setattr("ldae.hub.push.get_token", lambda: None)
    with pytest.raises(ValueError, match="push_to_hub needs an access token"):
        train(folder, tmp_path / "new", *ae, "--push_to_hub")
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(folder / "a/00.png", flat)
    with pytest.raises(ValueError, match="class_conditional needs labels"):
        train(flat, tmp_path / "new", *ae, "--class_conditional")


def test_fewer_classes_than_labels_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"--num_classes 1: the label of image .* is 1, and there are 1 classes"):
        train(folder, tmp_path / "run", "--num_classes", "1")


def test_a_stream_trains_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"--streaming .*give --tokenizer FOLDER"):
        train(
            tmp_path / "data", tmp_path / "run", "--streaming", "--tokenizer_type", "patch_ae", "--prediction", "latent"
        )


def test_an_image_that_goes_away_in_training_ends_no_run(folder, tmp_path, monkeypatch):
    """The fingerprint is that of the images that the run was started with."""
    data = shutil.copytree(folder, tmp_path / "data")
    before = ImageDataset(load_examples(str(data), "train"), (16, 16)).fingerprint()
    at_step(monkeypatch, 6, next(data.glob("a/*.png")).unlink)
    output = train(data, tmp_path / "run")
    assert json.loads((output / "results/train.json").read_text())["data"]["fingerprint"] == before


def test_two_runs_in_one_folder(folder, tmp_path, monkeypatch):
    """The second is refused before it changes anything, also where it would overwrite or resume; the first goes on."""
    second, real = iter(["--resume", "--overwrite"]), Run.save_checkpoint

    def save_checkpoint(run):
        real(run)
        before = sorted((tmp_path / "run").rglob("*"))
        if (option := next(second, None)) is not None:
            with pytest.raises(FileExistsError, match=rf"run' is in use by process {os.getpid()} on"):
                train(folder, tmp_path / "run", option)
            assert sorted((tmp_path / "run").rglob("*")) == before

    monkeypatch.setattr(Run, "save_checkpoint", save_checkpoint)
    train(folder, tmp_path / "run")
    assert next(second, None) is None
    assert len(losses(tmp_path / "run")) == 6
    assert not (tmp_path / "run/.lock").exists()


def test_a_lock_that_was_left_behind_locks_nothing(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text("process 1 on another machine")
    assert len(losses(train(folder, tmp_path / "run"))) == 6


def test_unreadable_images_are_named_and_skipped_or_refused(folder, tmp_path, capsys):
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "a/broken.png").write_bytes((data / "a/00.png").read_bytes()[:60])
    output = train(data, tmp_path / "run")
    bad = json.loads((output / "results/train.json").read_text())["data"]["bad_images"]
    assert len(bad) == 1
    assert "broken.png" in bad[0]
    out = capsys.readouterr().out
    assert out.count(f"Skipping {data}/a/broken.png: ") == 1
    assert "Unreadable images, skipped: 1;" in out
    with pytest.raises(ValueError, match=r"on_bad_image error.*broken\.png"):
        train(data, tmp_path / "strict", "--on_bad_image", "error")


def test_images_that_all_are_unreadable_end_the_run_with_the_reason_of_the_first(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "data" / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of 2 images can be read; the first is .*\.png: UnidentifiedImageError"):
        train(tmp_path / "data", tmp_path / "run")


def test_images_of_one_colour_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(8):
        Image.new("RGB", (20, 20), "red").save(tmp_path / f"data/{i}.png")
    with pytest.raises(ValueError, match="all patches are the same, so there is nothing to learn"):
        train(tmp_path / "data", tmp_path / "run")


def test_a_run_that_was_killed_as_it_began_goes_on(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.losses.jsonl.99999999@here.partial").touch()
    train(folder, tmp_path / "run", "--resume")


def test_a_run_never_replaces_another_unasked(folder, tmp_path, capsys):
    output = train(folder, tmp_path / "run")
    (output / "mine.txt").write_text("kept")
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"--resume.*--overwrite"):
        train(folder, output)
    with pytest.raises(ValueError, match=r"--resume .* seed was 0, is 1"):
        train(folder, output, "--resume", "--seed", "1")
    assert (output / "model.safetensors").read_bytes() == before
    (output / "loss.png").write_text("of a run with images that were held out")
    train(folder, output, "--overwrite", "--seed", "1", "--held_out", "0")
    assert (output / "model.safetensors").read_bytes() != before
    assert not (output / "loss.png").exists()
    assert "loss.png" not in (output / "README.md").read_text()
    assert (output / "mine.txt").read_text() == "kept"
    train(folder, tmp_path / "fresh", "--resume")
    assert "starting afresh" in capsys.readouterr().out


def test_a_run_never_touches_files_of_the_users(folder, tmp_path):
    """Also where they lie in folders that a run would have made: with --overwrite, and where there was no run."""
    project = tmp_path / "project"
    shutil.copytree(folder, project / "images")
    files = [project / name for name in ("README.md", "results/table.csv", "checkpoints/mine.pt", "logs/diary.txt")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    for options in ([], ["--resume"], ["--overwrite"], ["--resume", "--overwrite"]):
        with pytest.raises(FileExistsError, match="holds files that are of no run; choose another --output_dir"):
            train(project / "images", project, *options)
    train(folder, tmp_path / "run")
    for file in files[1:]:
        (tmp_path / "run" / file.relative_to(project)).parent.mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "run" / file.relative_to(project))
    shutil.copytree(folder, tmp_path / "run/images", dirs_exist_ok=True)
    train(tmp_path / "run/images", tmp_path / "run", "--overwrite")
    assert all((tmp_path / "run" / file.relative_to(project)).read_text() == "mine" for file in files[1:])
    assert all(file.read_text() == "mine" for file in files)
    assert len(list((tmp_path / "run/images").rglob("*.png"))) == len(list(folder.rglob("*.png")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--latent_dim 999", "latent_dim"),
        ("--image_size 17", "patch_size must divide image_size"),
        ("--init_from /nowhere", "/nowhere"),
        ("--push_to_hub", "push_to_hub needs an access token"),
        ("--train_split nope", "nope"),
        ("--validation_split nope", "nope"),
    ],
)
def test_bad_options_are_refused_before_any_work(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("ldae.hub.push.get_token", lambda: None)
    with pytest.raises((ValueError, OSError), match=message):
        train(folder, tmp_path / "run", *options.split())
    assert not (tmp_path / "run").exists()


def test_the_clock_of_a_run_is_the_one_that_was_asked_for(folder, tmp_path, monkeypatch):
    ticks = itertools.count()  # a second for every look: one as the first step begins, and one a step
    monkeypatch.setitem(CLOCKS, "processor", lambda: float(next(ticks)))
    for name in ("fit_to_images", "training_loader"):  # what they do takes long, and is no training
        slow = partial(slowed, getattr(run_module, name), lambda: [next(ticks) for _ in range(1000)])
        monkeypatch.setattr(run_module, name, slow)
    for steps, resume in ((3, []), (5, ["--resume"])):
        limit = f"--max_minutes={steps / 60}"
        output = train(folder, tmp_path / "run", "--clock=processor", limit, "--image_steps=0", *resume)
        result = json.loads((output / "results/train.json").read_text())
        assert (result["steps"], result["seconds"], result["clock"]) == (steps, float(steps), "processor")
        assert result["images_per_second"] == 4.0


def slowed(function, wait, *args, **kwargs):
    wait()
    return function(*args, **kwargs)


@pytest.mark.parametrize(("width", "rate"), [(32, 2e-3), (192, 2e-3), (384, 4e-4), (768, 1e-4), (1024, 1e-4)])
def test_the_learning_rate_suits_the_width_where_none_is_given(width, rate):
    assert default_learning_rate(width) == rate


def test_a_run_takes_and_records_the_default_learning_rate(folder, tmp_path):
    options = [option for option in TINY if not option.startswith("--base_learning_rate")]
    output = train_ldae.main(
        ["--data", str(folder), "--output_dir", str(tmp_path / "run"), *options, "--hidden_size", "384"]
    )
    result = json.loads((output / "results/train.json").read_text())
    assert result["arguments"]["base_learning_rate"] == 4e-4
    rates = [json.loads(line)["learning_rate"] for line in (output / "losses.jsonl").read_text().splitlines()]
    assert 2e-4 * 4 / 256 < max(rates) <= 4e-4 * 4 / 256
