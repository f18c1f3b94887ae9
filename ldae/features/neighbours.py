"""Which features are near each other, by cosine similarity."""

import torch
from torch import nn

BATCH = 256  # features that are compared with all others at once


def centred(reference: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Features (n, E), each of mean 0 over the reference's images, and others by the same mean.

    Features of an encoder without it point in much the same direction, whatever the image.
    """
    mean = reference.mean(dim=0)
    return [features - mean for features in (reference, *others)]


def standardised(reference: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Features (n, E), each of mean 0 and deviation 1 over the reference's images, and others by the same numbers.

    A feature that is the same for all of these images is only centred.
    """
    variance, mean = torch.var_mean(reference, dim=0, correction=0)
    deviation = torch.where(variance > 0, variance.sqrt(), 1)
    return [(features - mean) / deviation for features in (reference, *others)]


@torch.no_grad()
def nearest(
    queries: torch.Tensor, keys: torch.Tensor, k: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the k keys (n, E) that are nearest to each query (m, E), or all of them if they are fewer.

    Returns:
        Their cosines with the query and their places among the keys, both (m, k), on the CPU, the nearest first.
    """
    keys = nn.functional.normalize(keys.to(device))
    found = []
    for some in nn.functional.normalize(queries.to(device)).split(BATCH):
        cosines, places = (some @ keys.T).topk(min(k, len(keys)))
        found.append((cosines.cpu(), places.cpu()))
    cosines, places = (torch.cat(parts) for parts in zip(*found, strict=True))
    return cosines, places
