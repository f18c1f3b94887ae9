"""Crops and flips are functions of (seed, epoch, index), and cut out what Pillow and torchvision do."""

import datasets
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import encoded
from PIL import Image

from ldae.data.images import ImageDataset


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
