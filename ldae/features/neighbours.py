"""Which features are near each other, by cosine similarity."""

import torch
from torch import nn

BATCH = 256  # features that are compared with all others at once


def as_they_are(*features: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The features (n, E) of the reference and of others, untouched."""
    return features


def centred(reference: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Features (n, E), each of mean 0 over the reference's images, and others by the same mean.

    Features of an encoder without it point in much the same direction, whatever the image.
    """
    mean = reference.mean(dim=0)
    return [features - mean for features in (reference, *others)]


def standardised(reference: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Features (n, E), each of mean 0 and deviation 1 over the reference's images, and others by the same numbers.

    A feature that is the same for all of these images, but for rounding, is only centred.
    """
    variance, mean = torch.var_mean(reference, dim=0, correction=0)
    deviation = torch.where(variance > (1e-6 * mean).square(), variance.sqrt(), 1)
    return [(features - mean) / deviation for features in (reference, *others)]


def whitened(reference: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Features (n, E), uncorrelated and of mean 0 and deviation 1 over the reference's images, and others by the same axes.

    A cosine then gives every direction the same say, and not most of it to the few in which the features vary most. The
    covariance of few images is shrunk towards a multiple of the identity by as much as Chen et al. (2010, "OAS") advise, so
    that directions in which they happen not to vary are not blown up.
    """
    from sklearn.covariance import oas  # scikit-learn takes a second to import

    mean = reference.mean(dim=0)
    covariance, _ = oas((reference - mean).double().cpu().numpy(), assume_centered=True)
    variances, axes = torch.linalg.eigh(torch.from_numpy(covariance))
    scaled = axes * torch.where(variances > 0, variances, 1).rsqrt()  # (E, E)
    return [(features - mean) @ scaled.to(features) for features in (reference, *others)]


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
