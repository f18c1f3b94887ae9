"""A data set of centre crops, written once."""

import pytest
import torch
from PIL import Image

from experiments.resized import resize
from ldae.data.images import ImageDataset
from ldae.data.sources import load_examples


def test_written_crops_are_those_of_the_images(tmp_path, capsys, monkeypatch):
    examples = load_examples("photos", "validation").select(range(6))
    monkeypatch.setattr("experiments.resized.load_examples", lambda source, split: examples)
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
    monkeypatch.setattr("experiments.resized.load_examples", lambda source, split: broken)
    resize("photos", tmp_path / "small", 24)
    assert len(load_examples(str(tmp_path / "small"), "train")) == 2
    assert "Skipping bad.png" in capsys.readouterr().out


def test_data_without_a_split_or_labels_is_refused_first(tmp_path):
    for name in ("train/a", "train/b", "val"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name / "1.png")
    with pytest.raises(ValueError, match="needs a validation split with labels"):
        resize(str(tmp_path / "set"), tmp_path / "small", 24)
    (tmp_path / "set/val").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="no validation split"):
        resize(str(tmp_path / "set"), tmp_path / "small", 24)
    assert not (tmp_path / "small").exists()
