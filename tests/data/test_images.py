"""Images of any kind are decoded to what they look like; unreadable ones are named and left out."""

import io
import itertools
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import encoded, examples, noise, parquet, save
from PIL import Image
from torchvision.transforms import v2

from ldae.data.images import ImageDataset, decode
from ldae.data.order import StepSampler, evaluation_loader, refill, training_loader
from ldae.data.sources import load_examples


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


def test_decode_turns_photographs_of_phones_upright_once():
    image = Image.fromarray(np.repeat(np.arange(0, 240, 8, np.uint8)[:, None], 40, axis=1)).convert("RGB")  # (30, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg, heic = (pixels(encoded(image, name, exif=exif.tobytes(), quality=100)) for name in ("JPEG", "HEIF"))
    assert heic.shape == (40, 30, 3)
    assert np.abs(heic - jpeg).max() < 8


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


def test_pixel_values_are_of_readable_images_alone(bad_folder):
    images = ImageDataset(load_examples(str(bad_folder), "train"), (8, 8))
    index = next(i for i in range(len(images)) if "error" not in images[0, i])
    values = images.pixel_values([index, index])
    assert values.shape == (2, 3, 8, 8)
    torch.testing.assert_close(values[1], images[0, index]["pixel_values"] / 127.5 - 1)
    with pytest.raises(ValueError, match="unreadable image: "):
        images.pixel_values(range(len(images)))


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


def test_paths_of_a_data_set_lead_to_files_in_its_folder_only(tmp_path):
    data, outside = tmp_path / "set", save(tmp_path / "outside.png", "red")
    inside = save(data / "below/inside.png", "red")
    os.mkfifo(data / "pipe.png")
    (data / "link.png").symlink_to(outside)
    good = ["below/inside.png", str(inside)]
    bad = ["pipe.png", "below", "/dev/zero", "missing.png", str(outside), "../outside.png", "link.png", None]
    rows = [{"bytes": None, "path": path} for path in good + bad] + [None]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"picture": pa.array(rows, kind)}), data / "train.parquet")
    images = ImageDataset(load_examples(str(data), "train", image_column="picture"), (8, 8))
    assert len(images.fingerprint()) == 16
    batch = images.__getitems__([(0, index) for index in range(len(rows))])
    assert batch["index"].tolist() == [0, 1]
    reasons = (
        ["device or a pipe"] * 2 + ["leads out"] + ["FileNotFoundError"] + ["leads out"] * 3 + ["neither bytes"] * 2
    )
    reasons[1] = "that of a folder"
    assert all(reason in error for reason, error in zip(reasons, batch["bad"], strict=True))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"crop must be .* got 'middle'"):
        ImageDataset(examples(1), (8, 8), crop="middle")
    with pytest.raises(ValueError, match=r"num_channels must be .* got 2"):
        ImageDataset(examples(1), (8, 8), num_channels=2)


@pytest.fixture(scope="module")
def mixed() -> datasets.Dataset:
    """Images of two sizes, and one that cannot be read."""
    sizes = [(20, 30), (20, 30), (33, 15), (20, 30), (16, 16), (20, 30)]
    rows = [encoded(Image.fromarray(noise(*size)), "PNG") for size in sizes] + [{"bytes": b"x", "path": "bad"}]
    return datasets.Dataset.from_dict({"image": rows})


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=12),
    crop=st.sampled_from(["center", "random", "random_resized"]),
    seed=st.integers(0, 2),
    augment=st.booleans(),
)
def test_an_image_is_the_same_in_any_batch(mixed, keys, crop, seed, augment):
    """In any order, beside any others, whether it is read from the cache or decoded, and also after other batches."""

    def made() -> ImageDataset:
        images = ImageDataset(mixed, (16, 16), crop=crop, flip=True, seed=seed)
        images.augment = v2.GaussianNoise(sigma=0.2) if augment else None
        return images

    images, readable = made(), [key for key in keys if key[1] != 6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldae.data.images.CACHE_BYTES", 0)
        uncached = made()
    assert uncached.cache is None
    for _ in range(2):  # the second time from the cache
        batch = images.__getitems__(keys)
        assert len(batch["bad"]) == len(keys) - len(readable)
        assert batch["index"].tolist() == [index for _, index in readable]
        assert (batch["pixel_values"] is None) == (not readable)
        for key, pixel_values in zip(readable, batch["pixel_values"] if readable else (), strict=True):
            assert torch.equal(pixel_values, uncached[key]["pixel_values"])


def test_what_an_augmentation_draws_varies_with_seed_epoch_and_index_alone():
    data = datasets.Dataset.from_dict({"image": [encoded(Image.new("RGB", (8, 8), "grey"), "PNG")] * 2})
    state = torch.get_rng_state()

    def augmented(seed: int, *keys: tuple[int, int]) -> list[list]:
        images = ImageDataset(data, (8, 8), seed=seed)
        images.augment = v2.GaussianNoise(sigma=0.2)
        return images.__getitems__(list(keys))["pixel_values"].tolist()

    values = augmented(0, (0, 0), (0, 1), (1, 0)) + augmented(1, (0, 0))
    assert all(a != b for a, b in itertools.combinations(values, 2))
    assert augmented(0, (1, 0)) == values[2:3]
    assert torch.equal(state, torch.get_rng_state())


def test_random_crops_of_images_of_one_size_are_decoded_once(monkeypatch):
    data = examples(5)
    for crop in ("center", "random", "random_resized"):
        images = ImageDataset(data, (16, 16), crop=crop, flip=True)
        first = images.__getitems__([(0, i) for i in range(5)])["pixel_values"]
        with monkeypatch.context() as patch:
            patch.setattr("ldae.data.images.decode", lambda *args: pytest.fail("an image was decoded again"))
            again = images.__getitems__([(0, i) for i in (4, 3, 2, 1, 0)])["pixel_values"]
        assert torch.equal(again.flip(0), first)


def test_images_are_named_by_their_files_or_numbers(tmp_path):
    rows = [encoded(Image.new("RGB", (8, 8)), "PNG") for _ in range(3)]
    rows[1]["path"], rows[2] = None, None
    data = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features(image=datasets.Image(decode=False)))
    images = ImageDataset(data.select([2, 0, 1]), (8, 8))
    assert images.names([2, 0, 1]) == ["image 2", "image 0", "image.PNG"]
    save(tmp_path / "1.png")
    assert ImageDataset(load_examples(str(tmp_path), "train"), (8, 8)).names([0]) == [str(tmp_path / "1.png")]


