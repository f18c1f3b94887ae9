"""k-NN and retrieval, which train nothing, against scikit-learn."""

import numpy as np
import pytest
import torch
from blobs import accuracy, blobs, measure
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import OAS
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from ldae.features.extraction import Features
from ldae.probes import Knn
from ldae.probes.knn import KnnWhitened, knn_predictions
from ldae.probes.predictions import unpack
from ldae.probes.retrieval import Retrieval, rank


@pytest.mark.parametrize("k", [1, 20])
def test_knn_equals_scikit_learn(k):
    train, validation = blobs(400, 1), blobs(300, 2)
    baseline = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    predictions = baseline.fit(train.features, train.labels).predict(validation.features)
    expected = 100 * np.mean(predictions == validation.labels.numpy())
    assert 30 < expected < 95  # a test that could tell
    assert accuracy(train, validation, knn_k=k) == pytest.approx(expected)


def test_knn_weights_by_similarity():
    """One close neighbour outvotes two far ones, unless the temperature makes them equal."""
    angles = torch.tensor([0.1, 1.0, 1.1])
    train = Features(torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0, 1, 1]))
    query = Features(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert accuracy(train, query, knn_k=3, knn_temperature=0.07) == 100
    assert accuracy(train, query, knn_k=3, knn_temperature=100.0) == 0


def test_k_is_at_most_the_number_of_training_images():
    train, validation = blobs(5, 1), blobs(9, 2)
    assert accuracy(train, validation, knn_k=20) == accuracy(train, validation, knn_k=5)


def test_knn_also_votes_on_standardised_features():
    train, validation = blobs(200, 1), blobs(300, 2)
    scaler = StandardScaler().fit(train.features.double())
    scaled = [
        Features(torch.tensor(scaler.transform(part.features.double())).float(), part.labels)
        for part in (train, validation)
    ]
    result = measure(Knn(), train, validation)
    assert result["accuracy_standardised"] == pytest.approx(accuracy(*scaled))
    right = unpack(result["predictions_standardised"]) == validation.labels.numpy()
    assert 100 * right.mean() == pytest.approx(result["accuracy_standardised"])
    assert result["accuracy_standardised"] > result["accuracy"] + 2  # the scales of blobs hide most of their features


def test_whitening_finds_what_stronger_directions_hide():
    generator = torch.Generator().manual_seed(0)
    mixing, _ = torch.linalg.qr(torch.randn(14, 14, generator=generator))

    def hidden(part):
        """Features (n, 14) of which two strong directions, in no axis alone, hold noise."""
        even = part.features / torch.logspace(-3, 2, 12)
        return Features(torch.cat([even, 30 * torch.randn(len(even), 2, generator=generator)], 1) @ mixing, part.labels)

    train, validation = hidden(blobs(400, 1)), hidden(blobs(300, 2))
    result = measure(KnnWhitened(), train, validation)
    axes = np.linalg.cholesky(OAS().fit(train.features.double()).precision_)
    by_hand = [Features(part.features @ torch.from_numpy(axes).float(), part.labels) for part in (train, validation)]
    mean = by_hand[0].features.mean(dim=0)
    by_hand = [Features(part.features - mean, part.labels) for part in by_hand]
    assert result["accuracy"] == pytest.approx(accuracy(*by_hand), abs=0.34)  # one image of 300
    assert result["accuracy"] > accuracy(train, validation) + 10
    assert result["accuracy"] > measure(Knn(), train, validation)["accuracy_standardised"] + 3


def test_retrieval_equals_scikit_learn():
    train, validation = blobs(200, 1), blobs(300, 2)
    result = measure(Retrieval(retrieval_k=[10, 1]), train, validation)
    normalise = torch.nn.functional.normalize
    similarity = normalise(validation.features) @ normalise(train.features).T
    relevant = train.labels == validation.labels[:, None]
    precisions = [100 * average_precision_score(y, s) for y, s in zip(relevant, similarity, strict=True)]
    assert result["map"] == pytest.approx(np.mean(precisions), abs=1e-3)
    assert result["standard_error"] == pytest.approx(np.std(precisions) / 300**0.5, abs=1e-3)
    assert list(result["recall"]) == ["1", "10"]
    for k in (1, 10):
        hits = relevant.gather(1, similarity.topk(k).indices).any(dim=1).double()
        got = result["recall"][str(k)]
        assert got["recall"] == pytest.approx(100 * hits.mean().item())
        assert got["standard_error"] == pytest.approx(100 * hits.std(correction=0).item() / 300**0.5)
    nearest = accuracy(train, validation, knn_k=1)
    assert result["recall"]["1"]["recall"] == pytest.approx(nearest)


def test_dissimilar_images_count():
    """torchmetrics leaves scores below 0 out; cosines may be."""
    train = Features(torch.tensor([[-1.0, 0.1], [-1.0, 0.0]]), torch.tensor([0, 1]))
    queries = Features(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    precisions, hits = rank(train, queries, [1, 2])
    assert precisions.tolist() == [1.0, 0.5]
    assert {k: x.tolist() for k, x in hits.items()} == {1: [1.0, 0.0], 2: [1.0, 1.0]}


def test_a_class_without_training_images_counts_as_0():
    train = Features(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    queries = Features(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    result = measure(Retrieval(retrieval_k=[5]), train, queries)
    assert (result["map"], result["recall"]["5"]["recall"]) == (50, 50)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**16))
def test_any_shape(num_train, num_queries, num_classes, k, seed):
    train, queries = blobs(num_train, seed, num_classes, 3), blobs(num_queries, seed + 1, num_classes, 3)
    predictions = knn_predictions(train, queries.features, num_classes, k)
    assert predictions.shape == (num_queries,)
    assert set(predictions.tolist()) <= set(train.labels.tolist())
    precisions, hits = rank(train, queries, sorted({1, k}))
    assert precisions.shape == hits[1].shape == hits[k].shape == (num_queries,)
    assert (hits[1] <= hits[k]).all()
    assert (precisions[hits[1] == 1] > 0).all()
    there = torch.isin(queries.labels, train.labels)
    assert torch.equal(precisions > 0, there)
