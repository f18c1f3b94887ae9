"""Length, learning rate and parameter groups of pre-training and fine-tuning (paper, appendix), and compilation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

ENDLESS = 1 << 40  # steps, where the clock ends a run


@dataclass
class Length:
    """How long a run is: until `max_steps` optimizer steps or `max_minutes` on the clock, whichever comes first."""

    max_steps: int
    max_minutes: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """The part of the run that is done after so many steps and seconds: 0 at its start, at least 1 when it is over."""
        by_clock = seconds / 60 / self.max_minutes if self.max_minutes is not None else 0
        return max(step / self.max_steps, by_clock)


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """The learning rate after a linear warm-up from 0 to `peak` and a half-cycle cosine to 0 (paper, appendix).

    Args:
        progress: the part of the run that is done, in [0, 1].
        warmup: the part of the run in which the learning rate rises, in [0, 1).
    """
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (min(progress, 1) - warmup) / (1 - warmup)))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Two groups of the trainable parameters: matrices, whose weights decay, and the rest, which do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def layer_decay_groups(
    model: nn.Module, blocks: Sequence[nn.Module], head: nn.Module, weight_decay: float, layer_decay: float
) -> list[dict]:
    """Groups for layer-wise decay of the learning rate, as timm's param_groups_layer_decay makes them.

    Each group has an "lr_scale" and a "weight_decay". Let there be L blocks, counted from 0. What `model` registers before
    its blocks has the scale layer_decay^(L + 1), and block i has layer_decay^(L - i). What comes after the blocks, such as the
    final norm, shares the last block's scale. The head's scale is 1. The weights of matrices decay; biases, norms, tokens and
    positions do not.

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


def compile_blocks(model: nn.Module):
    """Compiles each transformer block of a model in place, which takes much less time than compiling all of it at once.

    Blocks of one kind share what was compiled. The names of the parameters stay as they are. A model without blocks that are
    transformers' `GradientCheckpointingLayer` is compiled whole.
    """
    for block in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] or [model]:
        block.compile(
            dynamic=False
        )  # an encoder that drops tokens sees fewer than the decoder: a version for each number