def test_cache_gives_what_decoding_gives(monkeypatch):
    data = examples(3)
    cached = ImageDataset(data, (8, 8))
    monkeypatch.setattr("ldae.data.images.CACHE_BYTES", 0)
    fresh = ImageDataset(data, (8, 8))
    assert (cached.cache is None, fresh.cache is None) == (False, True)
    for index in (0, 1, 0, 2):
        assert torch.equal(cached[(0, index)]["pixel_values"], fresh[(0, index)]["pixel_values"])


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


def test_fingerprint_changes_with_images_labels_and_number(tmp_path):
    save(tmp_path / "1.png", "red")
    save(tmp_path / "2.png", "blue")

    def fingerprint():
        return ImageDataset(load_examples(str(tmp_path), "train"), (8, 8)).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    save(tmp_path / "2.png", "green")
    changed = fingerprint()
    images = ImageDataset(load_examples(str(tmp_path), "train"), (8, 8))
    (tmp_path / "2.png").unlink()
    assert images.fingerprint() not in (first, changed)  # an image that has gone is no error here
    save(tmp_path / "2.png", "green")
    assert images.fingerprint() == changed
    save(tmp_path / "3.png", "green")
    assert len({first, changed, fingerprint()}) == 3
    one = examples(2)
    relabelled = one.map(lambda example: {"label": 1})
    assert ImageDataset(one, (8, 8)).fingerprint() != ImageDataset(relabelled, (8, 8)).fingerprint()


def test_only_what_is_read_again_and_of_one_size_is_kept(tmp_path):
    one, two = (Image.new("RGB", (side, 20), "red") for side in (30, 40))
    for name, images, options, kept in (
        ("alike", [one, one], {}, True), ("once", [one, one], {"keep_in_memory": False}, False), ("mixed", [one, two], {}, False),
    ):  # fmt: skip
        for i, image in enumerate(images):
            (tmp_path / name).mkdir(exist_ok=True)
            image.save(tmp_path / name / f"{i}.png")
        examples = load_examples(str(tmp_path / name), "train")
        made = ImageDataset(examples, (8, 8), crop="random_resized", **options)
        assert (made.cache is not None) == kept
        assert made.pixel_values([0, 1]).shape == (2, 3, 8, 8)


def test_version_changes_with_any_one_image_of_other_bytes(tmp_path):
    for i in range(100):
        save(tmp_path / f"{i:03d}.png", "red")

    def made(method):
        in_files = load_examples(str(tmp_path), "train")
        held = [{"image": {"bytes": file.read_bytes(), "path": None}} for file in sorted(tmp_path.glob("*.png"))]
        in_memory = datasets.Dataset.from_list(held, in_files.features.copy())
        return [getattr(ImageDataset(examples, (8, 8)), method)() for examples in (in_files, in_memory)]

    fingerprints, versions = made("fingerprint"), made("version")
    assert made("version") == versions
    save(tmp_path / "002.png")  # which is none of the 64 images that a fingerprint looks at
    assert made("fingerprint") == fingerprints
    assert all(now != before for now, before in zip(made("version"), versions, strict=True))
    versions = made("version")
    (tmp_path / "002.png").rename(tmp_path / "002b.png")
    assert made("fingerprint") == fingerprints
    assert made("version")[0] != versions[0]
