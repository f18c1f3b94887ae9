"""The probes of a run: k-NN while it trains, and the default protocols when it ends."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from ldae.data.images import ImageDataset
from ldae.data.sources import why_not_probed
from ldae.features.encoders import Encoder
from ldae.options import DataArguments, TrainArguments
from ldae.probes import Knn, Subject, probe

if TYPE_CHECKING:
    import datasets

KNN_IMAGES = 5000  # of each split, that a k-NN probe in the course of a run looks at


class RunProbes:
    """Measures a run's encoder on the labelled images of its two splits, if it has any.

    Args:
        images: the training images, as the run crops them.
        validation: the validation split, if there is one.
        image_hw: height and width of the crops that are probed.
        name: what the encoder is called in messages.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        images: ImageDataset,
        validation: datasets.Dataset | None,
        image_hw: tuple[int, int],
        data_args: DataArguments,
        train_args: TrainArguments,
        name: str,
    ):
        self.accelerator, self.image_hw, self.num_channels, self.name = accelerator, image_hw, images.num_channels, name
        self.seed, self.num_workers = train_args.seed, data_args.num_workers
        self.splits: tuple[datasets.Dataset, datasets.Dataset] | None = None
        if images.streaming or not (train_args.probe or train_args.knn_steps):
            return
        splits = images.examples, validation
        if (reason := why_not_probed(*splits)) is not None:
            accelerator.print(f"Accuracy is not measured on {data_args.data!r}: {reason}.")
            return
        self.splits = splits
        self.crops = cache(partial(self._crops, splits))

    def knn(self, model: torch.nn.Module, step: int):
        """Prints and logs the k-NN accuracy of a model on up to `KNN_IMAGES` images of each split, under the run's bar."""
        if (result := Knn()(self._subject(model, KNN_IMAGES, progress=False))) is not None:
            self.accelerator.print(f"step {step}: k-NN {result['accuracy']:.1f} %")
            self.accelerator.log({"knn_accuracy": result["accuracy"]}, step)
        self.accelerator.wait_for_everyone()

    def measure(self, model: torch.nn.Module, baseline: bool, data_name: str) -> dict[str, Any] | None:
        """The result of `ldae.probes.probe` on all images, on the main process; None on others.

        Args:
            baseline: whether the untrained network is measured too.
        """
        return probe(self._subject(model), baseline=baseline, data_name=data_name)

    def _subject(self, model: torch.nn.Module, most: int | None = None, progress: bool = True) -> Subject:
        encoder = Encoder(model, name=self.name)
        train, validation = self.crops(most)
        return Subject(
            encoder, train, validation, self.accelerator, self.seed, num_workers=self.num_workers, progress=progress
        )

    def _crops(self, splits: tuple[datasets.Dataset, datasets.Dataset], most: int | None) -> list[ImageDataset]:
        """Centre crops of both splits, or of at most `most` random images of each; `crops` decodes them once."""
        orders = [torch.randperm(len(split), generator=torch.Generator().manual_seed(0)) for split in splits]
        parts = [split.select(sorted(order[:most].tolist())) for split, order in zip(splits, orders, strict=True)]
        return [ImageDataset(part, self.image_hw, self.num_channels) for part in parts]
