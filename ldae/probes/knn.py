"""k-nearest neighbours: nothing is trained, and only k and the temperature are chosen."""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ldae.data.images import spread
from ldae.features.extraction import Features
from ldae.features.neighbours import nearest, standardised
from ldae.options import option
from ldae.probes.predictions import pack
from ldae.probes.protocol import Protocol, register_protocol, score
from ldae.probes.subject import Subject

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
    knn_k: int = option(20, "knn: neighbours that vote.", minimum=1)
    knn_temperature: float = option(
        0.07, "knn: the weight of a neighbour of cosine similarity s is exp(s / temperature).", exclusive_minimum=0
    )

    @property
    def description(self) -> str:
        return (
            f"weighted {self.knn_k}-NN by cosine similarity, temperature {self.knn_temperature:g}, on average-pooled "
            "features"
        )

    def measure(self, subject: Subject) -> dict[str, Any] | None:
        train, validation = subject.features("train"), subject.features("validation")
        if train is None or validation is None:
            return None
        found = []
        for keys, queries in (
            (train.features, validation.features),
            standardised(train.features, validation.features),
        ):
            predictions = knn_predictions(
                replace(train, features=keys),
                queries,
                subject.num_classes,
                self.knn_k,
                self.knn_temperature,
                subject.device,
            )
            found.append(score(predictions, validation.labels))
        raw, scaled = found
        return {
            **raw,
            "accuracy_standardised": scaled["accuracy"],
            "predictions_standardised": pack(scaled["predictions"]),
        }


@torch.no_grad()
def knn_predictions(
    train: Features,
    queries: torch.Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
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
    train_indices, validation_indices = (cast(torch.Tensor, part.indices) for part in (train, validation))
    count, k = SHOWN
    some = spread(len(validation), count)
    _, neighbours = nearest(validation.features[some], train.features, k)
    found = torch.stack([subject.train.pixel_values(train_indices[row]) for row in neighbours])
    same_class = train.labels[neighbours] == validation.labels[some][:, None]
    return subject.validation.pixel_values(validation_indices[some]), found, same_class
