"""Metrics as `evaluate` modules. They are defined here because `evaluate.load` fetches its scripts from the Hub."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Accuracy in percent with its binomial standard error, 100 sqrt(p (1 - p) / n), also in percent.

    >>> Accuracy().compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    {'accuracy': 75.0, 'standard_error': 21.650635094610966}

    Everything is kept in memory, so processes do not share any file.
    """

    def __init__(self, **kwargs):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The percentage of predictions that are right, with its binomial standard error.",
            citation="",
            inputs_description="predictions, references: class numbers (n,).",
            features=datasets.Features(predictions=datasets.Value("int64"), references=datasets.Value("int64")),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        right = float(np.mean(np.asarray(predictions) == np.asarray(references)))
        return {"accuracy": 100 * right, "standard_error": 100 * (right * (1 - right) / len(references)) ** 0.5}
