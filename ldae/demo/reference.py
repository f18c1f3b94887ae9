"""The images among which the page looks for the nearest: the embedded photographs, or those that `ldae-features` has seen."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldae.data.images import ImageDataset, spread
from ldae.data.sources import load_examples
from ldae.features.encoders import Encoder
from ldae.features.extraction import extract_features
from ldae.features.neighbours import centred, nearest
from ldae.features.shards import ABOUT, read_pooled
from ldae.files import read_json
from ldae.names import relative_names
from ldae.report.drawing import to_images

EMBEDDED = 260  # of the embedded photographs' validation crops: 20 of each photograph


@dataclass
class Reference:
    """Images and their features.

    Args:
        images: the data set.
        indices: int64 (n,), the places of these images in it.
        features: float32 (n, E), the pooled features of these images.
        title: what the images are, in words.
    """

    images: ImageDataset
    indices: torch.Tensor
    features: torch.Tensor
    title: str

    def pixel_values(self, rows: list[int]) -> torch.Tensor:
        """The images (len(rows), C, H, W) in [-1, 1], of which all can be read.

        Raises:
            ValueError: if one has become unreadable.
        """
        return self.images.pixel_values(self.indices[rows])

    def caption(self, row: int) -> str:
        """An image's class, where the data set has classes, or else the name of its file."""
        index = int(self.indices[row])
        (name,), (label,) = self.images.names_and_labels(np.array([index]))
        classes = getattr(self.images.examples.features.get("label"), "names", None)
        return classes[label] if classes and label >= 0 else Path(name).name

    def nearest(self, feature: torch.Tensor, count: int) -> list[tuple[Image.Image, str]]:
        """The images nearest to a feature (E,) by the cosine of centred features, nearest first, each with a caption."""
        keys, queries = centred(self.features, feature[None])
        (cosines,), (rows,) = nearest(queries, keys, count)
        pictures = to_images(self.pixel_values(rows.tolist()))
        captions = [f"{cosine:.2f} {self.caption(row)}" for row, cosine in zip(rows.tolist(), cosines, strict=True)]
        return list(zip(pictures, captions, strict=True))


def embedded_reference(encoder: Encoder) -> Reference:
    """Embeds crops of the embedded photographs, evenly over all of them."""
    images = ImageDataset(load_examples("photos", "validation"), encoder.image_hw, encoder.num_channels)
    indices = spread(len(images), EMBEDDED)
    features = extract_features(encoder, images, batch_size=64, indices=indices)
    return Reference(images, torch.tensor(indices), features.features, "crops of the embedded photographs")


def stored_reference(folder: str, encoder: Encoder) -> Reference:
    """Reads what `ldae-features` has written.

    Args:
        folder: of _features.json and the shards.
        encoder: the model that wrote them, as `load_encoder` gives it.

    Raises:
        FileNotFoundError: if the folder holds no features, or the images are not where they were.
        ValueError: if the features are of another model or not pooled, or if files or images have changed since.
    """
    path = Path(folder).expanduser()
    if not (path / ABOUT).is_file():
        raise FileNotFoundError(f"--features: {folder!r} holds no {ABOUT}; write one by ldae-features")
    written = read_json(path / ABOUT)
    if written["digest"] != encoder.digest():
        raise ValueError(
            f"--features: {folder!r} holds features of {written['model']!r}, which is not the model {encoder.name!r}"
        )
    if "pooled" not in written["features"]:
        raise ValueError(
            f"--features: {folder!r} holds no pooled features; write them by ldae-features --features both"
        )
    names, features = read_pooled(path)
    if not names:
        raise ValueError(f"--features: {folder!r} holds no images; let ldae-features finish")
    images = ImageDataset(load_examples(written["data"], written["split"]), encoder.image_hw, encoder.num_channels)
    if images.version() != written["fingerprint"]:
        raise ValueError(f"--features: the images of {written['data']!r} have changed since; run ldae-features again")
    data = Path(written["data"])  # who visits the page need not know where a folder lies
    name = data.name if data.is_absolute() else written["data"]
    return Reference(images, _places(images, names, written["data"]), features, f"images of {name}")


def _places(images: ImageDataset, names: list[str], data: str) -> torch.Tensor:
    """The places (n,) of images in a data set, which `names` names in its order, leaving out those that cannot be read."""
    places: list[int] = []
    for index, name in enumerate(relative_names(images.names(range(len(images))), data)):
        if len(places) < len(names) and name == names[len(places)]:
            places.append(index)
    if len(places) < len(names):
        raise ValueError(f"--features: there is no image {names[len(places)]!r} in {data!r} any more")
    return torch.tensor(places)
