"""Learning rate and parameter groups of pre-training (paper, appendix)."""

import math

import torch


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
