"""What is measured: an encoder with the labelled images, whose features all protocols share."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from ldae.data.images import ImageDataset
from ldae.features.encoders import Encoder
from ldae.features.extraction import Features, cached_features, decided_by_main
from ldae.progress import progress_bar


@dataclass
class Subject:
    """An encoder and the labelled images on which protocols measure it.

    Args:
        train, validation: centre crops.
        accelerator: shares the passes over the images among its processes, in its precision.
        cache: folder that keeps pooled features; None: nothing is kept.
        tokens: whether some protocol needs the features of every patch; a pass over the images then gives them too.
        progress: whether passes over the images, and protocols, show progress bars.
        represent: pixel values (B, C, H, W) in [-1, 1] -> features (B, …), in place of the mean of the encoder's tokens;
            such features are never kept in the cache.
        known: the features that have been computed, so that all protocols share them.
        predictions: class numbers (n,) of the readable validation images, by the name of each protocol that classifies.
        labels: the classes (n,) of these images, once a protocol has classified them.
    """

    encoder: Encoder
    train: ImageDataset
    validation: ImageDataset
    accelerator: Accelerator = field(default_factory=Accelerator)
    seed: int = 0
    batch_size: int = 256
    num_workers: int = 0
    cache: Path | None = None
    tokens: bool = False
    progress: bool = True
    represent: Callable[[torch.Tensor], torch.Tensor] | None = None
    known: dict[Any, Features | None] = field(default_factory=dict, repr=False)
    predictions: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    labels: torch.Tensor | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the encoder's weights are."""
        return self.encoder.device

    @property
    def is_main_process(self) -> bool:
        """Whether this process keeps the features and writes the result."""
        return self.accelerator.is_main_process

    @property
    def precision(self) -> str:
        """The precision that the encoder computes in: "no" (float32), "bf16" or "fp16"."""
        return self.accelerator.mixed_precision

    @cached_property
    def random_crops(self) -> ImageDataset:
        """The training images as random resized crops, half of them mirrored."""
        return ImageDataset(
            self.train.examples, self.encoder.image_hw, self.train.num_channels, "random_resized", True, self.seed, 0.08
        )

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the images of both splits."""
        return f"{self.train.fingerprint()}-{self.validation.fingerprint()}"

    @cached_property
    def identity(self) -> str:
        """A digest of the encoder, its precision, the images and the seed: figures of equal identity belong together."""
        text = f"{self.encoder.digest()} {self.train.version()} {self.validation.version()} {self.seed}"
        if self.precision != "no":
            text += f" {self.precision}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @cached_property
    def num_classes(self) -> int:
        """One more than the largest class number of both splits."""
        splits = (cast(np.ndarray, images.labels) for images in (self.train, self.validation))  # both are labelled
        return 1 + max(int(labels.max()) for labels in splits)

    def data(self, name: str) -> dict[str, Any]:
        """Returns what results say of the images, which they call `name`."""
        return {
            "name": name,
            "fingerprint": self.fingerprint,
            "num_train": len(self.train),
            "num_validation": len(self.validation),
            "num_classes": self.num_classes,
            "unreadable": [],
        }

    def features(self, split: str, tokens: bool = False) -> Features | None:
        """Features of the centre crops of "train" or "validation"; on the main process, None on others.

        Args:
            tokens: those of every patch too, for which the images are passed through the encoder where they are not known:
                only pooled features are kept in the cache.

        Raises:
            ValueError: if no image can be read, one has no label, or a feature is not finite.
        """
        images = getattr(self, split)
        if split not in self.known:
            self.known[split] = self._extract(images, split, tokens=tokens or self.tokens, folder=self.cache)
        known = self.known[split]
        if tokens and decided_by_main(known is not None and known.tokens is None):
            self.known[split] = self._extract(images, split, tokens=True)
        return self.known[split]

    def progress_bar(self, iterable: Iterable[Any] | None = None, **kwargs: Any) -> tqdm:
        """Makes a bar as `ldae.progress.progress_bar` does, for the main process."""
        return progress_bar(iterable, self.progress and self.is_main_process, **kwargs)

    def view(self, number: int, keep: bool = True, bar: tqdm | None = None) -> Features | None:
        """Features of random resized crops of the training images, half of them mirrored; each number has its own crops.

        Args:
            keep: keeps them in memory and in the cache.
            bar: a progress bar that counts these images among others, in place of one of their own.
        """
        if ("view", number) in self.known:
            return self.known["view", number]
        folder = self.cache if keep else None
        features = self._extract(self.random_crops, "train", view=number, folder=folder, bar=bar)
        if keep:
            self.known["view", number] = features
        return features

    def drop_tokens(self):
        """Frees the features of patches; the pooled ones stay."""
        for features in self.known.values():
            if features is not None:
                features.tokens = None

    def _extract(self, images: ImageDataset, split: str, folder: Path | None = None, **kwargs) -> Features | None:
        with self.accelerator.autocast():
            features = cached_features(
                self.encoder,
                images,
                self.accelerator,
                folder if self.represent is None else None,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                represent=self.represent,
                progress=self.progress,
                **kwargs,
            )
        if features is not None:
            name = {"train": "training"}.get(split, split)
            if not len(features):
                first = f"; the first is {features.bad[0]}" if features.bad else ""
                raise ValueError(f"a probe needs {name} images, got none that can be read{first}")
            if features.labels.min() < 0:
                raise ValueError(f"the {name} images have no labels; a probe needs them")
            if not torch.isfinite(features.features).all():
                raise ValueError(f"the {name} features are not all finite")
        return features
