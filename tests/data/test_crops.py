"""Crops and flips are functions of (seed, epoch, index), and cut out what Pillow and torchvision do."""

import math

import datasets
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_files import encoded
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ldae.data.crops import BatchCutter, Crop, random_bits
from ldae.data.images import ImageDataset

MANY = 10_000
SIDES = st.integers(1, 60)


def numbers(count: int = MANY) -> np.ndarray:
    return np.arange(count, dtype=np.int64)


def splitmix64(seed: int, epoch: int, index: int, count: int) -> list[int]:
    """The reference algorithm in Python's own integers."""
    mask, step = 2**64 - 1, 0x9E3779B97F4A7C15

    def output(state: int) -> int:
        z = state & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    state = output(seed + step)
    for number in (epoch, index):
        state = output((state ^ number) + step)
    return [output(state + k * step) for k in range(1, count + 1)]


# published outputs of splitmix64 for the state 1234567, by which the reference above is checked
PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_random_bits_are_those_of_splitmix64(monkeypatch):
    epochs, indices = np.array([0, 3, 10**6]), np.array([0, 7, 10**9])
    bits = random_bits(5, epochs, indices, 4)
    assert bits.tolist() == [splitmix64(5, int(e), int(i), 4) for e, i in zip(epochs, indices, strict=True)]
    assert bits.tolist() != random_bits(6, epochs, indices, 4).tolist()
    state = 1234567 + 0x9E3779B97F4A7C15
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    assert z ^ (z >> 31) == PUBLISHED[0]


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_flips_are_fair_and_places_are_uniform(seed):
    """Over images, and over the epochs of one image; each mean lies within 4 standard errors."""
    crop = Crop((64, 64), "random_resized", True, seed)
    for epochs, indices in ((np.zeros(MANY, np.int64), numbers()), (numbers(), np.full(MANY, 3))):
        uniforms, flips = crop.draw(epochs, indices)
        assert abs(flips.mean() - 0.5) < 4 * 0.5 / math.sqrt(MANY)
        assert (np.abs(uniforms.mean(axis=0) - 0.5) < 4 * math.sqrt(1 / 12 / MANY)).all()
        assert 0 <= uniforms.min() < 0.001
        assert 0.999 < uniforms.max() < 1
        # nor do neighbours or the draws of an image hang together
        columns = np.column_stack([flips, uniforms[:, :6], np.roll(uniforms[:, :1], 1)])
        correlation = np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])
        assert np.abs(correlation).max() < 5 / math.sqrt(MANY)


@settings(max_examples=60, deadline=None)
@given(
    hw=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    min_area=st.sampled_from([0.08, 0.2, 1.0]),
    seed=st.integers(0, 2**63),
)
def test_crops_lie_in_the_image_and_cover_the_documented_area(hw, min_area, seed):
    crop = Crop((32, 32), "random_resized", seed=seed, min_area=min_area)
    uniforms, _ = crop.draw(np.zeros(200, np.int64), numbers(200))
    top, left, height, width = crop.boxes(uniforms, *hw).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= hw[0]).all()
    assert (left + width <= hw[1]).all()
    if 3 / 4 <= hw[1] / hw[0] <= 4 / 3:  # else none may fit, and the largest crop of an allowed shape is taken
        assert ((height + 0.5) * (width + 0.5) >= min_area * math.prod(hw)).all()  # sides are whole pixels
    # aspects are in [3/4, 4/3], but for the rounding of sides
    assert ((width + 0.5) / (height - 0.5) >= 3 / 4).all()
    assert ((width - 0.5) / (height + 0.5) <= 4 / 3).all()


@pytest.mark.parametrize("hw", [(64, 64), (50, 90), (200, 40)])
def test_random_resized_crops_are_distributed_as_torchvisions(hw):
    crop = Crop((32, 32), "random_resized", min_area=0.2)
    ours = crop.boxes(crop.draw(np.zeros(MANY, np.int64), numbers())[0], *hw)
    theirs = v2.RandomResizedCrop((32, 32), (0.2, 1))
    image = torch.empty(1, *hw)
    drawn = [theirs.make_params([image]) for _ in range(2000)]
    for column, name in enumerate(("top", "left", "height", "width")):
        assert ks_2samp(ours[:, column], [params[name] for params in drawn]).pvalue > 1e-3, name


