"""How far generated images are from real ones: the Fréchet distance of two Gaussians, fitted to their features.

On Inception's features it is the FID of the paper's table 1; on another encoder's it is the same formula and another number.
"""

import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ldae.data.images import ImageDataset, to_pixel_values
from ldae.data.order import evaluation_loader
from ldae.features.encoders import Encoder, evaluating

INCEPTION_DIM = 2048


class PooledFeatures(nn.Module):
    """Images (B, C, H, W) in [-1, 1] of any size -> an encoder's representation (B, E), in float64."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder, self.num_features = encoder, encoder.width  # torchmetrics asks for the latter

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        image_hw = self.encoder.image_hw
        if tuple(pixel_values.shape[-2:]) != tuple(image_hw):
            pixel_values = nn.functional.interpolate(pixel_values, image_hw, mode="bicubic", antialias=True)
        return self.encoder.pool(pixel_values).double()


@torch.inference_mode()
def frechet_distance(
    real: ImageDataset | Iterable[torch.Tensor],
    fake: ImageDataset | Iterable[torch.Tensor],
    encoder: Encoder | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of the means and covariances of two sets' features, by torchmetrics.

    Args:
        real, fake: images: batches (B, C, H, W) in [-1, 1], or a data set.
        encoder: whose pooled features are taken; None: Inception's, with the original FID's weights and resizing, which
            torch-fidelity downloads once.
        batch_size, num_workers: how a data set is read.
        device: where Inception runs; an encoder runs where it is.

    Returns:
        "metric" ("FID", or which features the distance is on), "value", "num_real", "num_fake", "num_features" and
        "frechet_seconds"; the value is biased upwards for few images: compare only equal numbers of them.

    Raises:
        ImportError, OSError: if Inception's weights cannot be had; raised before any image is made.
        ValueError: for fewer than two readable images in a set.
    """
    start = time.perf_counter()
    if encoder is None:
        device = torch.device(device)
        metric, name = _inception().to(device), "FID"
        num_features = INCEPTION_DIM
    else:
        device = encoder.device
        features = PooledFeatures(encoder)
        metric, num_features = FrechetInceptionDistance(features).to(device), features.num_features
        name = f"Fréchet distance on features of {encoder.name}"
    counts = {}
    with evaluating(metric):
        for which, images in (("real", real), ("fake", fake)):
            counts[which] = 0
            for batch in _batches(images, batch_size, num_workers):
                batch = batch.to(device)
                if encoder is None:
                    batch = ((batch.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
                    batch = batch.expand(-1, 3, -1, -1) if batch.shape[1] == 1 else batch
                metric.update(batch, real=which == "real")
                counts[which] += len(batch)
            if counts[which] < 2:
                raise ValueError(
                    f"{which} holds {counts[which]} readable images, of which no covariance can be taken; give more"
                )
            if counts[which] <= num_features:
                warnings.warn(
                    f"{which} holds {counts[which]} images, too few for the {num_features} dimensions of the features: their "
                    "covariance is singular and the distance far too large",
                    stacklevel=3,  # beyond inference_mode
                )
        value = metric.compute().item()
    return {
        "metric": name,
        "value": value,
        "num_real": counts["real"],
        "num_fake": counts["fake"],
        "num_features": num_features,
        "frechet_seconds": time.perf_counter() - start,
    }


def _inception() -> FrechetInceptionDistance:
    """Resized as the original FID does it, without anti-aliasing, so that values compare with published ones."""
    instead = "or give an encoder (--encoder FOLDER) to measure on its features"
    try:
        return FrechetInceptionDistance(INCEPTION_DIM, antialias=False)
    except ModuleNotFoundError as error:
        raise ImportError(f"FID needs torch-fidelity: pip install torch-fidelity, {instead}") from error
    except OSError as error:
        raise OSError(
            f"FID needs Inception's weights, which could not be downloaded ({error}); try again, {instead}"
        ) from error


def _batches(
    images: ImageDataset | Iterable[torch.Tensor], batch_size: int, num_workers: int
) -> Iterator[torch.Tensor]:
    """Images (B, C, H, W) in [-1, 1]; unreadable ones are left out."""
    if isinstance(images, ImageDataset):
        for batch in evaluation_loader(images, batch_size, num_workers):
            if batch["pixel_values"] is not None:
                yield to_pixel_values(batch["pixel_values"])
    else:
        yield from images
