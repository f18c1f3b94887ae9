"""Data: whatever files users have, and an order of images that depends on (seed, step) alone."""

import io
import itertools
import pickle

import datasets
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldae.data import photos
from ldae.data.images import ImageDataset, decode
from ldae.data.order import StepSampler, evaluation_loader, refill, to_pixel_values, training_loader
from ldae.data.sources import EXTENSIONS, hub_id, load_examples, why_not_probed

RNG = np.random.default_rng(0)


def noise(height: int = 20, width: int = 30, channels: int | None = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels) if channels else (height, width), dtype=np.uint8)


def save(path, colour=None, **options):
    """Writes an image of one colour, or of noise, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(noise()) if colour is None else Image.new("RGB", (30, 20), colour)
    image.save(path, **options)
    return path


def encoded(image: Image.Image, file_format: str, **options) -> dict:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return {"bytes": stream.getvalue(), "path": f"image.{file_format}"}


def examples(count: int, label: int = 0) -> datasets.Dataset:
    """`count` images of noise, undecoded, as `load_examples` gives them."""
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))
    rows = {"image": [encoded(Image.fromarray(noise()), "PNG") for _ in range(count)], "label": [label] * count}
    return datasets.Dataset.from_dict(rows, features=features)


def parquet(folder, rows: dict, split: str = "train", **features):
    """A folder of one parquet file, as on the Hub."""
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(**features)).to_parquet(folder / f"{split}.parquet")
    return str(folder)


class Numbers:
    """As much of `Images` as a sampler looks at."""

    streaming = False

    def __init__(self, n: int, seed: int = 0):
        self.n, self.seed = n, seed

    def __len__(self) -> int:
        return self.n


# ---------------------------------------------------------------------------------------------------------------- order


@example(n=7, share=1, accumulation=2, start=3)
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 40), share=st.integers(1, 5), accumulation=st.integers(1, 3), start=st.integers(0, 8))
def test_order_is_the_same_for_any_number_of_processes_and_after_a_resume(n, share, accumulation, start):
    def keys(world, start, batch_size, accumulation):
        ranks = [StepSampler(Numbers(n), start, 9, batch_size, accumulation, r, world) for r in range(world)]
        assert all(len(list(rank)) == len(rank) for rank in ranks)
        return [key for batches in zip(*ranks, strict=True) for batch in batches for key in batch]

    whole = keys(1, 0, 6 * share * accumulation, 1)
    for world in (1, 2, 3):
        batch_size = 6 * share // world
        assert keys(world, 0, batch_size, accumulation) == whole
        assert keys(world, start, batch_size, accumulation) == whole[start * 6 * share * accumulation :]
    for epoch, group in itertools.groupby(whole, key=lambda key: key[0]):
        indices = [index for _, index in group]
        assert len(set(indices)) == len(indices)
        assert set(indices) <= set(range(n))
        assert len(indices) == n or epoch == whole[-1][0]  # only the last epoch may be cut


def test_epochs_and_seeds_have_their_own_orders():
    def order(seed):
        return [index for batch in StepSampler(Numbers(50, seed), 0, 4, 25) for _, index in batch]

    assert order(0)[:50] != order(0)[50:]
    assert order(0) != order(1)
    assert order(0)[:50] != list(range(50))


@pytest.mark.parametrize("crop", ["center", "random", "random_resized"])
def test_workers_and_batches_do_not_change_images(crop):
    data = examples(7)

    def batches(num_workers, **sampling):
        images = ImageDataset(data, (16, 16), crop=crop, flip=True, seed=3)
        return list(training_loader(StepSampler(images, **sampling), num_workers))

    alone, shared = batches(0, start=0, stop=6, batch_size=4), batches(2, start=0, stop=6, batch_size=4)
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"])
    (second,) = batches(0, start=1, stop=2, batch_size=2, rank=1, world=2)
    assert torch.equal(second["pixel_values"], alone[1]["pixel_values"][2:])


def test_images_vary_with_epoch_and_seed_and_leave_the_global_generator_alone():
    data = examples(1)
    state = torch.get_rng_state()
    images = ImageDataset(data, (16, 16), crop="random_resized", flip=True)
    values = [images[(epoch, 0)]["pixel_values"] for epoch in (0, 0, 1)]
    other = ImageDataset(data, (16, 16), crop="random_resized", flip=True, seed=1)[(0, 0)]["pixel_values"]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert not torch.equal(values[0], other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("crop", ["center", "random", "random_resized"])
def test_loader_can_be_sent_to_spawned_workers(crop):
    loader = training_loader(StepSampler(ImageDataset(examples(2), (8, 8), crop=crop), 0, 1, 2), 1)
    dataset, collate_fn = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    assert collate_fn(dataset.__getitems__([(0, 0)]))["pixel_values"].shape == (1, 3, 8, 8)


def test_a_stream_resumes_and_is_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # else five seconds an epoch
    colours = [(i, 0, 0) for i in range(10)]
    rows = {"image": [encoded(Image.new("RGB", (8, 8), colour), "PNG") for colour in colours], "label": list(range(10))}
    data = parquet(tmp_path / "set", rows, image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))

    def batches(**sampling):
        images = ImageDataset(load_examples(data, "train", streaming=True), (8, 8), flip=True, seed=5)
        return list(training_loader(StepSampler(images, **sampling)))

    def labels(batches):
        return torch.cat([batch["label"] for batch in batches]).tolist()

    whole = batches(start=0, stop=6, batch_size=4)
    assert sorted(labels(whole)[:10]) == sorted(labels(whole)[10:20]) == list(range(10))
    stream = load_examples(data, "train", streaming=True).shuffle(seed=5, buffer_size=1000)
    assert labels(whole)[:10] == [example["label"] for example in stream]
    assert labels(whole)[:10] != labels(whole)[10:20]  # epochs differ
    assert [round(float(x[0, 0, 0])) for batch in whole for x in batch["pixel_values"]] == labels(whole)
    assert labels(batches(start=2, stop=6, batch_size=4)) == labels(whole)[8:]
    halves = [batches(start=0, stop=6, batch_size=2, rank=rank, world=2) for rank in (0, 1)]
    assert [x for pair in zip(*halves, strict=True) for x in labels(pair)] == labels(whole)

    loader = evaluation_loader(ImageDataset(load_examples(data, "train", streaming=True), (8, 8)), 4)
    for _ in range(2):  # a loader can be read again
        assert labels(loader) == list(range(10))


# ------------------------------------------------------------------------------------------------------------- decoding


def pixels(image: dict, num_channels: int = 3) -> np.ndarray:
    return np.asarray(decode(image, num_channels)).astype(int)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    alpha = alpha[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


def test_decode_grey():
    grey = noise(channels=None)
    image = encoded(Image.fromarray(grey), "PNG")
    assert (pixels(image) == grey[..., None]).all()
    assert (pixels(image, 1) == grey).all()
    assert (pixels(image, 4)[..., 3] == 255).all()


def test_decode_puts_transparency_on_white_or_keeps_it_as_the_fourth_channel():
    rgba = noise(channels=4)
    image = encoded(Image.fromarray(rgba), "PNG")
    assert (pixels(image, 4) == rgba).all()
    assert np.abs(pixels(image) - over_white(rgba[..., :3], rgba[..., 3])).max() <= 1
    grey_alpha = noise(channels=2)
    image = encoded(Image.fromarray(grey_alpha, "LA"), "PNG")
    assert np.abs(pixels(image) - over_white(grey_alpha[..., :1], grey_alpha[..., 1])).max() <= 1
    assert np.abs(pixels(image, 1)[..., None] - over_white(grey_alpha[..., :1], grey_alpha[..., 1])).max() <= 1


def test_decode_palette_with_transparency():
    palette = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image = encoded(palette, "PNG", transparency=1)
    expected = [[[10, 20, 30], [255, 255, 255]], [[70, 80, 90], [10, 20, 30]]]
    assert pixels(image).tolist() == expected


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_decode_16_bit_grey_keeps_its_range(file_format):
    values = np.array([[0, 256, 32896, 65535]], np.uint16)
    assert pixels(encoded(Image.fromarray(values), file_format), 1).tolist() == [[0, 1, 128, 255]]


def test_decode_cmyk_jpeg():
    image = encoded(Image.new("CMYK", (16, 16), (255, 0, 51, 0)), "JPEG", quality=100)
    assert np.abs(pixels(image) - [0, 255, 204]).max() <= 3


def test_decode_turns_images_upright_by_exif():
    image = Image.new("RGB", (32, 16), "red")
    image.paste("blue", (0, 0, 16, 16))  # blue left of red; turned clockwise, blue is above red
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = pixels(encoded(image, "JPEG", exif=exif, quality=100, subsampling=0))
    assert upright.shape == (32, 16, 3)
    assert np.abs(upright[4, 8] - [0, 0, 255]).max() < 10
    assert np.abs(upright[28, 8] - [255, 0, 0]).max() < 10


def test_decode_takes_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    image = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(image["bytes"])).n_frames == 2
    assert (pixels(image) == [255, 0, 0]).all()


# ----------------------------------------------------------------------------------------------------- unreadable files


@pytest.fixture
def bad_folder(tmp_path, monkeypatch):
    """Two good images and five that cannot be read."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    for name in ("a_good.png", "z_good.png"):
        save(tmp_path / name, "red")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    whole = save(tmp_path / "truncated.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    Image.new("L", (1, 1000)).save(tmp_path / "strip.png")  # small, but not once its short side is enlarged
    return tmp_path


BAD = ("bomb.png", "empty.png", "strip.png", "text.jpg", "truncated.jpg")


def test_unreadable_files_are_named_and_left_out_or_refilled(bad_folder):
    images = ImageDataset(load_examples(str(bad_folder), "train"), (16, 16))
    (batch,) = evaluation_loader(images, 10)
    assert len(batch["pixel_values"]) == len(batch["label"]) == len(batch["name"]) == 2
    assert all(name in bad for name, bad in zip(BAD, batch["bad"], strict=True))
    (refilled,) = training_loader(StepSampler(images, 0, 1, 7))
    assert refilled["pixel_values"].shape == (7, 3, 16, 16)
    assert len(refilled["bad"]) == 5
    assert (refilled["pixel_values"][:, 0] == 255).all()  # only the good ones, which are red


def test_a_batch_without_a_readable_image(bad_folder):
    images = ImageDataset(load_examples(str(bad_folder), "train"), (16, 16))
    left = images.__getitems__([(0, i) for i in range(1, 6)])
    with pytest.raises(ValueError, match=r"none of a batch's 5 images can be read.*bomb.png"):
        refill(left)
    assert left["pixel_values"] is None
    assert left["label"].dtype == torch.long
    assert len(left["bad"]) == 5


def test_rows_without_a_image_or_label_are_no_disaster(tmp_path):
    rows = {"image": [encoded(Image.new("RGB", (8, 8)), "PNG"), None], "label": [None, 1]}
    data = parquet(tmp_path / "set", rows, image=datasets.Image(), label=datasets.ClassLabel(num_classes=2))
    images = ImageDataset(load_examples(data, "train"), (8, 8))
    assert images.labels.tolist() == [-1, 1]
    assert len(images.fingerprint()) == 16
    (batch,) = evaluation_loader(images, 2)
    assert batch["label"].tolist() == [-1]
    assert "image 1" in batch["bad"][0]


# -------------------------------------------------------------------------------------------------------------- folders


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
    assert load_examples(str(tmp_path), "validation") is None
    assert {".png", ".jpg", ".webp"} <= EXTENSIONS


def test_class_folders_of_any_depth(tmp_path):
    for name in ("cat/1.png", "cat/deep/er/2.png", "ape/3.png"):
        save(tmp_path / name)
    data = load_examples(str(tmp_path), "train")
    assert data.features["label"].names == ["ape", "cat"]
    assert list(data["label"]) == [0, 1, 1]
    save(tmp_path / "stray.png")
    assert "label" not in load_examples(str(tmp_path), "train").column_names


def test_train_and_val_folders_number_classes_alike(tmp_path):
    for name in ("Train/a/1.png", "Train/b/2.png", "Train/c/3.png", "val/a/4.png", "val/c/5.png"):
        save(tmp_path / name)
    assert list(load_examples(str(tmp_path), "train")["label"]) == [0, 1, 2]
    for split in ("validation", "val"):
        assert list(load_examples(str(tmp_path), split)["label"]) == [0, 2]
    with pytest.raises(ValueError, match=r"split.*'extra'"):
        load_examples(str(tmp_path), "extra")


@pytest.mark.parametrize("name", ["train", "test"])
def test_train_and_test_may_be_classes(tmp_path, name):
    for folder in (name, "car", "ship"):
        save(tmp_path / folder / "1.png")
    data = load_examples(str(tmp_path), "train")
    assert data.features["label"].names == sorted([name, "car", "ship"])
    assert load_examples(str(tmp_path), "validation") is None


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


# -------------------------------------------------------------------------------------------------------------- parquet

IMAGE = encoded(Image.new("RGB", (8, 8)), "PNG")


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_folder(tmp_path, streaming):
    features = {
        "photo": datasets.Image(),
        "name": datasets.Value("string"),
        "kind": datasets.ClassLabel(names=["a", "b"]),
    }
    rows = {"photo": [IMAGE, IMAGE], "name": ["x", "y"], "kind": [1, 0]}
    folder = parquet(tmp_path / "set", rows, **features)
    assert load_examples(folder, "validation", streaming) is None
    parquet(tmp_path / "set", rows, split="test", **features)
    for split in ("train", "validation", "test"):
        data = load_examples(folder, split, streaming)
        assert [example["label"] for example in data] == [1, 0]
        assert all(example["image"]["bytes"] == IMAGE["bytes"] for example in data)
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


# ---------------------------------------------------------------------------------------------------------------- crops


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 90), width=st.integers(1, 90), target=st.tuples(st.integers(1, 40), st.integers(1, 40))
)  # fmt: skip
def test_center_crop_is_the_middle_of_the_resized_image(height, width, target):
    array = np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = datasets.Dataset.from_dict({"image": [encoded(Image.fromarray(array), "PNG")]})
    cropped = ImageDataset(data, target)[(0, 0)]["pixel_values"]

    scale = max(target[0] / height, target[1] / width)
    full = max(target[0], round(scale * height)), max(target[1], round(scale * width))
    resized = Image.fromarray(array).resize(full[::-1], Image.Resampling.BICUBIC)
    top, left = (round((a - b) / 2) for a, b in zip(full, target, strict=True))
    expected = np.asarray(resized.crop((left, top, left + target[1], top + target[0])))
    assert (cropped.permute(1, 2, 0).numpy() == expected).all()


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    target=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    crop=st.sampled_from(["random", "random_resized"]),
    channels=st.sampled_from([1, 3, 4]),
)
def test_random_crops_have_the_right_shape(height, width, target, crop, channels):
    data = datasets.Dataset.from_dict({"image": [encoded(Image.new("RGB", (width, height), "white"), "PNG")]})
    item = ImageDataset(data, target, channels, crop, flip=True)[(0, 0)]
    assert item["pixel_values"].shape == (channels, *target)
    assert item["pixel_values"].dtype == torch.uint8
    assert (item["pixel_values"] >= 254).all()


