"""Fits a tokenizer to images in one streaming pass: PCA (paper, section 4.2 and figure 4), or a trained one's scale."""

import math
import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ldae.data.images import ImageDataset, to_pixel_values
from ldae.data.order import evaluation_loader
from ldae.progress import progress_bar
from modeling_ldae import LDAEForPreTraining
from moments_ldae import PatchMoments
from tokenizers_ldae import PatchTokenizer, Tokenizer, patchify

SCALE_PATCHES = 50_000  # that a scale is fitted to
HELD_IMAGES = 1_000  # on which a tokenizer is measured


def explained_variance(tokenizer: PatchTokenizer) -> float:
    """The part of the patches' variance that the latent space holds, in [0, 1]."""
    spectrum = tokenizer.spectrum.cpu().double()  # Apple's MPS has no float64
    return float(spectrum[: len(tokenizer.V)].sum() / spectrum.sum())


@torch.no_grad()
def variance_held(tokenizer: Tokenizer, images: ImageDataset, patch_hw: tuple[int, int]) -> float:
    """The part of the patches' variance that a tokenizer gives back, at most 1: 1 - E ||x - x'||^2 / E ||x - E x||^2.

    Of up to 1,000 random images; for a fitted PCA of the same images it is `explained_variance`.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:HELD_IMAGES]
    moments, error = PatchMoments(math.prod(patch_hw) * images.num_channels), 0.0
    for batch in evaluation_loader(images, 64, 0, order.tolist()):
        if batch["pixel_values"] is not None:
            x = to_pixel_values(batch["pixel_values"]).to(tokenizer.scale.device)
            error += (x - tokenizer.decode(tokenizer.encode(x), x.shape[-2:])).cpu().double().square().sum().item()
            moments.update(patchify(x, patch_hw).cpu())
    total = float(moments.variance().sum() * moments.count)
    return 1 - error / total if total > 0 else 1.0


def fit_to_images(
    model: LDAEForPreTraining, images: ImageDataset, max_patches: int = 1_000_000, num_workers: int = 0
) -> list[str]:
    """Fits the model's tokenizer to the patches of random images, `max_patches` in all; 0 takes all patches of all images.

    A convolutional tokenizer, of which only the scale is fitted, is given at most 50,000 patches: each costs a pass of its
    encoder. A stream gives its first images. With several processes each reads its share. Shows a progress bar.

    Returns:
        The unreadable images, as "name: error".

    Raises:
        ValueError: if no image can be read.
    """
    state, bad = PartialState(), []
    if not model.ldae.tokenizer.linear:
        max_patches = min(max_patches or SCALE_PATCHES, SCALE_PATCHES)
    num_patches = model.ldae.embeddings.position_embeddings.shape[1]
    limit = math.ceil(max_patches / num_patches) or sys.maxsize
    if images.streaming:
        share = range(state.process_index, limit, state.num_processes)
    else:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(images.seed))[:limit]
        share = order[state.process_index :: state.num_processes].tolist()

    def batches():
        loader, readable = evaluation_loader(images, 64, num_workers, share), False
        for batch in progress_bar(loader, state.is_main_process, desc="patches"):
            bad.extend(batch["bad"])
            if batch["pixel_values"] is not None:
                readable = True
                yield to_pixel_values(batch["pixel_values"])
        if (everyones := gather_object(bad)) and not any(gather_object([readable])):
            raise ValueError(f"data: none of {len(everyones):,} images can be read; the first is {everyones[0]}")

    model.ldae.tokenizer.fit(batches(), model.config)
    return gather_object(bad)
