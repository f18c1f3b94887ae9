"""What an encoder must beat before its training has shown anything: itself untrained, a random ViT, and a thumbnail."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ldae.probes.protocol import Protocol
from ldae.probes.subject import Subject
from modeling_ldae import LDAELayer

TITLES = {"floor": "untrained", "random_vit": "random ViT", "thumbnail": "thumbnail"}  # by their keys in results
SIDE = 8  # pixels of a thumbnail's sides


@dataclass
class Baseline:
    """One baseline: its key in results, what it is, and by which protocols it is measured."""

    key: str
    description: str
    subject: Subject
    protocols: list[Protocol]


def baselines(subject: Subject, protocols: Sequence[Protocol]) -> Iterator[Baseline]:
    """The baselines of a subject.

    - "floor" is the same network with fresh weights.
    - "random_vit", of an l-DAE only, is that network with open gates, since its fresh blocks are the identity.
    - "thumbnail" is the image itself in 8 x 8 pixels.

    Protocols that train the encoder measure the first alone, and those that need the features of patches not the last.
    """
    is_ldae = subject.encoder.config.model_type == "ldae"
    same = " and the same tokenizer" if is_ldae else ""
    fresh = replace(subject, encoder=subject.encoder.untrained(subject.seed), known={}, predictions={})
    yield Baseline("floor", f"the same network with fresh weights{same}", fresh, list(protocols))
    frozen = [protocol for protocol in protocols if not protocol.trains_encoder]
    if is_ldae:
        opened = subject.encoder.untrained(subject.seed)
        open_gates(opened.model)
        random = replace(subject, encoder=opened, known={}, predictions={})
        yield Baseline("random_vit", "the untrained baseline with the gates of its blocks open", random, frozen)
    pooled = [protocol for protocol in frozen if not protocol.needs_tokens]
    thumbnail = replace(subject, represent=thumbnail_features, tokens=False, known={}, predictions={})
    yield Baseline("thumbnail", f"the image itself in {SIDE} x {SIDE} pixels", thumbnail, pooled)


@torch.no_grad()
def open_gates(model: nn.Module):
    """Makes the blocks of an untrained l-DAE those of a plain ViT: both gates of each block are 1.

    A fresh block is the identity (adaLN-Zero, DiT): the modulation of its norms and gates is 0 whatever t is. With gates of 1
    it is h + attention(norm(h)), then h + mlp(norm(h)), with Xavier-uniform weights.
    """
    for layer in model.modules():
        if isinstance(layer, LDAELayer):  # the modulation is (shift, scale, gate) of attention, then of the MLP
            layer.modulation.bias.view(6, -1)[[2, 5]] = 1.0


def thumbnail_features(pixel_values: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) as features (B, C * SIDE * SIDE): the pixels of the antialiased, resized image."""
    small = nn.functional.interpolate(pixel_values, (SIDE, SIDE), mode="bilinear", antialias=True)
    return small.flatten(1)
