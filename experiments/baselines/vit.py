"""transformers' ViT as the encoder of the baselines that have no decoder."""

import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from modeling_ldae import sincos_positions

BLOCKS = (
    "image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size", "hidden_act", "layer_norm_eps", "qkv_bias",
)  # fmt: skip


def vit_config(model_args, **fields) -> ViTConfig:
    """The configuration of a ViT with the blocks that an l-DAE's options name, and further `fields`."""
    config = model_args.config()
    return ViTConfig(**{name: getattr(config, name) for name in BLOCKS}, **fields)


def encoder(config: ViTConfig) -> ViTModel:
    """A new ViT with fixed 2-D sin-cos positions and Xavier-uniform weights: those of MoCo v3's code, l-DAE and MAE.

    transformers' own initial values, of deviation 0.02 everywhere, are made for wide models and learned positions.
    """
    vit = ViTModel(config, add_pooling_layer=False)
    embeddings = vit.embeddings
    patches, positions = embeddings.patch_embeddings, embeddings.position_embeddings
    grid = tuple(i // p for i, p in zip(patches.image_size, patches.projection.kernel_size, strict=True))
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.xavier_uniform_(patches.projection.weight.flatten(1))  # a linear layer on patches, written as a convolution
    with torch.no_grad():
        positions.zero_()  # the class token's remains zero
        positions[0, 1:] = sincos_positions(grid, grid, config.hidden_size)
    positions.requires_grad_(False)
    return vit


def patch_mean(vit: ViTModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) -> the mean of the patch tokens (B, E), which is what all probes look at."""
    return vit(pixel_values).last_hidden_state[:, 1:].mean(dim=1)
