"""Standard errors of accuracies that were measured on the same images, by runs of several seeds."""

import math
from collections.abc import Iterable
from statistics import variance

import numpy as np


def paired_error(after: np.ndarray, before: np.ndarray) -> float:
    """The standard error of a difference in accuracy on the same images, in points; McNemar's for two single runs.

    Args:
        after, before: for each image, whether it is classified rightly, or the part of the seeds that do so (n,).
    """
    return 100 * float(np.std(after - before)) / math.sqrt(len(after))


def pooled_variance(groups: Iterable[list[float]]) -> float | None:
    """The variance within groups of values, pooled over all that have several; None where none has."""
    repeated = [(len(values) - 1, variance(values)) for values in groups if len(values) > 1]
    return sum(n * v for n, v in repeated) / sum(n for n, _ in repeated) if repeated else None
