"""What protocols that train classifiers step by step share: their images, batches and choice of a learning rate."""

import sys
from typing import Any

import torch

from ldae.features.extraction import Features
from ldae.probes.protocol import HELD_OUT, held_out_mask

BATCH_NORM_EPS = 1e-6  # as MAE's main_linprobe.py


def hold_out(train: Features, seed: int) -> torch.Tensor:
    """Chooses the training images that are held out, as a mask (n,) on the CPU. See `held_out_mask`.

    Raises:
        ValueError: if fewer than two images are left to learn from, which BatchNorm needs.
    """
    if len(train) < 3:
        raise ValueError(f"a probe that is trained in steps needs at least 3 training images, got {len(train)}")
    return held_out_mask(len(train), seed)


def batches(order: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Splits image numbers (n,) into batches; a last batch of one image is left out, since BatchNorm has no variance of it."""
    return [part for part in order.split(size) if len(part) > 1]


def percent_right(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    """The percentage of class numbers (n,) that are right."""
    return 100 * float((predictions == labels).float().mean())


def choose_learning_rate(accuracies: dict[float, float], option: str) -> dict[str, Any]:
    """Chooses the learning rate that is best on the held-out images, the smallest of equals, as "settings" of a result.

    A learning rate at the edge of the grid may not be the best there is; "rate_at_edge" and a line on stderr say so.

    Args:
        accuracies: in percent on the held-out images, by learning rate.
        option: the option that holds the grid.
    """
    rates = sorted(accuracies)
    rate = max(rates, key=accuracies.__getitem__)
    settings = {
        "rate": rate,
        "held_out_accuracy": {f"{r:g}": accuracies[r] for r in rates},
        "held_out": HELD_OUT,
        "batch_norm_eps": BATCH_NORM_EPS,
    }
    if len(rates) > 1 and rate in (rates[0], rates[-1]):
        settings["rate_at_edge"] = True
        print(f"--{option}: the best learning rate, {rate:g}, is at the edge of the grid; widen it", file=sys.stderr)
    return settings
