"""The embedded data set `photos`: crops of photographs that ship inside scikit-image and scikit-learn, for a first run."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import datasets

# These are natural photographs only: no drawings, text, microscopy or test patterns.
PHOTOGRAPHS = (
    "skimage/astronaut.png", "skimage/brick.png", "skimage/camera.png", "skimage/chelsea.png", "skimage/coffee.png",
    "skimage/coins.png", "skimage/grass.png", "skimage/gravel.png", "skimage/hubble_deep_field.jpg",
    "skimage/motorcycle_left.png", "skimage/rocket.jpg", "sklearn/china.jpg", "sklearn/flower.jpg",
)  # fmt: skip
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}  # of the photographs, within their packages
CROPS = {"train": 128, "validation": 40}  # of each photograph
CROP_SIZE = 64  # pixels


def load_photos(split: str) -> datasets.Dataset:
    """Cuts square crops out of the photographs and resizes them to 64 px. The photograph is the label.

    Training crops lie in the left two thirds of each photograph and validation crops in the right third, so that no pixel
    is in both. The sides of the crops range from 64 px to the smaller side of their region. The crops are the same every time.

    Args:
        split: "train" (1,664 images) or "validation" (520 images).

    Raises:
        ValueError: if there is no such split.
    """
    import datasets

    if split not in CROPS:
        raise ValueError(f"split: data 'photos' has the splits {', '.join(CROPS)}, got {split!r}")
    rng = np.random.default_rng(list(CROPS).index(split))
    images: list[dict[str, Any]] = []
    labels: list[int] = []
    for label, name in enumerate(PHOTOGRAPHS):
        photograph = Image.open(photograph_path(name)).convert("RGB")
        width, height = photograph.size
        left, right = (0, width * 2 // 3) if split == "train" else (width * 2 // 3, width)
        largest = min(right - left, height)
        for _ in range(CROPS[split]):
            side = int(rng.integers(CROP_SIZE, largest + 1))
            x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(0, height - side + 1))
            crop = photograph.crop((x, y, x + side, y + side))  # resize(box=) would read a few pixels beyond the region
            crop = crop.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BICUBIC)
            encoded = io.BytesIO()
            crop.save(encoded, "PNG", compress_level=1)
            images.append({"bytes": encoded.getvalue(), "path": f"{Path(name).stem}-{split}-{len(images):04d}.png"})
            labels.append(label)
    features = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=[Path(name).stem for name in PHOTOGRAPHS])
    )
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def photograph_path(name: str) -> Path:
    """The file of one of `PHOTOGRAPHS`, found without importing its package, which takes a second.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    package, file = name.split("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"data 'photos' is cut out of photographs in {package}, which is not installed")
    return Path(spec.origin).parent / FOLDERS[package] / file
