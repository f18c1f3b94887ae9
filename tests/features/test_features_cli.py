"""The command `ldae-features`, end to end on a tiny l-DAE and folders of images."""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.neighbors import NearestNeighbors

import ldae
from ldae import LDAEForPreTraining, LDAEModel
from ldae.data.images import ImageDataset, to_pixel_values
from ldae.data.sources import load_examples
from ldae.features import command, embedding

ROOT = Path(ldae.__file__).resolve().parents[1]
READABLE = [f"{name}/{i}.png" for name in "abc" for i in range(3) if (name, i) != ("b", 1)]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def model(tmp_path, tiny_model):
    tiny_model(LDAEForPreTraining).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    """Three classes of three noise images; the fifth of the nine is no image."""
    rng = np.random.default_rng(0)
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data/b/1.png").write_bytes(b"no image")
    return tmp_path / "data"


def arguments(model, data, output, *more):
    return [*map(str, ("--model", model, "--data", data, "--output_dir", output, "--shard_size", 4)), *map(str, more)]


def run(*args):
    command.main(arguments(*args))
    return json.loads((args[2] / "_features.json").read_text())


def shards(folder):
    return sorted(path.name for path in folder.glob("features-*"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def by_hand(model, data):
    """Tokens (8, N, E) of the readable images."""
    images = ImageDataset(load_examples(str(data), "train"), (8, 12))
    items = [images[0, i] for i in range(len(images))]
    pixel_values = torch.stack([item["pixel_values"] for item in items if "error" not in item])
    return LDAEModel.from_pretrained(model)(to_pixel_values(pixel_values)).last_hidden_state


def test_parquet(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    about = run(model, data, out, "--features", "both")
    assert shards(out) == [f"features-0000{i}-of-00003.parquet" for i in range(3)]
    assert (about["num_images"], about["num_readable"], about["classes"]) == (9, 8, ["a", "b", "c"])
    assert (about["image_size"], about["num_patches"], about["hidden_size"]) == ([8, 12], 6, 16)
    (unreadable,) = about["unreadable"]
    assert unreadable.startswith("b/1.png: UnidentifiedImageError")
    assert unreadable in capsys.readouterr().out

    tokens = by_hand(model, data)
    files = [str(out / name) for name in shards(out)]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["label"].names == ["a", "b", "c"]
    assert loaded["name"][:] == READABLE
    assert loaded["label"][:] == [0, 0, 0, 1, 1, 2, 2, 2]
    arrays = loaded.with_format("torch")
    torch.testing.assert_close(arrays["pooled"][:], tokens.mean(dim=1))
    torch.testing.assert_close(arrays["patches"][:], tokens)
    assert (pq.read_schema(files[0]).field("pooled").type.list_size, len(pq.read_table(files[1]))) == (16, 3)
    frame = pandas.read_parquet(files[0])
    np.testing.assert_allclose(np.stack(frame["pooled"]), tokens[:4].mean(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shard_size", [4, 9])
def test_what_is_written_opens_at_once(model, data, tmp_path, monkeypatch, shard_size):
    """The folder as it is, of one shard and of several, in pandas, datasets, scikit-learn and faiss."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "out"
    run(model, data, out, "--shard_size", shard_size)
    expected = by_hand(model, data).mean(dim=1).numpy()
    similarity = expected @ expected.T
    nearest = similarity.argsort()[:, ::-1]

    frame = pandas.read_parquet(out)
    assert (frame["name"].tolist(), frame["label"].tolist()) == (READABLE, [0, 0, 0, 1, 1, 2, 2, 2])
    features = np.stack(frame["pooled"])
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)

    loaded = datasets.load_dataset(str(out), split="train").with_format("numpy")
    assert loaded.features["label"].names == ["a", "b", "c"]
    np.testing.assert_array_equal(loaded["pooled"][:], features)

    neighbours = NearestNeighbors(n_neighbors=8, metric="cosine").fit(features).kneighbors(features)[1]
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_array_equal(neighbours, (unit @ unit.T).argsort()[:, ::-1])

    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features)
    np.testing.assert_array_equal(index.search(features, 8)[1], nearest)
    loaded.add_faiss_index("pooled", metric_type=faiss.METRIC_INNER_PRODUCT)
    found = loaded.get_nearest_examples("pooled", features[3], k=2).examples["name"]
    assert list(found) == [READABLE[i] for i in nearest[3, :2]]


def test_the_package_runs_as_a_module(model, data, tmp_path, monkeypatch):
    """`python -m ldae.features` and `accelerate launch -m ldae.features`."""
    monkeypatch.setattr(sys, "argv", ["ldae.features", *arguments(model, data, tmp_path / "out")])
    runpy.run_module("ldae.features", run_name="__main__")
    assert len(shards(tmp_path / "out")) == 3


def test_safetensors_in_half_precision_hold_the_same(model, data, tmp_path):
    run(model, data, tmp_path / "out", "--features", "both", "--format", "safetensors", "--dtype", "float16")
    paths = [tmp_path / "out" / name for name in shards(tmp_path / "out")]
    assert [path.suffix for path in paths] == [".safetensors"] * 3
    loaded = [load_file(path) for path in paths]
    tokens = by_hand(model, data)
    for name, expected in (("pooled", tokens.mean(dim=1)), ("patches", tokens)):
        got = torch.cat([part[name] for part in loaded])
        assert got.dtype == torch.float16
        torch.testing.assert_close(got.float(), expected, rtol=1e-3, atol=1e-3)
    assert torch.cat([part["label"] for part in loaded]).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    with safe_open(paths[1], "pt") as file:
        assert json.loads(file.metadata()["names"]) == READABLE[4:7]


def test_without_labels_and_a_shard_without_images(model, data, tmp_path):
    for path in sorted(data.glob("*/*.png")):
        path.rename(data / f"{path.parent.name}{path.name}")
    for i in (0, 1, 2):
        (data / f"b{i}.png").write_bytes(b"no image")
    out = tmp_path / "out"
    command.main([*arguments(model, data, out, "--features", "patches"), "--shard_size", "3"])
    about = json.loads((out / "_features.json").read_text())
    assert (about["labels"], about["classes"], len(about["unreadable"])) == (False, None, 3)
    files = [str(out / name) for name in shards(out)]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == ["name", "patches"]
    assert loaded["name"][:] == [f"{name}{i}.png" for name in "ac" for i in range(3)]
    assert len(pq.read_table(files[1])) == 0


def test_a_stopped_run_goes_on(model, data, tmp_path, monkeypatch, capsys):
    run(model, data, tmp_path / "whole")
    write, written = command.write_shard, []

    def stop_at_second(path, *args):
        if written:
            path.with_name(f".{path.name}.99999999@{socket.gethostname()}.partial").write_bytes(b"half a shard")
            raise OSError("killed")
        written.append(path)
        write(path, *args)

    monkeypatch.setattr(command, "write_shard", stop_at_second)
    out = tmp_path / "stopped"
    with pytest.raises(OSError, match="killed"):
        run(model, data, out)
    assert [path.name for path in out.glob("*.parquet")] == ["features-00000-of-00003.parquet"]
    assert json.loads((out / "_features.json").read_text())["num_images"] == 9
    monkeypatch.setattr(command, "write_shard", write)
    capsys.readouterr()
    run(model, data, out)
    assert contents(out) == contents(tmp_path / "whole")
    assert "1 of which were there" in capsys.readouterr().out

    monkeypatch.setattr(embedding, "extract_features", None)  # nothing is left to do
    run(model, data, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_damaged_shard_is_named_and_written_again(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    run(model, data, out)
    whole = contents(out)
    flipped, cut, lost = (out / name for name in shards(out))
    flipped.write_bytes(flipped.read_bytes().replace(b"a/0.png", b"a/9.png"))
    cut.write_bytes(cut.read_bytes()[:50])
    lost.unlink()
    capsys.readouterr()
    run(model, data, out)
    said = capsys.readouterr().out
    assert contents(out) == whole
    assert (f"{flipped} is damaged" in said, f"{cut} is damaged" in said) == (True, True)
    assert "0 of which were there" not in said


def test_a_broken_features_json_is_named_or_overwritten(model, data, tmp_path):
    run(model, data, tmp_path / "out")
    (tmp_path / "out/_features.json").write_text("{")
    with pytest.raises(ValueError, match=r"features\.json is damaged"):
        run(model, data, tmp_path / "out")
    assert run(model, data, tmp_path / "out", "--overwrite")["num_readable"] == 8


@pytest.mark.slow
def test_two_processes_write_what_one_does(model, data, tmp_path):
    about = run(model, data, tmp_path / "one", "--features", "both")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command = [*launch, "ldae.features", *arguments(model, data, tmp_path / "two", "--features", "both")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Features of 8 images") == 1
    assert json.loads((tmp_path / "two" / "_features.json").read_text()) == about
    for name in shards(tmp_path / "one"):
        one, two = (pq.read_table(tmp_path / run / name) for run in ("one", "two"))
        assert two.schema.equals(one.schema, check_metadata=True)
        assert two.select(["name", "label"]) == one.select(["name", "label"])
        for column in ("pooled", "patches"):  # loaded under torchrun, a model rounds differently, with one process too
            got, expected = (np.array(table[column].to_pylist()) for table in (two, one))
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- refused


def test_features_of_another_run_are_kept(model, data, tmp_path):
    out = tmp_path / "out"
    run(model, data, out)
    before = contents(out)
    with pytest.raises(FileExistsError, match=r"dtype: float32 there, float16 here.*--overwrite"):
        run(model, data, out, "--dtype", "float16")
    other = LDAEForPreTraining.from_pretrained(model)
    other.ldae.layers[0].mlp.fc1.bias.data[0] += 1
    other.save_pretrained(model)
    with pytest.raises(FileExistsError, match=rf"\(model {re.escape(str(model))} has changed since\).*--overwrite"):
        run(model, data, out)
    copy = shutil.copytree(model, tmp_path / "copy")
    with pytest.raises(FileExistsError, match=rf"model: {re.escape(f'{model} there, {copy} here')}"):
        run(copy, data, out)
    Image.new("RGB", (9, 9)).save(data / "c" / "3.png")
    assert contents(out) == before
    about = run(model, data, out, "--overwrite", "--shard_size", 5)
    assert shards(out) == [f"features-0000{i}-of-00002.parquet" for i in range(2)]
    assert about["num_images"] == 10


def test_unreadable_images_stop_a_strict_run(model, data, tmp_path):
    with pytest.raises(ValueError, match=r"on_bad_image error.*b/1\.png"):
        run(model, data, tmp_path / "out", "--on_bad_image", "error")
    assert shards(tmp_path / "out") == ["features-00000-of-00003.parquet"]


def test_features_of_no_readable_image_are_an_error(model, data, tmp_path):
    for path in data.glob("*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 9 images can be read, the first is a/0\.png"):
        run(model, data, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value"),
    [("layers.0.mlp.fc1.weight", float("nan")), ("layernorm.bias", float("inf")), ("tokenizer.scale", 0.0)],
)
def test_weights_that_are_no_numbers_are_refused(model, data, tmp_path, name, value):
    whole = LDAEForPreTraining.from_pretrained(model)
    whole.ldae.state_dict()[name].view(-1)[0] = value
    whole.save_pretrained(model)
    with pytest.raises(ValueError, match=rf"--model: .*{name} of .*model' holds"):
        run(model, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_paths(model, data, tmp_path):
    out = tmp_path / "out"
    for args, error, text in (
        ((model, tmp_path / "nowhere", out), FileNotFoundError, "nowhere"),
        ((tmp_path / "nowhere", data, out), FileNotFoundError, "--model"),
        ((model, data, data / "features"), ValueError, "--output_dir"),
        ((model, data, out, "--split", "validation"), ValueError, "no validation split, which is a folder"),
    ):
        with pytest.raises(error, match=text):
            run(*args)
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--shard_size", 0), ("--batch_size", 0), ("--num_workers", -1), ("--format", "csv")]
)
def test_impossible_values(option, value, capsys):
    with pytest.raises(SystemExit):
        command.parse_arguments(["--model", "x", "--data", "x", "--output_dir", "x", option, str(value)])
    assert f"argument {option}: " in capsys.readouterr().err
