"""The accuracy as a metric of evaluate."""

import pytest
import torch

from ldae.metrics import Accuracy


def test_accuracy_in_percent_with_its_standard_error():
    result = Accuracy().compute(predictions=[0, 1, 1, 0], references=torch.tensor([0, 1, 0, 0]))
    assert result == {"accuracy": 75.0, "standard_error": pytest.approx(100 * (0.75 * 0.25 / 4) ** 0.5)}


def test_accuracy_writes_no_files(tmp_path):
    Accuracy(cache_dir=str(tmp_path)).compute(predictions=[0], references=[0])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
