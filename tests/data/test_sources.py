"""Folders, parquet files and Hub data sets become examples with images and labels."""

import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from image_files import encoded, examples, noise, parquet, save
from PIL import Image

from ldae.data import sources
from ldae.data.images import ImageDataset
from ldae.data.sources import (
    EXTENSIONS,
    count_classes,
    hub_id,
    label_array,
    label_fault,
    load_examples,
    load_validation,
    why_not_probed,
)
from ldae.options import parse_arguments

IMAGE = encoded(Image.new("RGB", (8, 8)), "PNG")


def names_of(data) -> list[str]:
    return sorted(path["path"].rsplit("/", 1)[-1] for path in data["image"])


def test_flat_folder_has_no_labels_and_any_case_of_suffix(tmp_path):
    for name in ("one.png", "two.JPG", "three.TiFF"):
        save(tmp_path / name)
    for name in ("notes.txt", "paper.pdf", "._one.png", "clip.mpg"):
        (tmp_path / name).write_bytes(b"x")
    data = load_examples(str(tmp_path), "train")
    assert names_of(data) == ["one.png", "three.TiFF", "two.JPG"]
    assert "label" not in data.column_names
    assert ImageDataset(data, (8, 8)).labels is None
    assert {".png", ".jpg", ".webp"} <= EXTENSIONS


def test_photographs_that_cannot_be_read_are_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sources, "EXTENSIONS", EXTENSIONS - sources.HEIC)  # as without pillow-heif
    monkeypatch.setattr(sources, "UNREAD", sources.UNREAD | sources.HEIC)
    for name in ("1.HEIC", "sub/2.heic", "3.nef", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        FileNotFoundError,
        match=r"no images in .*, but 2 \.heic, 1 \.nef files, .*; convert them to JPEG, or pip install pillow-heif",
    ):
        load_examples(str(tmp_path), "train")
    save(tmp_path / "4.png")
    assert len(load_examples(str(tmp_path), "train")) == 1
    (record,) = caplog.records
    assert record.message.endswith(
        "since such files are not read: 2 .heic, 1 .nef; convert them to JPEG, or pip install pillow-heif."
    )


def test_photographs_of_phones_are_read_where_pillow_heif_is_installed(tmp_path, caplog):
    for name in ("1.HEIC", "2.heif"):
        save(tmp_path / name, "red")
    (tmp_path / "3.nef").write_bytes(b"x")
    images = ImageDataset(load_examples(str(tmp_path), "train"), (8, 8))
    batch = images.__getitems__([(0, 0), (0, 1)])
    assert not batch["bad"]
    assert (batch["pixel_values"].float().mean(dim=(2, 3)) - torch.tensor([255.0, 0, 0])).abs().max() < 8
    (record,) = caplog.records
    assert record.message.endswith("since such files are not read: 1 .nef; convert them to JPEG.")


def test_class_folders_of_any_depth(tmp_path):
    for name in ("cat/1.png", "cat/deep/er/2.png", "ape/3.png"):
        save(tmp_path / name)
    data = load_examples(str(tmp_path), "train")
    assert data.features["label"].names == ["ape", "cat"]
    assert list(data["label"]) == [0, 1, 1]
    save(tmp_path / "stray.png")
    assert "label" not in load_examples(str(tmp_path), "train").column_names


def test_a_split_may_be_any_sub_folder(tmp_path):
    for name in ("cats/tabby/1.png", "cats/tiger/2.png", "dogs/3.png"):
        save(tmp_path / name)
    assert load_examples(str(tmp_path), "cats").features["label"].names == ["tabby", "tiger"]
    assert "label" not in load_examples(str(tmp_path), "dogs").column_names


def test_train_and_val_folders_number_classes_alike(tmp_path):
    for name in ("Train/a/1.png", "Train/b/2.png", "Train/c/3.png", "val/a/4.png", "val/c/5.png"):
        save(tmp_path / name)
    assert list(load_examples(str(tmp_path), "train")["label"]) == [0, 1, 2]
    for split in ("validation", "val"):
        assert list(load_examples(str(tmp_path), split)["label"]) == [0, 2]
    with pytest.raises(ValueError, match=r"split.*'extra'"):
        load_examples(str(tmp_path), "extra")


