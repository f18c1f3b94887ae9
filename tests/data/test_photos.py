"""The embedded images."""

import builtins
import io

import numpy as np
import pytest
from PIL import Image

from ldae.data import photos
from ldae.data.images import decode
from ldae.data.sources import load_examples


def test_photos_share_no_pixel_between_the_splits(monkeypatch):
    monkeypatch.setattr(photos, "PHOTOGRAPHS", photos.PHOTOGRAPHS[::6])  # some of them, for speed

    def crops(split):
        return [decode(image, 3).tobytes() for image in load_examples("photos", split)["image"]]

    before = {split: crops(split) for split in photos.CROPS}
    assert {split: len(images) for split, images in before.items()} == {"train": 3 * 128, "validation": 3 * 40}

    def repaint(validation: bool):
        """Replaces the validation region of every photograph, or all but it."""
        original = Image.open

        def altered(source, **options):
            if isinstance(source, io.BytesIO):  # a crop
                return original(source, **options)
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


def test_photographs_are_found_without_importing_their_packages(monkeypatch):
    real = builtins.__import__

    def imported(name, *arguments, **keywords):
        assert name.split(".")[0] not in photos.FOLDERS
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", imported)
    assert all(photos.photograph_path(name).is_file() for name in photos.PHOTOGRAPHS)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="photographs in skimage, which is not installed"):
        photos.load_photos("train")
