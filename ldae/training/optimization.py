"""Learning rate and parameter groups of pre-training and fine-tuning (paper, appendix)."""

import math
from collections.abc import Sequence

import torch
from torch import nn


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """Linear warm-up, then a half-cycle cosine to 0 (paper, appendix); progress and warmup are parts of the run in [0, 1]."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (min(progress, 1) - warmup) / (1 - warmup)))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices, which decay, and the rest, which does not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def layer_decay_groups(
    model: nn.Module, blocks: Sequence[nn.Module], head: nn.Module, weight_decay: float, layer_decay: float
) -> list[dict]:
    """Groups for layer-wise decay of the rate, each with "lr_scale" and "weight_decay", as timm's param_groups_layer_decay.

    With L blocks, counted from 0: what `model` registers before its blocks has the scale layer_decay^(L + 1), block i
    layer_decay^(L - i), what comes after (the final norm) the last block's, the head 1. Matrices decay; biases, norms,
    tokens and positions do not.

    Args:
        blocks, head: parts of `model`.
    """
    layers = {p: i for i, block in enumerate(blocks, start=1) for p in block.parameters()}
    heads = set(head.parameters())
    positions = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float], dict] = {}
    layer = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layers.get(parameter, len(blocks) if layer else 0)  # in the order of registration
        scale = 1.0 if parameter in heads else layer_decay ** (len(blocks) + 1 - layer)
        is_matrix = parameter.ndim > 1 and name.endswith("weight") and parameter not in positions
        key = scale, weight_decay if is_matrix else 0.0
        groups.setdefault(key, {"params": [], "lr_scale": key[0], "weight_decay": key[1]})["params"].append(parameter)
    return list(groups.values())
