"""What every protocol shares: the subject that it measures, its options, and its result."""

import dataclasses
import hashlib
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator

from ldae.data.images import ImageDataset
from ldae.features.encoders import Encoder
from ldae.features.extraction import Features, cached_features
from ldae.probes.metrics import Accuracy

HELD_OUT = 0.2  # part of the training images on which rates and strengths are chosen


@dataclass
class Subject:
    """An encoder and the labelled images on which protocols measure it.

    Args:
        train, validation: centre crops.
        cache: folder that keeps pooled features; None: none.
        tokens: whether some protocol wants patch features too; they then come with the pooled ones, from one pass.
    """

    encoder: Encoder
    train: ImageDataset
    validation: ImageDataset
    accelerator: Accelerator | None = None  # None: this process alone
    seed: int = 0
    batch_size: int = 256
    num_workers: int = 0
    cache: Path | None = None
    tokens: bool = False
    known: dict[Any, Features | None] = field(
        default_factory=dict, repr=False
    )  # features, so that all protocols share them
    predictions: dict[str, torch.Tensor] = field(
        default_factory=dict, repr=False
    )  # (n,) of each protocol that classifies

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def is_main_process(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    @cached_property
    def fingerprint(self) -> str:
        """Of the images of both splits."""
        return f"{self.train.fingerprint()}-{self.validation.fingerprint()}"

    @cached_property
    def identity(self) -> str:
        """A digest of the encoder, the images and the seed: figures of equal identity belong together."""
        return hashlib.sha256(f"{self.encoder.digest()} {self.fingerprint} {self.seed}".encode()).hexdigest()[:32]

    @cached_property
    def num_classes(self) -> int:
        return 1 + int(max(self.train.labels.max(), self.validation.labels.max()))

    def data(self, name: str) -> dict[str, Any]:
        """What results say of the images; `name` is what they call them."""
        return {
            "name": name,
            "fingerprint": self.fingerprint,
            "num_train": len(self.train),
            "num_validation": len(self.validation),
            "num_classes": self.num_classes,
            "unreadable": [],
        }

    def features(self, split: str) -> Features | None:
        """Features of the centre crops of "train" or "validation"; on the main process, None on others.

        Raises:
            ValueError: if no image can be read, one has no label, or a feature is not finite.
        """
        if split not in self.known:
            self.known[split] = self._extract(getattr(self, split), split, tokens=self.tokens, folder=self.cache)
        return self.known[split]

    def view(self, number: int, keep: bool = True) -> Features | None:
        """Features of random resized crops, half of them mirrored, of the training images: another crop for each number."""
        if ("view", number) in self.known:
            return self.known["view", number]
        images = ImageDataset(
            self.train.examples, self.encoder.image_hw, self.train.num_channels, "random_resized", True, self.seed, 0.08
        )
        features = self._extract(images, "train", view=number, folder=self.cache if keep else None)
        if keep:
            self.known["view", number] = features
        return features

    def drop_tokens(self):
        """Frees the patch features; the pooled ones stay."""
        for features in self.known.values():
            if features is not None:
                features.tokens = None

    def _extract(self, images: ImageDataset, split: str, **kwargs) -> Features | None:
        features = cached_features(
            self.encoder,
            images,
            self.accelerator,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
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


@dataclass
class Protocol(ABC):
    """A way to measure an encoder. A subclass's fields are its options, `name` is what results and --protocols call it.

    `measure` gives {"accuracy" (or what `metric` names), "standard_error"} in percent, whatever else is to be written,
    "settings" for what it chose, and "predictions" (n,) of the readable validation images where there are any; on other
    processes than the main one it gives None.
    """

    name: ClassVar[str]
    title: ClassVar[str]  # in tables and cards
    metric: ClassVar[str] = "accuracy"  # the key of the main figure
    needs_tokens: ClassVar[bool] = False

    @property
    @abstractmethod
    def description(self) -> str:
        """One sentence that says what was done, for results, tables and cards."""

    def check(self):
        """Refuses options that cannot be.

        Raises:
            ValueError: naming the option, what was got and what is possible.
        """

    def prepare(self, subject: Subject):
        """Refuses, before any pass over the images, a subject that cannot be measured.

        Raises:
            ValueError: saying why and what to do.
        """

    @abstractmethod
    def measure(self, subject: Subject) -> dict[str, Any] | None:
        """The figures, as the class says."""

    def __call__(self, subject: Subject) -> dict[str, Any] | None:
        """`measure` with the protocol's description, its options as "settings" and the seconds that it took."""
        start = time.perf_counter()
        result = self.measure(subject)
        if result is None:
            return None
        found = result.pop("settings", {})
        if "predictions" in result:
            subject.predictions[self.name] = result.pop("predictions")
        return {
            "description": self.description,
            **result,
            "settings": {**dataclasses.asdict(self), **found},
            "seconds": time.perf_counter() - start,
        }


def score(predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """{"accuracy", "standard_error", "predictions"} of class numbers (n,)."""
    predictions = predictions.cpu()
    return {**Accuracy().compute(predictions=predictions, references=labels), "predictions": predictions}


def held_out_mask(n: int, seed: int) -> torch.Tensor:
    """(n,) bool, true for the random 20 % of training images, at least one, on which choices are made."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(n, dtype=torch.bool)
    mask[order[: max(1, round(HELD_OUT * n))]] = True
    return mask
