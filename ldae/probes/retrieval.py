"""Image retrieval: do the training images of a query's class come first? Nothing is trained."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ldae.features.extraction import Features
from ldae.options import option
from ldae.probes.protocol import Protocol, register_protocol
from ldae.probes.subject import Subject


@register_protocol
@dataclass
class Retrieval(Protocol):
    """Every validation image is a query, for which the training images are ranked by cosine similarity.

    "map" is the mean over the queries of the average precision over the whole ranking. "recall" at k is the share of queries
    with an image of their class among the k nearest, which is the convention of image retrieval. A query whose class has no
    training image counts as 0 in both. A standard error is the deviation over the n queries / sqrt(n).
    """

    name = "retrieval"
    title = "Retrieval (mAP)"
    position = 7
    metric = "map"
    retrieval_k: list[int] = option(
        [1, 5, 10], "retrieval: recall is given at these numbers of nearest images.", minimum=1
    )

    @property
    def description(self) -> str:
        return (
            "mean average precision of the training images ranked by cosine similarity to each validation image, "
            "on average-pooled features"
        )

    def measure(self, subject: Subject) -> dict[str, Any] | None:
        train, validation = subject.features("train"), subject.features("validation")
        if train is None or validation is None:
            return None
        k = sorted(set(self.retrieval_k))
        with subject.progress_bar(desc=self.name, total=len(validation), unit=" queries") as bar:
            precisions, hits = rank(train, validation, k, subject.device, bar)
        mean, error = _percent(precisions)
        recall = {str(k): dict(zip(("recall", "standard_error"), _percent(x), strict=True)) for k, x in hits.items()}
        return {"map": mean, "standard_error": error, "recall": recall}


@torch.no_grad()
def rank(
    gallery: Features, queries: Features, k: list[int], device: torch.device | str = "cpu", bar: tqdm | None = None
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The average precision (n,) of n queries, in [0, 1], and for each k whether a query has a hit, 0 or 1 (n,).

    Args:
        bar: a progress bar that counts the queries.
    """
    # torchmetrics takes seconds to import
    from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate

    keys = nn.functional.normalize(gallery.features.to(device))
    # torchmetrics takes scores, of which only those above 0 count: places from the end of the ranking instead of cosines
    places = torch.arange(len(gallery), 0, -1, dtype=torch.float32)
    nearest = places[: max(k)]
    precisions: list[torch.Tensor] = []
    hits: dict[int, list[torch.Tensor]] = {number: [] for number in k}
    for some, labels in zip(queries.features.split(256), queries.labels.split(256), strict=True):
        similarity = nn.functional.normalize(some.to(device)) @ keys.T
        order = similarity.argsort(dim=1, descending=True, stable=True).cpu()
        for relevant in gallery.labels[order] == labels[:, None]:
            precisions.append(retrieval_average_precision(places, relevant))
            for number in k:
                hits[number].append(retrieval_hit_rate(nearest, relevant[: max(k)], top_k=number))
        if bar is not None:
            bar.update(len(some))
    return torch.stack(precisions), {number: torch.stack(x) for number, x in hits.items()}


def _percent(x: torch.Tensor) -> tuple[float, float]:
    """The mean of (n,) in [0, 1] and its standard error, in percent."""
    x = 100 * x.double()
    return float(x.mean()), float(x.std(correction=0)) / len(x) ** 0.5
