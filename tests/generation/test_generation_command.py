"""The command that generates images and measures their distance to real ones."""

import json
import runpy

import numpy as np
import pytest
import torch
from PIL import Image
from samplers import LATENT, naive_distance, pipeline, sample, seeded

from ldae import LDAEForPreTraining, LDAEModel
from ldae.data.images import ImageDataset, to_pixel_values
from ldae.data.order import evaluation_loader
from ldae.data.sources import load_examples
from ldae.features.encoders import Encoder
from ldae.generation import command


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    (folder / "05.png").write_bytes(b"no image")
    return folder


def run(*args):
    return command.main([*map(str, args), "--num_inference_steps", "3"])


@pytest.fixture
def given(make, tiny_model, data, tmp_path, monkeypatch):
    """The options of 21 images in batches of 8, and with `measured` those of their distance to `data`."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    make(num_classes=3).save_pretrained(tmp_path / "model")
    tiny_model(LDAEForPreTraining, hidden_size=8).save_pretrained(tmp_path / "encoder")
    return ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--num_images", 21, "--batch_size", 8]


@pytest.fixture
def measured(given, data, tmp_path):
    of_data = ["--data", data, "--encoder", tmp_path / "encoder"]
    return [*given, *of_data, "--guidance_scale", 2, "--sampler", "ddpm"]


def test_command_line(make, tiny_model, data, tmp_path, measured, capsys):
    """The distance is scipy's, of features of the images that the pipeline makes; classes take turns."""
    result = run(*measured)
    written = json.loads((tmp_path / "out/results/generation.json").read_text())
    counted = {name: written[name] for name in ("kind", "num_real", "num_fake", "num_features", "sampler", "split")}
    assert counted == {
        "kind": "generation", "num_real": 19, "num_fake": 21, "num_features": 8, "sampler": "ddpm", "split": "train",
    }  # fmt: skip
    assert written["metric"].endswith("features of encoder")
    assert "commit" in written
    with Image.open(tmp_path / "out/samples.png") as grid:
        assert grid.size == (5 * 14 + 2, 5 * 10 + 2)
    assert "Fréchet distance" in capsys.readouterr().out

    pipe, generator = pipeline(make(num_classes=3), "ddpm"), seeded()
    labels = [list(range(first, min(first + 8, 21))) for first in (0, 8, 16)]
    sampled = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": generator}
    fake = torch.cat([sample(pipe, class_labels=[i % 3 for i in batch], **sampled) for batch in labels])
    images = ImageDataset(load_examples(str(data), "train"), (8, 12), 3)
    (real,) = (batch["pixel_values"] for batch in evaluation_loader(images, 64, 0))
    encoder = Encoder(tiny_model(LDAEForPreTraining, hidden_size=8))
    with torch.inference_mode():
        features = [encoder.pool(x).double().numpy() for x in (to_pixel_values(real), 2 * fake - 1)]
    assert written["value"] == result["value"] == pytest.approx(naive_distance(*features), rel=1e-3)


def test_command_line_replaces_no_result_unasked(given, measured):
    value = run(*measured)["value"]
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(*measured)
    assert run(*measured, "--overwrite")["value"] == value
    assert run(*measured, "--overwrite", "--seed", 1)["value"] != pytest.approx(value, rel=1e-3)
    assert "value" not in run(*given, "--overwrite")  # images alone


def test_command_line_validates_before_any_work(given, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_model", lambda *args: pytest.fail("a model was loaded"))
    for args, text in (
        (["--num_images", 1, "--data", data], "--num_images must be at least 2"),
        (["--encoder", tmp_path / "encoder"], "--encoder .* --data"),
    ):
        with pytest.raises(ValueError, match=text):
            run(*given, *args)
    with pytest.raises(SystemExit):
        run(*given, "--batch_size", 0)
    assert "batch_size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_line_needs_a_model_that_generates(tiny_model, tmp_path):
    tiny_model(LDAEForPreTraining).save_pretrained(tmp_path / "model")
    tiny_model(LDAEModel, **LATENT).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="denoise"):
        run("--model", tmp_path / "model", "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match="lacks"):
        run("--model", tmp_path / "encoder", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line_validates_before_it_reads_an_image(make, data, tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(command, "load_examples", lambda *args: pytest.fail("images were read"))
    given = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--data", data]
    for option, value, text in (
        ("num_inference_steps", 1001, "must be in"),
        ("guidance_scale", 2, "needs a model that is told"),
    ):
        with pytest.raises(ValueError, match=f"{option} {text}"):
            command.main([*map(str, given), f"--{option}", str(value)])
    assert not (tmp_path / "out").exists()


def test_a_worker_that_is_spawned_does_not_run_the_command_again(monkeypatch):
    """It imports the main module of its parent, under another name."""
    monkeypatch.setattr("ldae.mistakes.run_command", lambda main: pytest.fail("the command ran"))
    runpy.run_module("ldae.generation.__main__", run_name="__mp_main__")