def test_a_window_is_anywhere_in_the_resized_image():
    crop = Crop((6, 10), "random")
    boxes = crop.boxes(crop.draw(np.zeros(2000, np.int64), numbers(2000))[0], 7, 12)
    corners, counts = np.unique(boxes[:, :2], axis=0, return_counts=True)
    assert corners.tolist() == [[top, left] for top in (0, 1) for left in (0, 1, 2)]
    assert counts.min() > 2000 / 6 - 4 * math.sqrt(2000 / 6)
    assert (boxes[:, 2:] == (6, 10)).all()


@example(hw=(64, 64), target=(64, 64), channels=3, kind="random_resized", seed=0)
@example(hw=(33, 60), target=(5, 4), channels=3, kind="random_resized", seed=0)  # many pixels become one
@settings(max_examples=60, deadline=None)
@given(
    hw=st.tuples(SIDES, SIDES),
    target=st.tuples(SIDES, SIDES),
    channels=st.sampled_from([1, 3]),
    kind=st.sampled_from(["random_resized", "random", "center"]),
    seed=st.integers(0, 9),
)
def test_batches_are_cut_as_pillow_cuts_images(hw, target, channels, kind, seed):
    """Bit for bit, on images of noise, which shows every difference of the filters.

    Both axes are rounded, the width first. torchvision may begin with the other one, and differs by up to 2 of 255.
    """
    crop = Crop(target, kind, True, seed, 0.08)
    if kind != "random_resized":
        hw = target if kind == "center" else tuple(side + seed for side in target)
    images = np.random.default_rng(seed).integers(0, 256, (4, *hw, channels), dtype=np.uint8)
    indices = np.array([2, 0, 3, 3])
    uniforms, flips = crop.draw(numbers(4), indices)
    boxes = crop.boxes(uniforms, *hw)
    with torch.autocast("cpu", torch.bfloat16):  # as around feature extraction; it must change nothing
        batch = BatchCutter(crop, torch.from_numpy(images))(indices, boxes, flips)
    for pixels, index, box, flip in zip(batch, indices, boxes, flips, strict=True):
        top, left, height, width = box.tolist()
        image = Image.fromarray(images[index].squeeze(-1) if channels == 1 else images[index])
        expected = image.crop((left, top, left + width, top + height))
        for size in ((target[1], height), target[::-1]):
            expected = expected.resize(size, Image.Resampling.BICUBIC)
        mirror = F.horizontal_flip if flip else v2.Identity()
        assert torch.equal(pixels, F.pil_to_tensor(mirror(expected)))
        assert (crop.cut(images[index], box, flip).transpose(2, 0, 1) == pixels.numpy()).all()
        theirs = F.resized_crop(F.pil_to_tensor(image), top, left, height, width, target, v2.InterpolationMode.BICUBIC)
        assert (pixels.int() - mirror(theirs).int()).abs().max() <= 2


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
    assert (item["pixel_values"] == 255).all()


def test_flips_mirror_half_of_the_images():
    gradient = np.broadcast_to(np.arange(16, dtype=np.uint8)[None, :], (16, 16))
    data = datasets.Dataset.from_dict({"image": [encoded(Image.fromarray(gradient), "PNG")] * 64})
    flipped, plain = ImageDataset(data, (16, 16), 1, flip=True), ImageDataset(data, (16, 16), 1)
    first = np.array([int(flipped[(0, i)]["pixel_values"][0, 0, 0]) for i in range(64)])
    assert set(first) == {0, 15}
    assert 16 < (first == 15).sum() < 48
    assert {int(plain[(0, i)]["pixel_values"][0, 0, 0]) for i in range(64)} == {0}
