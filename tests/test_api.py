"""`ldae.train`, `ldae.embed` and `ldae.probe` do what the commands do."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import ldae
import probe_ldae
import train_ldae
from ldae.features import command
from ldae.options import parse_arguments, parse_keywords

SIZE = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "latent_dim": 4,
}  # fmt: skip
RUN = {"per_device_batch_size": 4, "max_steps": 2, "report_to": "none", "probe": False, "held_out": 0}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve noise images to learn from and six to measure, of two classes, and a file that is no image."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for i in range(count):
            folder = root / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    (root / "train/b/99.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    AcceleratorState._reset_state(True)
    trained = ldae.train(data, tmp_path_factory.mktemp("runs") / "called", **SIZE, **RUN)
    assert isinstance(trained, Path)
    return trained


def command_line(options: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


# ---------------------------------------------------------------------------------------------------- the same as commands


def test_train_is_the_command(data, folder, tmp_path):
    AcceleratorState._reset_state(True)
    run = train_ldae.main(command_line({"data": data, "output_dir": tmp_path / "commanded", **SIZE, **RUN}))
    for name in ("model.safetensors", "config.json"):
        assert (run / name).read_bytes() == (folder / name).read_bytes()


def test_keywords_are_the_command_line(data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 3\nmodel_size: small\nseed: 7\n")
    given = {"data": data, "output_dir": tmp_path / "out", "max_steps": 5, "flip": False, "image_size": 64}
    by_keywords = parse_keywords(recipe, **given, init_from=None, report_to=("none",))
    by_command = parse_arguments([str(recipe), *command_line(given), "--report_to", "none"])
    assert [*map(dataclasses.asdict, by_keywords)] == [*map(dataclasses.asdict, by_command)]
    assert (by_keywords[0].model_size, by_keywords[0].image_size, by_keywords[2].seed) == ("small", [64], 7)


def test_nothing_is_written_in_a_rehearsal(data, tmp_path, capsys):
    assert ldae.train(data, tmp_path / "out", dry_run=True, **SIZE, **RUN) is None
    assert not (tmp_path / "out").exists()
    assert "steps" in capsys.readouterr().out


def test_embed_gives_what_the_command_writes(data, folder, tmp_path, capsys):
    given = {"model": folder, "data": data, "features": "both"}
    embedded = ldae.embed(**given)
    assert "left out, unreadable: train/b/99.png" in capsys.readouterr().out
    command.main(command_line({**given, "output_dir": tmp_path / "out", "shard_size": 5}))
    written = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert embedded.features == written.features
    assert embedded["name"][:].tolist() == written["name"][:]
    assert embedded["label"][:].tolist() == written["label"][:]
    assert embedded.features["label"].names == ["a", "b"]
    for name, shape in (("pooled", (12, 32)), ("patches", (12, 16, 32))):
        features = embedded[name][:]
        assert (features.shape, features.dtype) == (shape, np.float32)
        np.testing.assert_allclose(features, written.with_format("numpy")[name][:], atol=1e-6)


def test_embed_gives_the_features_of_the_named_files(data, folder):
    embedded = ldae.embed(folder, data, split="validation")
    model = ldae.LDAEModel.from_pretrained(folder)
    processor = ldae.LDAEImageProcessor.from_pretrained(folder)
    images = [Image.open(data / name) for name in embedded["name"][:]]
    with torch.no_grad():
        expected = model(**processor(images, return_tensors="pt")).pooler_output
    np.testing.assert_allclose(embedded["pooled"][:], expected, atol=1e-5)


def test_probe_is_the_command(data, folder, tmp_path):
    given = {"model": folder, "data": data, "features_cache": "none", "knn_k": 3}
    result = ldae.probe(**given, output_dir=tmp_path / "called", protocols="knn")
    path = probe_ldae.main([*command_line({**given, "output_dir": tmp_path / "commanded"}), "--protocols", "knn"])
    expected = json.loads(path.read_text())
    assert result["protocols"]["knn"]["settings"] == {"knn_k": 3, "knn_temperature": 0.07}
    for part in (result, expected):
        part["protocols"]["knn"].pop("seconds")
    assert result["protocols"] == expected["protocols"]


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ldae.train("photos", epoch=1), TypeError, "unknown option 'epoch'; did you mean epochs"),
        (lambda: ldae.train("photos", epochs=-1), ValueError, "^epochs must be a number greater than 0, got -1"),
        (lambda: ldae.train("photos", flip="maybe"), ValueError, "^flip must be true or false, got 'maybe'"),
        (lambda: ldae.train(None), ValueError, "^data must be a text that is not empty, got None"),
        (lambda: ldae.train("photos", patch_size=5), ValueError, "patch_size must divide image_size"),
        (lambda: ldae.train("photos", recipe="nowhere"), FileNotFoundError, "no recipe 'nowhere'"),
        (lambda: ldae.embed("x", "photos", features="all"), ValueError, "^features must be one of pooled"),
        (lambda: ldae.embed("x", "photos", output_dir="y"), TypeError, "unknown option 'output_dir'"),
        (lambda: ldae.embed("./nowhere", "photos"), FileNotFoundError, "there is no folder './nowhere'"),
        (lambda: ldae.probe("x", knn_k=0), ValueError, "^knn_k must be an integer of at least 1, got 0"),
        (lambda: ldae.probe("x", protocols=["knn", "all"]), ValueError, "protocols: 'all' is none of knn"),
    ],
)
def test_a_mistake_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_images_that_cannot_be_read_are_no_features(folder, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 1 images can be read, the first is a\.png"):
        ldae.embed(folder, tmp_path)


def test_the_precision_of_a_process_stays(data, folder, monkeypatch):
    """accelerate keeps the first; a later call takes it, unless it asks for another, which would be ignored or fail."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    ldae.embed(folder, data, mixed_precision="bf16")
    ldae.embed(folder, data)
    assert AcceleratorState().mixed_precision == "bf16"
    with pytest.raises(ValueError, match="--mixed_precision no needs a new Python process"):
        ldae.embed(folder, data, mixed_precision="no")


def test_importing_ldae_imports_no_script_and_none_of_their_libraries():
    code = "import ldae, sys; print({'train_ldae', 'probe_ldae', 'datasets', 'ldae.options'} & set(sys.modules))"
    root = Path(ldae.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr
