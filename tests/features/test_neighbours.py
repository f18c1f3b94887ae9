"""Neighbours and the ways to centre features, beside scikit-learn's."""

import pytest
import torch
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
