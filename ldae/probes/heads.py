"""What the protocols share that train classifiers step by step: their images, batches and choice of a learning rate."""

import sys
from typing import Any

import torch

from ldae.features.extraction import Features
from ldae.probes.protocol import HELD_OUT, held_out_mask

BATCH_NORM_EPS = 1e-6  # as MAE's main_linprobe.py


def hold_out(train: Features, seed: int) -> torch.Tensor:
    """`held_out_mask` (n,) of the training images, on the CPU.

    Raises:
        ValueError: if fewer than two images are left to learn from, which is what BatchNorm needs.
    """
    if len(train) < 3:
        raise ValueError(f"a probe that is trained in steps needs at least 3 training images, got {len(train)}")
    return held_out_mask(len(train), seed)


def batches(order: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Image numbers (n,) in parts of `size`; a last part of one image is left out: BatchNorm has no variance of it."""
    return [part for part in order.split(size) if len(part) > 1]


def percent_right(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * float((predictions == labels).float().mean())


def choose_rate(accuracies: dict[float, float], option: str) -> dict[str, Any]:
    """The "settings" with the rate that is best on the held-out images, the smallest of equals.

    A rate at the edge of a grid may not be the best there is: "rate_at_edge" and a line on stderr say so.
    """
    rates = sorted(accuracies)
    rate = max(rates, key=accuracies.get)
    settings = {
        "rate": rate,
        "held_out_accuracy": {f"{r:g}": accuracies[r] for r in rates},
        "held_out": HELD_OUT,
        "batch_norm_eps": BATCH_NORM_EPS,
    }
    if len(rates) > 1 and rate in (rates[0], rates[-1]):
        settings["rate_at_edge"] = True
        print(f"--{option}: the best rate, {rate:g}, is at the edge of the grid; widen it", file=sys.stderr)
    return settings
