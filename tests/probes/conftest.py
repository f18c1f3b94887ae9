"""Images that the tests of protocols and subjects share."""

import datasets
import numpy as np
import pytest
from PIL import Image

from ldae.data.images import ImageDataset


@pytest.fixture
def labelled_images(tmp_path):
    """Seven noise images of two classes; the fourth is no image."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    paths[3].write_bytes(b"no image")
    examples = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(path)} for path in paths], "label": [0, 1, 0, 1, 0, 1, 1]},
        features=datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["a", "b"])),
    )
    return ImageDataset(examples, (8, 12))
