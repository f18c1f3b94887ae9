"""k-nearest neighbours: nothing is trained, and only k and the temperature are chosen."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ldae.data.images import spread
from ldae.features.extraction import Features
from ldae.features.neighbours import as_they_are, nearest, standardised, whitened
from ldae.options import option
from ldae.probes.predictions import pack
from ldae.probes.protocol import Protocol, register_protocol, score
from ldae.probes.subject import Subject

K, TEMPERATURE = 20, 0.07
SHOWN = (8, 6)  # validation images in a drawing, and the nearest training images of each


@register_protocol
@dataclass
class Knn(Protocol):
    """Weighted k-nearest-neighbour vote by cosine similarity s, each neighbour with weight exp(s / temperature).

    The protocol of InstDisc (Wu et al., 2018, section 3.4) and DINO; k is at most the number of training images.
    "accuracy_standardised" and the packed "predictions_standardised" are the same vote's on features that have mean 0 and
    deviation 1 over the training images: cosine similarity depends on the scales of features, and part of a lead may be scale
    alone.
    """

    name = "knn"
    title = "k-NN"
    position = 0
    knn_k: int = option(K, "knn: neighbours that vote.", minimum=1)
    knn_temperature: float = option(
        TEMPERATURE,
        "knn: the weight of a neighbour of cosine similarity s is exp(s / temperature).",
        exclusive_minimum=0,
    )

    @property
    def description(self) -> str:
        return _description(self.knn_k, self.knn_temperature, "average-pooled")

    def measure(self, subject: Subject) -> dict[str, Any] | None:
        raw = _vote(subject, as_they_are, self.knn_k, self.knn_temperature)
        scaled = _vote(subject, standardised, self.knn_k, self.knn_temperature)
        if raw is None or scaled is None:
            return None
        return {
            **raw,
            "accuracy_standardised": scaled["accuracy"],
            "predictions_standardised": pack(scaled["predictions"]),
        }


@register_protocol
@dataclass
class KnnWhitened(Protocol):
    """The vote of `Knn` with its defaults on features that the training images whiten, as `ldae.features.neighbours` does.

    Features of encoders that learned to reconstruct vary most in few directions, which hold brightness and colour and settle
    what is near. Whitening gives all directions the same say, as the linear probe may. It needs no labels.
    """

    name = "knn-whitened"
    title = "k-NN, whitened"
    position = 0.5

    @property
    def description(self) -> str:
        return _description(K, TEMPERATURE, "average-pooled and whitened")

    def measure(self, subject: Subject) -> dict[str, Any] | None:
        return _vote(subject, whitened, K, TEMPERATURE)


def _description(k: int, temperature: float, made: str) -> str:
    return f"weighted {k}-NN by cosine similarity, temperature {temperature:g}, on {made} features"


def _vote(subject: Subject, prepare: Callable, k: int, temperature: float) -> dict[str, Any] | None:
    """The score of the vote on prepared features, on the main process."""
    train, validation = subject.features("train"), subject.features("validation")
    if train is None or validation is None:
        return None
    keys, queries = prepare(train.features, validation.features)
    train = replace(train, features=keys)
    return score(
        knn_predictions(train, queries, subject.num_classes, k, temperature, subject.device), validation.labels
    )


@torch.no_grad()
def knn_predictions(
    train: Features,
    queries: torch.Tensor,
    num_classes: int,
    k: int = K,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Predicts classes (n,) of queries (n, E) by the vote of the k nearest of the training features."""
    cosines, neighbours = nearest(queries, train.features, k, device)
    weights = ((cosines - cosines[:, :1]) / temperature).exp()  # a common factor changes no vote
    votes = weights.new_zeros(len(queries), num_classes).scatter_add_(1, train.labels[neighbours], weights)
    return votes.argmax(dim=1)


@torch.no_grad()
def nearest_images(subject: Subject) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Finds the k nearest training images of n validation images, `SHOWN` of both, on the main process.

    Returns:
        The validation images (n, C, H, W), their nearest training images (n, k, C, H, W), the nearest first, both in [-1, 1],
        and whether these are of the same class (n, k).
    """
    # not None on the main process
    train, validation = (cast(Features, subject.features(split)) for split in ("train", "validation"))
    count, k = SHOWN
    some = spread(len(validation), count)
    _, neighbours = nearest(validation.features[some], train.features, k)
    found = torch.stack([subject.train.pixel_values(train.indices[row]) for row in neighbours])
    same_class = train.labels[neighbours] == validation.labels[some][:, None]
    return subject.validation.pixel_values(validation.indices[some]), found, same_class
