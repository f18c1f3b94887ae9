"""What a vision encoder costs an image, counted as timm's cards count it: parameters, products, activations."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedConfig
from transformers.initialization import no_init_weights

from configuration_ldae import pair


@dataclass(frozen=True)
class Counts:
    """The cost of one image's forward pass.

    Args:
        parameters: that are trained; buffers, such as a tokenizer's, are none.
        macs: multiplications with an addition, in all matrix products and convolutions, those of attention among them.
        activations: numbers that linear layers and convolutions put out.
    """

    parameters: int
    macs: int
    activations: int


def count_encoder(config: PreTrainedConfig) -> Counts:
    """Counts the encoder that transformers' `AutoModel` makes of a configuration, at its size of image."""
    with no_init_weights():
        model = AutoModel.from_config(config)
    return count(model, torch.zeros(1, config.num_channels, *pair(config.image_size)))


def count(model: nn.Module, pixel_values: torch.Tensor) -> Counts:
    """Counts a forward pass of a model on one image (1, C, H, W)."""
    outputs: list[int] = []
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    hooks = [layer.register_forward_hook(lambda _, __, output: outputs.append(output.numel())) for layer in layers]
    # written out, since a fused attention has no products to count on every device
    flops = FlopCounterMode(display=False)
    with torch.no_grad(), flops, sdpa_kernel(SDPBackend.MATH):
        model.eval()(pixel_values)
    for hook in hooks:
        hook.remove()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Counts(parameters, flops.get_total_flops() // 2, sum(outputs))