def test_flips_mirror_half_of_the_images():
    gradient = np.broadcast_to(np.arange(16, dtype=np.uint8)[None, :], (16, 16))
    data = datasets.Dataset.from_dict({"image": [encoded(Image.fromarray(gradient), "PNG")] * 64})
    flipped, plain = ImageDataset(data, (16, 16), 1, flip=True), ImageDataset(data, (16, 16), 1)
    first = np.array([int(flipped[(0, i)]["pixel_values"][0, 0, 0]) for i in range(64)])
    assert set(first) == {0, 15}
    assert 16 < (first == 15).sum() < 48
    assert {int(plain[(0, i)]["pixel_values"][0, 0, 0]) for i in range(64)} == {0}


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"crop must be .* got 'middle'"):
        ImageDataset(examples(1), (8, 8), crop="middle")
    with pytest.raises(ValueError, match=r"num_channels must be .* got 2"):
        ImageDataset(examples(1), (8, 8), num_channels=2)


def test_cache_gives_what_decoding_gives(monkeypatch):
    data = examples(3)
    cached = ImageDataset(data, (8, 8))
    monkeypatch.setattr("ldae.data.images.CACHE_BYTES", 0)
    fresh = ImageDataset(data, (8, 8))
    assert (cached.cache is None, fresh.cache is None) == (False, True)
    for index in (0, 1, 0, 2):
        assert torch.equal(cached[(0, index)]["pixel_values"], fresh[(0, index)]["pixel_values"])


