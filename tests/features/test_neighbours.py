"""Neighbours and the ways to centre features, beside scikit-learn's."""

import pytest
import torch
from sklearn.covariance import OAS
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from ldae.features import neighbours


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Features (40, 5) and others (30, 5) of unlike means and scales, of which one is constant."""
    generator = torch.Generator().manual_seed(0)
    reference, others = (torch.randn(n, 5, generator=generator) * torch.arange(1, 6) + 3 for n in (40, 30))
    reference[:, 3] = others[:, 3] = 7
    return reference, others


@pytest.mark.parametrize("k", [3, 50])
def test_the_nearest_are_scikit_learns(features, monkeypatch, k):
    monkeypatch.setattr(neighbours, "BATCH", 7)
    keys, queries = features
    cosines, places = neighbours.nearest(queries, keys, k)
    distances, expected = NearestNeighbors(metric="cosine").fit(keys).kneighbors(queries, min(k, 40))
    assert (places.numpy() == expected).all()
    torch.testing.assert_close(cosines, torch.from_numpy(1 - distances).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("scale", "with_std"), [(neighbours.centred, False), (neighbours.standardised, True)])
def test_features_are_centred_and_standardised_as_scikit_learns(features, scale, with_std):
    scaler = StandardScaler(with_std=with_std).fit(features[0].double())
    for part, got in zip(features, scale(*features), strict=True):
        expected = torch.from_numpy(scaler.transform(part.double())).float()
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_cosines_of_whitened_features_are_those_of_the_metric_of_mahalanobis(features):
    """x P y / sqrt(x P x · y P y) with the precision P of scikit-learn's estimate."""
    baseline = OAS().fit(features[0].double())
    reference, others = (part.double().numpy() - baseline.location_ for part in features)
    products = reference @ baseline.precision_ @ others.T
    lengths = [((part @ baseline.precision_) * part).sum(axis=1) ** 0.5 for part in (reference, others)]
    expected = torch.from_numpy(products / lengths[0][:, None] / lengths[1]).float()
    keys, queries = map(torch.nn.functional.normalize, neighbours.whitened(*features))
    torch.testing.assert_close(keys @ queries.T, expected, atol=1e-5, rtol=0)


def test_whitened_features_are_uncorrelated():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(5000, 6, generator=generator) @ (torch.eye(6) + 0.3 * torch.ones(6, 6)) + 4
    (white,) = neighbours.whitened(mixed)
    torch.testing.assert_close(white.T @ white / 5000, torch.eye(6), atol=0.02, rtol=0)
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(6), atol=1e-5, rtol=0)


def test_few_images_and_features_that_never_vary_are_whitened_to_finite_numbers(features):
    few = features[0][:2]
    assert all(part.isfinite().all() for part in neighbours.whitened(few, features[1]))
    same = torch.full((9, 5), 2.5)
    white, others = neighbours.whitened(same, features[1])
    assert not white.any()
    torch.testing.assert_close(others.norm(dim=1), (features[1] - 2.5).norm(dim=1))


def test_the_rounding_of_a_constant_feature_is_not_blown_up():
    constant = 0.7 + 3e-8 * torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    (scaled,) = neighbours.standardised(constant)
    assert scaled.abs().max() < 1e-6
