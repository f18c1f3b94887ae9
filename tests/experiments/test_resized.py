"""A data set of centre crops, written once."""

import pytest
import torch
from PIL import Image

from experiments.resized import resize
from ldae.data.images import ImageDataset
from ldae.data.sources import load_examples


def patch_loading(monkeypatch, examples):
    """Lets the examples be both splits of any data set."""
    monkeypatch.setattr("experiments.resized.load_examples", lambda source, split: examples)
    monkeypatch.setattr("experiments.resized.load_validation", lambda source: examples)


def test_written_crops_are_those_of_the_images(tmp_path, capsys, monkeypatch):
    examples = load_examples("photos", "validation").select(range(6))
    patch_loading(monkeypatch, examples)
    resize("photos", tmp_path / "small", 24)
    for split in ("train", "validation"):
        written = load_examples(str(tmp_path / "small"), split)
        assert written.features["label"].names == examples.features["label"].names
        expected, found = ImageDataset(examples, (24, 24)), ImageDataset(written, (24, 24))
        assert len(found) == 6
        for i in range(6):
            assert torch.equal(found[0, i]["pixel_values"], expected[0, i]["pixel_values"])
            assert found[0, i]["label"] == expected[0, i]["label"]
    with pytest.raises(FileExistsError, match="is not empty"):
        resize("photos", tmp_path / "small", 24)


def test_unreadable_images_are_named_and_left_out(tmp_path, capsys, monkeypatch):
    examples = load_examples("photos", "validation").select(range(3))
    broken = examples.map(
        lambda row, i: {"image": {"bytes": b"x", "path": "bad.png"} if i == 1 else row["image"]}, with_indices=True
    )
    patch_loading(monkeypatch, broken)
    resize("photos", tmp_path / "small", 24)
    assert len(load_examples(str(tmp_path / "small"), "train")) == 2
    assert "Skipping bad.png" in capsys.readouterr().out


def test_images_without_labels_or_a_validation_split_are_written_too(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / f"set/{name}.png")
    resize(str(tmp_path / "set"), tmp_path / "small", 24)
    written = load_examples(str(tmp_path / "small"), "train")
    assert len(written) == 2
    assert "label" not in written.features
    assert [path.name for path in (tmp_path / "small/data").iterdir()] == ["train.parquet"]


def test_a_set_without_training_images_is_refused_first(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(FileNotFoundError, match="there are no images"):
        resize(str(tmp_path / "set"), tmp_path / "small", 24)
    assert not (tmp_path / "small").exists()
