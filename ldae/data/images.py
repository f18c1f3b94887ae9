"""From encoded files to crops: `decode` reads one image, `ImageDataset` gives the crop of a (seed, epoch, index)."""

from __future__ import annotations

import hashlib
import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

if TYPE_CHECKING:
    import datasets

CACHE_BYTES = 2 << 30  # the centre crops of a data set are decoded once and kept in memory if they fit into this
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode(encoded: dict[str, Any], num_channels: int) -> Image.Image:
    """Decodes one image to the way it should look.

    It is turned upright by its EXIF orientation. Of an animation it is the first frame. 16 bits are scaled to 8.
    Transparency is blended onto white, unless `num_channels` is 4.

    Args:
        encoded: {"bytes": the encoded file, or None, "path": the name of the file}.
        num_channels: 1, 3 or 4: the image is returned as grey, RGB or RGBA.

    Raises:
        Exception: of almost any type, if the file cannot be read.
    """
    with Image.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else encoded["path"]) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip it at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("images of floating-point numbers have no known range")
        if num_channels != 4 and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(PIL_MODES[num_channels])


class ImageDataset(Dataset):
    """Crops of the images of a data set.

    A key (epoch, index) gives {"pixel_values": uint8 (C, H, W), "label": int, "name": str, "index": int}, or
    {"name": str, "error": str} if the image cannot be read. What a key gives depends on (seed, epoch, index) alone, and
    not on the number of workers or processes. A key of a stream carries its example as a third part. A label of -1 means
    that the image has none.

    Args:
        examples: The examples that `ldae.data.sources.load_examples` returns.
        image_hw: The height and width of the crops in pixels.
        num_channels: 1, 3 or 4: the crops are grey, RGB or RGBA, whatever the files hold.
        crop: "center" resizes the short side and cuts out the centre, which is the paper's default. "random" resizes the
            short side to 8/7 of the crop's and cuts out a random window. "random_resized" cuts out a random part of the
            area and resizes it.
        flip: Whether a random half of the crops is mirrored.
        seed: The seed of crops and flips.
        min_area: The smallest part of the area that "random_resized" takes. MAE pre-trains with 0.2 and probes with 0.08.

    Raises:
        ValueError: if the crop or the number of channels is none of these, or if there are no images.
    """

    def __init__(
        self,
        examples: datasets.Dataset | datasets.IterableDataset,
        image_hw: tuple[int, int],
        num_channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        seed: int = 0,
        min_area: float = 0.2,
    ):
        if num_channels not in PIL_MODES:
            raise ValueError(f"num_channels must be one of {list(PIL_MODES)} to read image files, got {num_channels}")
        self.examples, self.num_channels, self.seed = examples, num_channels, seed
        self.streaming = not hasattr(examples, "__len__")
        if not self.streaming and not len(examples):
            raise ValueError("data holds no images")
        self.transform = (tuple(image_hw), num_channels, crop, flip, seed, min_area)  # what caches tell apart
        self.prepare, augment = _transforms(image_hw, crop, min_area)
        self.augment = v2.Compose([augment or v2.Identity()] + [v2.RandomHorizontalFlip()] * flip)
        self.random = augment is not None or flip
        self.cache = self.cached = None
        num_bytes = 0 if self.streaming else len(examples) * num_channels * image_hw[0] * image_hw[1]
        if crop == "center" and not self.streaming and num_bytes <= CACHE_BYTES:
            try:
                self.cache = torch.empty(len(examples), num_channels, *image_hw, dtype=torch.uint8).share_memory_()
                self.cached = torch.zeros(len(examples), dtype=torch.bool).share_memory_()
            except RuntimeError:  # a container's /dev/shm may be small: decode every time instead
                self.cache = self.cached = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> np.ndarray | None:
        """The labels (n,), -1 for an image without one, or None if the data set has no labels."""
        if "label" not in (self.examples.features or {}):
            return None
        return np.array([-1 if label is None else label for label in self.examples["label"]])

    def fingerprint(self) -> str:
        """Returns a digest of the number of images, the labels and the bytes of up to 64 images.

        Results keep it, so that results on the same images can be told from others.
        """
        digest = hashlib.sha256()
        if self.streaming:
            sample = list(self.examples.take(64))
        else:
            sample = [self.examples[int(i)] for i in np.linspace(0, len(self) - 1, min(64, len(self)))]
            digest.update(f"{len(self)} {None if self.labels is None else self.labels.tolist()}".encode())
        for example in sample:
            image = example["image"] or {"bytes": b""}
            digest.update(image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, key: tuple) -> dict[str, Any]:
        epoch, index, *given = key
        example = given[0] if given else self.examples[index]
        image, label = example["image"] or {"bytes": b"", "path": None}, example.get("label")
        item = {"label": -1 if label is None else int(label), "name": image["path"] or f"image {index}"}
        try:
            pixel_values = self._prepared(image, index)
        except Exception as error:  # hostile files make decoders fail in every way
            return {"name": item["name"], "error": f"{type(error).__name__}: {error}"}
        if self.random:
            generator = torch.default_generator  # fork_rng and manual_seed visit all devices: 0.2 ms an image
            state = generator.get_state()
            generator.manual_seed(int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0]))
            try:
                pixel_values = self.augment(pixel_values)
            finally:
                generator.set_state(state)
        return {**item, "index": index, "pixel_values": pixel_values}

    def _prepared(self, image: dict[str, Any], index: int) -> torch.Tensor:
        if self.cache is not None and self.cached[index]:
            return self.cache[index]
        pixel_values = F.pil_to_tensor(self.prepare(decode(image, self.num_channels)))
        if self.cache is not None:
            self.cache[index] = pixel_values
            self.cached[index] = True
        return pixel_values


def _transforms(image_hw: tuple[int, int], crop: str, min_area: float):
    """Returns two transforms: the one of the decoded image, and the one that is drawn anew every time, or None."""

    def resize(factor: float):
        return partial(_resize_short_side, *(round(factor * side) for side in image_hw))

    if crop == "center":
        return v2.Compose([resize(1), v2.CenterCrop(image_hw)]), None
    if crop == "random":
        return resize(8 / 7), v2.RandomCrop(image_hw)
    if crop == "random_resized":
        return v2.Identity(), v2.RandomResizedCrop(image_hw, (min_area, 1), interpolation=v2.InterpolationMode.BICUBIC)
    raise ValueError(f"crop must be 'center', 'random' or 'random_resized', got {crop!r}")


def _resize_short_side(height: int, width: int, image: Image.Image) -> Image.Image:
    """Resizes the image, without changing its shape, to the smallest size that covers height and width."""
    scale = max(height / image.height, width / image.width)
    size = [max(height, round(image.height * scale)), max(width, round(image.width * scale))]
    if size[0] * size[1] > Image.MAX_IMAGE_PIXELS:  # a strip of 1 by 100,000 pixels, say
        raise ValueError(f"an image of {image.width}x{image.height} is too long to resize")
    return F.resize(image, size, v2.InterpolationMode.BICUBIC)