def test_a_validation_folder_of_any_name_holds_no_training_images(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "eval/a/3.png", "eval/b/4.png"):
        save(tmp_path / name)
    data = str(tmp_path)
    assert len(load_examples(data, "train")) == 4  # two classes, for all that is known
    train, validation = load_examples(data, "train", validation_split="eval"), load_validation(data, "eval")
    for split, names in ((train, "12"), (validation, "34")):
        assert [Path(image["path"]).stem for image in split["image"]] == list(names)
        assert split.features["label"].names == ["a", "b"]
    (tmp_path / "train").rename(tmp_path / "other")
    with pytest.raises(ValueError, match="no validation split, which is a folder eval beside train"):
        load_validation(data, "eval")


def test_what_lies_beside_the_splits_is_seen_or_named(tmp_path, caplog):
    for name in ("train/1.png", "2.png"):
        save(tmp_path / name)
    assert len(load_examples(str(tmp_path), "train")) == 2  # a folder that happens to have that name
    save(tmp_path / "val/3.png")
    save(tmp_path / "more/4.png")
    caplog.clear()
    assert len(load_examples(str(tmp_path), "train")) == 1
    assert "since they lie beside train: 1 images, the folder 'more'" in caplog.text
    caplog.clear()
    assert len(load_examples(str(tmp_path), "validation")) == 1
    assert not caplog.text


@pytest.mark.parametrize("name", ["train", "test"])
def test_train_and_test_may_be_classes(tmp_path, name):
    for folder in (name, "car", "ship"):
        save(tmp_path / folder / "1.png")
    data = load_examples(str(tmp_path), "train")
    assert data.features["label"].names == sorted([name, "car", "ship"])
    assert load_validation(str(tmp_path)) is None


def test_a_validation_split_may_be_missing_only_where_it_is_asked_for_so(tmp_path):
    rows = parquet(tmp_path / "rows", {"image": [IMAGE]}, image=datasets.Image())
    save(tmp_path / "flat/1.png")
    save(tmp_path / "alone/val/a/1.png")
    for data in (rows, str(tmp_path / "flat"), str(tmp_path / "alone")):
        assert load_validation(data) is None
        with pytest.raises(
            ValueError, match=r"has the splits train, got .validation.|no validation split, which is a folder"
        ):
            load_examples(data, "validation")
        with pytest.raises(ValueError, match=r"got .other.|is a folder other beside train"):
            load_validation(data, "other")
    save(tmp_path / "alone/train/a/2.png")
    assert len(load_validation(str(tmp_path / "alone"))) == 1


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    save(tmp_path / "elsewhere" / "1.png")
    save(tmp_path / "set" / "cat" / "2.png")
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "cat" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "cat" / "broken.png").symlink_to(tmp_path / "gone.png")
    data = load_examples(str(tmp_path / "set"), "train")
    assert names_of(data) == ["1.png", "2.png"]
    assert data.features["label"].names == ["cat", "dog"]


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="data: there are no images"):
        load_examples(str(tmp_path), "train")
    file = save(tmp_path / "file.png")
    for name in (str(tmp_path / "gone"), "./gone", "~nobody/gone", "a/b/c", "C:\\gone", "some\\gone", str(file)):
        with pytest.raises(FileNotFoundError, match="data: there is no folder"):
            load_examples(name, "train")
    with pytest.raises(FileNotFoundError, match="data: 'not a name' is neither"):
        load_examples("not a name", "train")
    with pytest.raises(ValueError, match="data is empty"):
        load_examples("", "train")
    with pytest.raises(ValueError, match="streaming"):
        load_examples(str(tmp_path), "train", streaming=True)


def test_a_folder_called_photos_is_not_the_embedded_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(load_examples("photos", "train"))
    save(tmp_path / "photos/a.png")
    with pytest.raises(ValueError, match=r"'\./photos' is the folder that is here"):
        load_examples("photos", "train")
    assert len(load_examples("./photos", "train")) == 1


def test_a_hub_data_set_may_have_configurations(monkeypatch):
    asked = []

    def load_dataset(name, config=None, streaming=False):
        asked.append((name, config))
        if config is None:
            raise ValueError("Config name is missing. Please pick one among the available configs: ['160px']")
        return {"train": datasets.Dataset.from_dict({"image": [IMAGE]}, datasets.Features(image=datasets.Image()))}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_examples("org/set:160px", "train")) == 1
    with pytest.raises(ValueError, match=r"as org/set:CONFIGURATION \(.*'160px'"):
        load_examples("org/set", "train")
    assert asked == [("org/set", "160px"), ("org/set", None)]
    assert hub_id("org/set:160px") == "org/set"


