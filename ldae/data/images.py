"""From encoded files to crops: `decode` reads one image, `ImageDataset` gives the crops of a batch of (epoch, index)."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from image_processing_ldae import PIL_MODES, as_seen, open_image
from ldae.data.crops import Crop, random_bits
from ldae.data.sources import label_array

if TYPE_CHECKING:
    import datasets

CACHE_BYTES = 2 << 30  # the images of a data set are decoded once and kept in memory if they fit into this


def encoded_bytes(encoded: dict[str, Any] | None, within: str | None = None) -> bytes:
    """Reads the encoded file of one image.

    Args:
        encoded: {"bytes": the encoded file, or None, "path": the name of the file, or its URL file:///…}.
        within: the folders in which a file may lie, joined by `os.pathsep`; a relative path starts at the first. With None it
            may lie anywhere.

    Raises:
        ValueError: if there is neither, or the path names a device, a pipe or a file outside of these folders.
        OSError: if the file cannot be read.
    """
    encoded = encoded or {"bytes": None, "path": None}
    if encoded["bytes"] is not None:
        return encoded["bytes"]
    if encoded["path"] is None:
        raise ValueError("there are neither bytes nor a path")
    path = _file(encoded["path"], within)
    if within is not None:
        path = path.resolve()
        if not any(path.is_relative_to(Path(folder).resolve()) for folder in within.split(os.pathsep)):
            raise ValueError("its path leads out of the data's folder")
    if path.exists() and not path.is_file():  # one that is read without end, or waits for ever
        raise ValueError("its path is that of a folder, a device or a pipe")
    return path.read_bytes()


def _file(path: str, within: str | None) -> Path:
    """The file of an encoded image's path, which is not looked at; `within` as of `encoded_bytes`."""
    if path.startswith("file:///"):  # a name that is no UTF-8
        path = os.fsdecode(unquote_to_bytes(path.removeprefix("file://")))
    return Path("" if within is None else within.split(os.pathsep)[0], path)


def decode(encoded: dict[str, Any] | None, num_channels: int, within: str | None = None) -> Image.Image:
    """Decodes one image to the way it should look, as `image_processing_ldae.as_seen` says.

    Args:
        encoded, within: as of `encoded_bytes`.
        num_channels: 1, 3 or 4: the image is returned as grey, RGB or RGBA.

    Raises:
        Exception: of almost any type, if the file cannot be read.
    """
    with open_image(io.BytesIO(encoded_bytes(encoded, within))) as file:
        return as_seen(file, num_channels)


def to_pixel_values(images: torch.Tensor) -> torch.Tensor:
    """Scales uint8 images (B, C, H, W) to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def spread(length: int, count: int) -> list[int]:
    """The places of `count` of so many images, or of all if they are fewer, spread evenly from the first to the last."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


class ImageDataset(Dataset):
    """Crops of the images of a data set.

    A key (epoch, index) gives {"pixel_values": uint8 (C, H, W), "label": int, "name": str, "index": int}, or
    {"name": str, "error": str} if the image cannot be read. A list of keys gives a batch, see `__getitems__`. What a key
    gives depends on (seed, epoch, index) alone, and not on the batch or the number of workers or processes. A key of a
    stream carries its example as a third part. A label of -1 means that the image has none.

    Images are decoded once and kept in memory that worker processes share, before what is drawn anew in every epoch. This
    needs a data set of at most `CACHE_BYTES`, whose first images, as many as can be read of eight, are of one size. Images of
    another size are decoded every time.

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
        keep_in_memory: False for images that are read only once.

    Attributes:
        augment: A transform of one crop, uint8 (C, H, W), that follows crop and flip, or None. What it draws from torch's
            generator depends on (seed, epoch, index) alone.

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
        keep_in_memory: bool = True,
    ):
        if num_channels not in PIL_MODES:
            raise ValueError(f"num_channels must be one of {list(PIL_MODES)} to read image files, got {num_channels}")
        self.examples, self.num_channels, self.seed = examples, num_channels, seed
        feature = (examples.features or {}).get("image")
        self.within = getattr(feature, "id", None)  # where files may lie, as `load_examples` says
        self.streaming = not hasattr(examples, "__len__")
        if not self.streaming and not len(examples):
            raise ValueError("data holds no images")
        height, width = image_hw
        self.crop = Crop((height, width), crop, flip, seed, min_area)
        self.transform = (self.crop.image_hw, num_channels, crop, flip, seed, min_area)  # what caches tell apart
        self.augment: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.cache: torch.Tensor | None = None  # prepared images, uint8 (n, H, W, C)
        self.cached = torch.zeros(0 if self.streaming else len(examples), dtype=torch.bool)  # which are there, (n,)
        if keep_in_memory and not self.streaming and (one := self._prepared_shape()) is not None:
            shape = (len(examples), *one)
            if np.prod(shape, dtype=np.int64) <= CACHE_BYTES:
                try:
                    cached = _shared_bytes(len(examples)).view(torch.bool)
                    self.cache, self.cached = _shared_bytes(int(np.prod(shape))).view(shape), cached
                except RuntimeError:  # a container's /dev/shm may be small: images are decoded every time instead
                    pass

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def labels(self) -> np.ndarray | None:
        """The labels, int64 (n,), -1 for an image without one, or None if the data set has no labels."""
        return label_array(self.examples)

    @cached_property
    def _paths(self):
        """The paths of all images, an array of arrow."""
        paths = self.examples.select_columns("image").flatten().select_columns("image.path")
        return paths.with_format("arrow")[:]["image.path"].combine_chunks()

    def names(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Returns the names of images: their paths, or "image 7" for an image without a path."""
        paths = self._paths.take(np.asarray(indices)).to_pylist()
        return [path or f"image {index}" for path, index in zip(paths, indices, strict=True)]

    def pixel_values(self, indices: Iterable[int] | torch.Tensor) -> torch.Tensor:
        """Returns the crops that epoch 0 has of images, (n, C, H, W) in [-1, 1].

        Raises:
            ValueError: if one of them cannot be read.
        """
        batch = self.__getitems__([(0, int(i)) for i in indices])
        if batch["bad"]:
            raise ValueError(f"unreadable image: {batch['bad'][0]}")
        return to_pixel_values(batch["pixel_values"])

    def fingerprint(self) -> str:
        """Returns a digest of the number of images, the labels and the bytes of up to 64 images.

        Results keep it, so that results on the same images can be told from others. A file that cannot be opened counts as
        empty.
        """
        digest = hashlib.sha256()
        if self.streaming:
            sample = list(self.examples.take(64))
        else:
            sample = [self.examples[i] for i in spread(len(self), 64)]
            digest.update(f"{len(self)} {None if self.labels is None else self.labels.tolist()}".encode())
        for example in sample:
            with suppress(OSError, ValueError):  # whoever decodes the images names those that cannot be read
                digest.update(encoded_bytes(example["image"], self.within))
        return digest.hexdigest()[:16]

    def version(self) -> str:
        """Returns a digest of `fingerprint` and of every image's name and size in bytes; of a stream, `fingerprint`.

        What is computed from each image is kept under it. A file that cannot be found has the size 0.
        """
        if self.streaming:
            return self.fingerprint()
        from pyarrow import compute  # only here, so that --help need not wait for it

        digest = hashlib.sha256(self.fingerprint().encode())
        # of the whole table, in which lengths are read without the bytes
        for chunk in self.examples.data.column("image").chunks:
            lengths = compute.binary_length(chunk.field("bytes")).to_pylist()  # None for a file
            for path, length in zip(chunk.field("path").to_pylist(), lengths, strict=True):
                size = self._size(path) if length is None else length
                digest.update(f"{path and Path(path).name!r} {size}".encode())
        return digest.hexdigest()[:16]

    def _size(self, path: str | None) -> int:
        try:
            return 0 if path is None else _file(path, self.within).stat().st_size
        except (OSError, ValueError):
            return 0

    def __getitem__(self, key: tuple) -> dict[str, Any]:
        batch = self.__getitems__([key])
        if batch["bad"]:
            (name,), _ = self.names_and_labels(np.array([key[1]]), list(key[2:]) or None)
            return {"name": name, "error": batch["bad"][0].removeprefix(f"{name}: ")}
        return {
            "pixel_values": batch["pixel_values"][0],
            "label": int(batch["label"]),
            "name": batch["name"][0],
            "index": int(batch["index"]),
        }

    def __getitems__(self, keys: list[tuple]) -> dict[str, Any]:
        """Makes a batch of B keys. Unreadable images are left out.

        Returns:
            {"pixel_values": uint8 (B, C, H, W), or None if no image can be read, "label": int64 (B,), "name": list of B
            names, "index": int64 (B,), "bad": list of "name: error", one for each unreadable image}.
        """
        epochs, indices = np.array([key[:2] for key in keys], np.int64).T
        examples = [key[2] for key in keys] if self.streaming else None
        names, labels = self.names_and_labels(indices, examples)
        uniforms, flips = self.crop.draw(epochs, indices)
        size = None if self.cache is None else tuple(self.cache.shape[1:3])
        boxes = None if size is None else self.crop.boxes(uniforms, *size)
        crops = np.empty((len(keys), *self.crop.image_hw, self.num_channels), np.uint8)
        good, bad = [], []
        for i, image in enumerate(self._prepared(indices, examples)):
            if isinstance(image, Exception):
                bad.append(f"{names[i]}: {_reason(image)}")
                continue
            hw = image.shape[:2]
            box = boxes[i] if boxes is not None and hw == size else self.crop.boxes(uniforms[i : i + 1], *hw)[0]
            crops[i] = self.crop.cut(image, box, flips[i])
            good.append(i)
        pixel_values = torch.from_numpy(crops if not bad else crops[good]).permute(0, 3, 1, 2).contiguous()
        if (augment := self.augment) is not None and good:
            seeds = random_bits(~self.seed, epochs[good], indices[good], 1)[:, 0].tolist()
            pixel_values = torch.stack([_augmented(augment, *pair) for pair in zip(pixel_values, seeds, strict=True)])
        return {
            "pixel_values": pixel_values if good else None,
            "label": torch.from_numpy(labels[good]),
            "name": [names[i] for i in good],
            "index": torch.from_numpy(indices[good]),
            "bad": bad,
        }

    def fill(self, indices: Sequence[int]) -> dict[int, str]:
        """Decodes images into the cache.

        Returns:
            The "name: error" of each image that cannot be read, by its index.
        """
        bad = {}
        for index, image in zip(indices, self._prepared(np.asarray(indices)), strict=True):
            if isinstance(image, Exception):
                bad[index] = f"{self.names([index])[0]}: {_reason(image)}"
        return bad

    def names_and_labels(self, indices: np.ndarray, examples: list[dict] | None = None) -> tuple[list[str], np.ndarray]:
        """Returns the names and the labels, int64 (B,), of images; those of a stream are read from its `examples`."""
        if examples is None:
            return self.names(indices), np.full(len(indices), -1) if self.labels is None else self.labels[indices]
        paths = [(example["image"] or {"path": None})["path"] for example in examples]
        names = [path or f"image {index}" for path, index in zip(paths, indices, strict=True)]
        labels = (example.get("label") for example in examples)
        return names, np.array([-1 if label is None else label for label in labels], np.int64)

    def _prepared(self, indices: np.ndarray, examples: list[dict] | None = None) -> Iterator[np.ndarray | Exception]:
        """Yields prepared images (H, W, C), or the exception that decoding raised; fills the cache."""
        if examples is None:
            known = self.cached.numpy()[indices]
            unknown = indices[~known]
            encoded = iter(self.examples[unknown.tolist()]["image"] if len(unknown) else ())
        else:
            known, encoded = np.zeros(len(indices), bool), (example["image"] for example in examples)
        cache = None if self.cache is None else self.cache.numpy()
        for index, here in zip(indices, known, strict=True):
            if cache is not None and here:
                yield cache[index]
                continue
            image = self._prepare(next(encoded))
            if cache is not None and not isinstance(image, Exception) and image.shape == cache.shape[1:]:
                cache[index] = image
                self.cached[index] = True
            yield image

    def _prepare(self, encoded: dict[str, Any] | None) -> np.ndarray | Exception:
        try:
            image = self.crop.prepare(decode(encoded, self.num_channels, self.within))
            return np.asarray(image).reshape(image.height, image.width, -1)
        except Exception as error:  # hostile files make decoders fail in every way
            return error

    def _prepared_shape(self) -> tuple[int, ...] | None:
        """The shape (H, W, C) of prepared images, as the first of them have it; None if they differ or cannot be read."""
        if self.crop.kind == "center":
            return *self.crop.image_hw, self.num_channels
        images = (self._prepare(example["image"]) for example in self.examples.select(range(min(8, len(self)))))
        shapes = {image.shape for image in images if not isinstance(image, Exception)}
        return shapes.pop() if len(shapes) == 1 else None


def _augmented(augment: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.default_generator  # fork_rng and manual_seed visit all devices: 0.2 ms an image
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        return augment(pixel_values)
    finally:
        generator.set_state(state)


def _reason(error: Exception) -> str:
    """The error in words, the same every time: Pillow's message on an image in memory holds an address."""
    return f"{type(error).__name__}: {re.sub(r' <_io.BytesIO object at .*?>', '', str(error))}"


def _shared_bytes(count: int) -> torch.Tensor:
    """Returns zeros, uint8 (count,), in memory that worker processes share."""
    # `share_memory_` would copy them there, which takes seconds
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(count, device="cpu"))
