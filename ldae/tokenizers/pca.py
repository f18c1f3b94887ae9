"""Patch-wise PCA (paper, section 4.2 and figure 4): fits the model's tokenizer to images, in one streaming pass."""

import math
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ldae.data.images import ImageDataset
from ldae.data.order import evaluation_loader, to_pixel_values
from modeling_ldae import ConvTokenizer, LDAEForPreTraining, PatchTokenizer, patchify

SCALE_PATCHES = 50_000  # that a scale is fitted to
HELD_IMAGES = 1_000  # on which a tokenizer is measured


class PatchMoments:
    """Number, sum and sum of outer products of patches, in float64 and O(D^2) memory."""

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, patches: torch.Tensor):
        """Adds patches (..., D)."""
        patches = patches.reshape(-1, patches.shape[-1]).double()
        self.count += len(patches)
        self.sum += patches.sum(0)
        self.outer.addmm_(patches.T, patches)

    def all_reduce(self):
        """Adds up the moments of all processes, where there are several."""
        if dist.is_available() and dist.is_initialized():
            for tensor in (self.count, self.sum, self.outer):
                dist.all_reduce(tensor)

    def second_moment(self, about: torch.Tensor) -> torch.Tensor:
        """The mean (D, D) of (x - about) (x - about)^T, in float64."""
        cross = (self.sum / self.count).outer(about)
        return self.outer / self.count - cross - cross.T + about.outer(about)

    def variance(self) -> torch.Tensor:
        """The variance (D,) of each number of a patch, in float64.

        Raises:
            ValueError: if no patch was seen, or one was not finite.
        """
        self._check()
        return self.outer.diagonal() / self.count - (self.sum / self.count).square()

    def _check(self):
        if self.count == 0:
            raise ValueError("PCA needs at least one image, got none")
        if not torch.isfinite(self.outer).all():
            raise ValueError("PCA got images with numbers that are not finite")

    def components(self, subtract_mean: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """mean (D,), principal components (D, D) as rows, and the variance along each (D,), largest first, in float64.

        The sign of a component is such that its largest entry is positive. Without `subtract_mean`, the mean is zero and
        the "variance" is the second moment about zero.

        Raises:
            ValueError: if no patch was seen, or one was not finite.
        """
        self._check()
        mean = self.sum / self.count if subtract_mean else torch.zeros_like(self.sum)
        covariance = self.outer / self.count - mean.outer(mean)
        variance, vectors = torch.linalg.eigh(covariance)
        variance, components = variance.flip(0).clamp(min=0), vectors.T.flip(0)
        largest = components.abs().argmax(dim=1, keepdim=True)
        return mean, components * components.gather(1, largest).sign(), variance


@torch.no_grad()
def fit_tokenizer(
    tokenizer: PatchTokenizer | ConvTokenizer, config, batches: Iterable[torch.Tensor]
) -> PatchTokenizer | ConvTokenizer:
    """Fills the tokenizer with the PCA of the images' patches; for other types than "pca" with their scale alone.

    Args:
        tokenizer: `model.ldae.tokenizer`.
        config: the model's `LDAEConfig`: `subtract_mean` and `latent_scaling` decide mean and scale.
        batches: images (B, C, H, W) in [-1, 1]. With several processes each brings its own share; all get the same result.

    Raises:
        ValueError: if there is no image, or one is not finite.
    """
    device, convolutional = tokenizer.scale.device, config.tokenizer_type == "conv_vae"
    moments = PatchMoments(config.latent_dim if convolutional else config.patch_dim, device)
    if convolutional:
        tokenizer.scale.fill_(1)
    for pixel_values in batches:
        pixel_values = pixel_values.to(device)
        moments.update(tokenizer.encode(pixel_values) if convolutional else patchify(pixel_values, config.patch_hw))
    moments.all_reduce()
    if convolutional:
        variance = moments.variance()
        tokenizer.scale.copy_(_scale(variance, config.latent_scaling))
        tokenizer.spectrum.copy_(variance)
        return tokenizer
    mean, components, variance = moments.components(config.subtract_mean)
    if config.tokenizer_type == "pca":
        V, U, latent_variance = components[: config.latent_dim], None, variance[: config.latent_dim]
    else:
        if config.tokenizer_type == "pixels":
            V = U = torch.eye(config.patch_dim, dtype=torch.float64, device=components.device)
        else:  # trained before
            V, U, mean = (getattr(tokenizer, name).double() for name in ("V", "U", "mean"))
        latent_variance = ((V @ moments.second_moment(mean)) * V).sum(dim=1)
    tokenizer.V.copy_(V)
    tokenizer.U.copy_(V.T if U is None else U)
    tokenizer.mean.copy_(mean)
    tokenizer.scale.copy_(_scale(latent_variance, config.latent_scaling))
    tokenizer.spectrum.copy_(variance)
    return tokenizer


def _scale(variance: torch.Tensor, latent_scaling: str) -> torch.Tensor:
    """What latents of a variance (d,) are divided by, (d,)."""
    if latent_scaling == "global":
        variance = variance.mean().expand_as(variance)
    elif latent_scaling == "none":
        variance = torch.ones_like(variance)
    # a component without variance is constant: any scale does, but not zero, nor the root of rounding below zero
    return variance.clamp(min=1e-12).sqrt()


def explained_variance(tokenizer: PatchTokenizer) -> float:
    """The part of the patches' variance that the latent space holds, in [0, 1]."""
    spectrum = tokenizer.spectrum.double()
    return float(spectrum[: len(tokenizer.V)].sum() / spectrum.sum())


@torch.no_grad()
def variance_held(tokenizer: PatchTokenizer | ConvTokenizer, images: ImageDataset, patch_hw: tuple[int, int]) -> float:
    """The part of the patches' variance that a tokenizer gives back, at most 1: 1 - E ||x - x'||^2 / E ||x - E x||^2.

    Of up to 1,000 random images; for a fitted PCA of the same images it is `explained_variance`.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:HELD_IMAGES]
    moments, error = PatchMoments(math.prod(patch_hw) * images.num_channels), 0.0
    for batch in evaluation_loader(images, 64, 0, order.tolist()):
        if batch["pixel_values"] is not None:
            x = to_pixel_values(batch["pixel_values"]).to(tokenizer.scale.device)
            error += (x - tokenizer.decode(tokenizer.encode(x), x.shape[-2:])).double().square().sum().item()
            moments.update(patchify(x, patch_hw).cpu())
    total = float(moments.variance().sum() * moments.count)
    return 1 - error / total if total > 0 else 1.0


def fit_to_images(
    model: LDAEForPreTraining, images: ImageDataset, max_patches: int = 1_000_000, num_workers: int = 0
) -> list[str]:
    """Fits the model's tokenizer to all patches of as many images, in random order, as hold `max_patches`; 0 takes all.

    A convolutional tokenizer, of which only the scale is fitted, is given at most 50,000 patches: each costs a pass of its
    encoder. A stream gives its first images. With several processes each reads its share. Shows a progress bar.

    Returns:
        The unreadable images, as "name: error".
    """
    state, bad = PartialState(), []
    if model.config.tokenizer_type == "conv_vae":
        max_patches = min(max_patches or SCALE_PATCHES, SCALE_PATCHES)
    num_patches = model.ldae.embeddings.position_embeddings.shape[1]
    limit = math.ceil(max_patches / num_patches) or sys.maxsize
    if images.streaming:
        share = range(state.process_index, limit, state.num_processes)
    else:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(images.seed))[:limit]
        share = order[state.process_index :: state.num_processes].tolist()

    def batches():
        loader = evaluation_loader(images, 64, num_workers, share)
        for batch in tqdm(loader, "PCA of patches", disable=not state.is_main_process):
            bad.extend(batch["bad"])
            if batch["pixel_values"] is not None:
                yield to_pixel_values(batch["pixel_values"])

    fit_tokenizer(model.ldae.tokenizer, model.config, batches())
    return gather_object(bad) if state.num_processes > 1 else bad