@pytest.mark.parametrize(
    ("train", "validation", "reason"),
    [
        ([0, 1], [1, 0], None),
        ([0, 1], None, "no validation split"),
        (None, [0, 1], "the training split has no labels"),
        ([0, 1], [0, -1], "labels of the validation split are not all class numbers"),
        ([0, None], [0, 1], "labels of the training split are not all class numbers"),
    ],
)
def test_what_cannot_be_probed(train, validation, reason):
    splits = [
        None
        if labels is None and split == "validation"
        else datasets.Dataset.from_dict({"image": ["x", "y"]} if labels is None else {"label": labels})
        for split, labels in (("train", train), ("validation", validation))
    ]
    found = why_not_probed(*splits)
    assert found is None if reason is None else reason in found


def test_splits_with_other_classes_cannot_be_probed(tmp_path):
    for split, name in (("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "emu")):
        save(tmp_path / f"set/{split}/{name}/{name}.png")
    splits = [load_examples(str(tmp_path / "set"), split) for split in ("train", "validation")]
    assert "not in both: emu" in why_not_probed(*splits)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_folder(tmp_path, streaming):
    features = {
        "photo": datasets.Image(),
        "name": datasets.Value("string"),
        "kind": datasets.ClassLabel(names=["a", "b"]),
    }
    photos = [{"bytes": b"broken", "path": None}, encoded(Image.fromarray(noise()), "JPEG")]  # neither may be decoded
    rows = {"photo": photos, "name": ["x", "y"], "kind": [1, 0]}
    folder = parquet(tmp_path / "set", rows, **features)
    with pytest.raises(ValueError, match="has the splits train, got 'validation'"):
        load_examples(folder, "validation", streaming)
    parquet(tmp_path / "set", rows, split="test", **features)
    for split in ("train", "validation", "test"):
        data = load_examples(folder, split, streaming)
        assert [example["label"] for example in data] == [1, 0]
        assert [example["image"]["bytes"] for example in data] == [photo["bytes"] for photo in photos]
        assert set(data.features) == {"image", "label"}
    with pytest.raises(ValueError, match=r"train, test, got 'train\[:10%\]'"):
        load_examples(folder, "train[:10%]", streaming)
    with pytest.raises(ValueError, match=r"image_column: .*photo, name, kind, got 'image'"):
        load_examples(folder, "train", streaming, image_column="image")
    with pytest.raises(ValueError, match=r"label_column: .*got 'class'"):
        load_examples(folder, "train", streaming, label_column="class")
    assert set(load_examples(folder, "train", streaming, label_column="kind").features) == {"image", "label"}


def test_labels_of_other_types(tmp_path):
    numbers = parquet(
        tmp_path / "n", {"image": [IMAGE], "label": [7]}, image=datasets.Image(), label=datasets.Value("int32")
    )
    assert ImageDataset(load_examples(numbers, "train"), (8, 8)).labels.tolist() == [7]

    text = {"image": datasets.Image(), "label": datasets.Value("string")}
    folder = parquet(tmp_path / "t", {"image": [IMAGE] * 3, "label": ["cat", "ape", "dog"]}, **text)
    parquet(tmp_path / "t", {"image": [IMAGE] * 2, "label": ["dog", "cat"]}, split="validation", **text)
    assert list(load_examples(folder, "train")["label"]) == [1, 0, 2]
    assert list(load_examples(folder, "validation")["label"]) == [2, 1]
    with pytest.raises(ValueError, match=r"label_column.*streaming"):
        load_examples(folder, "train", streaming=True)

    several = {"image": datasets.Image(), "label": datasets.List(datasets.Value("int64"))}
    folder = parquet(tmp_path / "m", {"image": [IMAGE], "label": [[1, 2]]}, **several)
    assert load_examples(folder, "train").column_names == ["image"]  # such images can still be learned from
    with pytest.raises(ValueError, match="label_column: 'label' must hold one class"):
        load_examples(folder, "train", label_column="label")


def test_parquet_without_images_or_rows(tmp_path):
    folder = parquet(tmp_path / "none", {"label": [1]}, label=datasets.Value("int64"))
    with pytest.raises(ValueError, match="no column of images among label; name it with image_column"):
        load_examples(folder, "train")
    with pytest.raises(ValueError, match="data holds no images"):
        ImageDataset(examples(1).select([]), (8, 8))


def labelled(folder, split, labels, names=None):
    """A parquet file of a split, whose labels are classes of these names, or numbers."""
    rows = {"image": [encoded(Image.new("RGB", (8, 8)), "PNG")] * len(labels), "label": labels}
    kind = datasets.Value("int64") if names is None else datasets.ClassLabel(num_classes=max(labels) + 1)
    path = parquet(folder, rows, split, image=datasets.Image(), label=kind)
    if names is not None:  # datasets itself would not write a label beyond its names
        file = folder / f"{split}.parquet"
        table = pq.read_table(file)
        features = datasets.Features.from_arrow_schema(table.schema) | {"label": datasets.ClassLabel(names=names)}
        pq.write_table(table.cast(datasets.Features(features).arrow_schema), file)
    return path


@pytest.mark.parametrize("theirs", [["x", "y", "z"], ["b", "a"]])
def test_splits_whose_files_name_other_classes_are_not_probed(tmp_path, theirs):
    labelled(tmp_path / "set", "train", [0, 1], ["a", "b"])
    data = labelled(tmp_path / "set", "validation", [0, len(theirs) - 1], theirs)
    train, validation = load_examples(data, "train"), load_examples(data, "validation")
    assert validation.features["label"].names == theirs
    assert "the splits have different classes" in why_not_probed(train, validation)
    assert why_not_probed(train, train) is None


def test_files_of_one_split_that_name_different_classes_are_refused(tmp_path):
    labelled(tmp_path / "set", "train-00000-of-00002", [0, 1], ["a", "b"])
    data = labelled(tmp_path / "set", "train-00001-of-00002", [0, 1], ["x", "y"])
    with pytest.raises(ValueError, match=r"train-00000.* and .*train-00001.* name different classes"):
        load_examples(data, "train")


@pytest.mark.parametrize(
    ("labels", "names", "fault"),
    [
        ([0, 2], ["a", "b"], "the label of image 1 is 2, and there are 2 classes"),
        ([10**12, 0], None, "the label of image 0 is 1,000,000,000,000, and there are at most 1,000,000 classes"),
    ],
)
def test_labels_beyond_the_classes_are_told(tmp_path, labels, names, fault):
    train = load_examples(labelled(tmp_path / "set", "train", labels, names), "train")
    assert label_fault(train) == fault
    assert f"of the training split, {fault}; choose another --label_column" in why_not_probed(train, train)
    with pytest.raises(ValueError, match=f"class_conditional: {fault}"):
        count_classes(train)
    assert label_fault(train, num_classes=10**13) is None


def test_numbers_that_no_label_can_be_are_told():
    data = datasets.Dataset.from_dict({"label": np.array([2**64 - 1], np.uint64)})
    with pytest.raises(ValueError, match=f"label_column: .*{2**64 - 1}"):
        label_array(data)


def test_names_that_are_no_utf_8_are_read_as_any_other(tmp_path):
    folder = os.fsencode(tmp_path)
    for name in (b"one/caf\xe9.png", b"one/a b'%41.png", "two/日本.png".encode(), b"d\xfcr/line\nbreak.png"):
        save(Path(os.fsdecode(folder + b"/" + name)), "red")
    examples = load_examples(str(tmp_path), "train")
    assert examples.features["label"].names == [r"d\udcfcr", "one", "two"]
    images = ImageDataset(examples, (8, 8))
    batch = images.__getitems__([(0, index) for index in range(4)])
    assert batch["bad"] == []
    assert (batch["pixel_values"][:, 0] == 255).all()
    assert sum(name.endswith("/one/caf%E9.png") for name in batch["name"]) == 1
    assert len(images.fingerprint()) == 16


def test_output_inside_the_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in (
        ["--data", "."],
        ["--data", str(tmp_path), "--output_dir", "new"],
        ["--data", ".", "--output_dir", "."],
    ):
        with pytest.raises(ValueError, match=r"--output_dir .* lies in the folder of --data"):
            parse_arguments(given)
    parse_arguments(["--data", ".", "--output_dir", str(tmp_path.parent / "new")])