def test_pixel_values_span_minus_one_to_one():
    assert to_pixel_values(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


# -------------------------------------------------------------------------------------------------- photos, fingerprint


def test_photos_share_no_pixel_between_the_splits(monkeypatch):
    monkeypatch.setattr(photos, "PHOTOGRAPHS", photos.PHOTOGRAPHS[::6])  # some of them, for speed

    def crops(split):
        return [decode(image, 3).tobytes() for image in load_examples("photos", split)["image"]]

    before = {split: crops(split) for split in photos.CROPS}
    assert {split: len(images) for split, images in before.items()} == {"train": 3 * 128, "validation": 3 * 40}

    def repaint(validation: bool):
        """Replaces the validation region of every photograph, or all but it."""
        original = Image.open

        def altered(source):
            if isinstance(source, io.BytesIO):  # a crop
                return original(source)
            array = np.array(original(source).convert("RGB"))
            edge = array.shape[1] * 2 // 3
            part = array[:, edge:] if validation else array[:, :edge]
            part[:] = 255 - part
            return Image.fromarray(array)

        return altered

    for split, other in (("train", True), ("validation", False)):
        with monkeypatch.context() as patch:
            patch.setattr(photos.Image, "open", repaint(validation=other))
            assert sum(a != b for a, b in zip(crops(split), before[split], strict=True)) == 0
        assert crops(split) == before[split]  # the same every time
    with pytest.raises(ValueError, match=r"photos.*got 'test'"):
        load_examples("photos", "test")


def test_fingerprint_changes_with_images_labels_and_number(tmp_path):
    save(tmp_path / "1.png", "red")
    save(tmp_path / "2.png", "blue")

    def fingerprint():
        return ImageDataset(load_examples(str(tmp_path), "train"), (8, 8)).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    save(tmp_path / "2.png", "green")
    changed = fingerprint()
    save(tmp_path / "3.png", "green")
    assert len({first, changed, fingerprint()}) == 3
    one = examples(2)
    relabelled = one.map(lambda example: {"label": 1})
    assert ImageDataset(one, (8, 8)).fingerprint() != ImageDataset(relabelled, (8, 8)).fingerprint()
