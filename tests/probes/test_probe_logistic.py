"""The protocols by logistic regression, linear-fast and few-shot, against scikit-learn."""

import numpy as np
import pytest
import torch
from blobs import blobs, measure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from ldae.features.extraction import Features
from ldae.probes import LinearFast
from ldae.probes.few_shot import FewShot, draw
from ldae.probes.linear_fast import batch_norm, logistic_regression, predict
from ldae.probes.protocol import held_out_mask
from ldae.seeds import mix_seed


def test_forty_iterations_suffice_for_ill_conditioned_features():
    """Pooled features of a transformer have variances that differ by a factor of a million along their principal axes."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 5, 600)
    axes = rng.normal(size=(5, 24))[classes] + rng.normal(size=(600, 24))
    mixed = torch.tensor(axes * np.logspace(0, -3, 24) @ rng.normal(size=(24, 24)))
    features = (mixed - mixed.mean(0)) / mixed.std(0)
    baseline = LogisticRegression(C=1 / (1e-5 * 600), tol=1e-10, max_iter=20000).fit(features, classes)
    weights = logistic_regression(features.float(), torch.tensor(classes), 5, 1e-5, iterations=40)
    chances = (features @ weights[:-1].double() + weights[-1].double()).log_softmax(1)
    expected = torch.tensor(baseline.predict_log_proba(features))
    loss, best = (-float(each[torch.arange(600), classes].mean()) for each in (chances, expected))
    assert loss == pytest.approx(best, rel=1e-2)


@pytest.mark.parametrize("l2", [1e-6, 0])
def test_features_without_independence_are_fitted_with_the_least_penalty(l2):
    """Two classes, and features of which most are sums of others: rounding makes some eigenvalues of float32 negative."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 2, generator=generator) @ torch.randn(2, 384, generator=generator)
    features = batch_norm(features)(features)
    labels = (features[:, 0] > 0).long()
    weights = logistic_regression(features, labels, 2, l2, iterations=20)
    assert weights.isfinite().all()
    assert (predict(features, weights) == labels).double().mean() > 0.99


def test_linear_equals_scikit_learn_on_standardised_features():
    train, validation = blobs(600, 1), blobs(500, 2)
    result = measure(LinearFast(), train, validation)
    mean, variance = train.features.mean(0), train.features.var(0, correction=0)
    standardised = [
        ((part.features - mean) / (variance + 1e-5).sqrt()).double().numpy() for part in (train, validation)
    ]
    baseline = LogisticRegression(C=1 / (result["settings"]["l2"] * 600), tol=1e-8, max_iter=2000)
    expected = 100 * baseline.fit(standardised[0], train.labels).score(standardised[1], validation.labels)
    assert 30 < expected < 95
    assert result["accuracy"] == pytest.approx(expected, abs=0.21)  # one image of 500 on the boundary


def test_linear_has_batch_norm():
    """BatchNorm makes the probe blind to the features' scales; scikit-learn without it is not."""
    linear = LinearFast(linear_fast_iterations=100)
    train, validation = blobs(600, 1), blobs(500, 2)
    factor = torch.logspace(1, -1, 12)
    # the smallest features have deviation 2.5e-3, whose square is below BatchNorm's epsilon
    big = [Features(part.features * 1e3, part.labels) for part in (train, validation)]
    scaled = [Features(part.features * factor, part.labels) for part in big]
    assert measure(linear, *big)["accuracy"] == pytest.approx(measure(linear, *scaled)["accuracy"], abs=0.21)
    with_norm = measure(linear, train, validation)
    C = 1 / (with_norm["settings"]["l2"] * len(train))
    raw = LogisticRegression(C=C, max_iter=5000).fit(train.features.double(), train.labels)
    difference = 100 * raw.score(validation.features.double(), validation.labels) - with_norm["accuracy"]
    assert abs(difference) > 2


def test_the_choice_of_l2_never_sees_validation():
    train, validation = blobs(300, 1), blobs(300, 2)
    permuted = Features(validation.features, validation.labels[torch.randperm(300)])
    one, other = measure(LinearFast(), train, validation), measure(LinearFast(), train, permuted)
    assert one["settings"] == other["settings"]
    assert one["accuracy"] != other["accuracy"]


def test_the_choice_of_l2_is_the_best_on_held_out_images():
    """With few images and many useless features, weak penalties overfit; the choice must see that."""
    labels = torch.arange(120) % 3
    features = torch.randn(120, 100)
    features[:, 0] += 3 * labels
    found = measure(LinearFast(), Features(features, labels), Features(features, labels))["settings"]
    held_out = held_out_mask(120, 0)  # of the seed that `measure` has by default
    mean, deviation = features.mean(0), (features.var(0, correction=0) + 1e-5).sqrt()
    x, y = ((features - mean) / deviation).double().numpy(), labels.numpy()
    losses = found["held_out_cross_entropy"]
    for l2 in (1e-2, 1e-3):
        baseline = LogisticRegression(C=1 / (l2 * 96), tol=1e-8, max_iter=20000).fit(x[~held_out], y[~held_out])
        expected = log_loss(y[held_out], baseline.predict_proba(x[held_out]))
        assert losses[f"{l2:g}"] == pytest.approx(expected, rel=1e-3)
    assert losses[f"{found['l2']:g}"] == min(losses.values())
    assert len(set(losses.values())) > 1


def test_linear_is_deterministic():
    train, validation = blobs(300, 1), blobs(300, 2)
    one, again = (measure(LinearFast(), train, validation, seed=3) for _ in range(2))
    assert {**one, "seconds": 0} == {**again, "seconds": 0}


def test_linear_needs_two_images():
    with pytest.raises(ValueError, match="at least 2 training images, got 1"):
        measure(LinearFast(), blobs(1, 1), blobs(5, 2))


def test_held_out_mask():
    assert held_out_mask(100, 0).sum() == 20
    assert held_out_mask(2, 0).sum() == 1
    assert torch.equal(held_out_mask(100, 0), held_out_mask(100, 0))
    assert not torch.equal(held_out_mask(100, 0), held_out_mask(100, 1))


def test_draws_take_as_many_of_each_class():
    labels = torch.tensor([0, 2, 2, 0, 2, 2, 0, 2])
    drawn = [draw(labels, labels.unique(), 2, seed) for seed in (0, 0, 1, 2, 3)]
    for indices in drawn:
        assert labels[indices].tolist() == [0, 0, 2, 2]
        assert len(set(indices.tolist())) == 4
    assert torch.equal(drawn[0], drawn[1])
    assert len({tuple(indices.tolist()) for indices in drawn}) > 2


def test_few_shot_by_hand():
    train, validation = blobs(400, 1, spread=1), blobs(300, 2, spread=1)
    few_shot = FewShot(few_shot_shots=[5, 1], few_shot_draws=3)
    result = measure(few_shot, train, validation)
    assert list(result["shots"]) == ["1", "5"]
    normalise = batch_norm(train.features)
    for shots in (1, 5):
        accuracies = []
        for i in range(3):
            chosen = draw(train.labels, torch.arange(4), shots, mix_seed(0, shots, i))
            weights = logistic_regression(
                normalise(train.features)[chosen], train.labels[chosen], 4, few_shot.few_shot_l2
            )
            right = predict(normalise(validation.features), weights) == validation.labels
            accuracies.append(100 * right.double().mean().item())
        got = result["shots"][str(shots)]
        assert got["accuracy"] == pytest.approx(np.mean(accuracies), abs=0.2)
        assert got["deviation"] == pytest.approx(np.std(accuracies, ddof=1), abs=0.2)
        assert got["standard_error"] == pytest.approx(got["deviation"] / 3**0.5)
        assert got["accuracies"] == pytest.approx(accuracies, abs=0.4)  # one image of 300 on the boundary
    assert result["accuracy"] == result["shots"]["5"]["accuracy"] > result["shots"]["1"]["accuracy"]
    assert result["standard_error"] == result["shots"]["5"]["standard_error"]
    assert {**result, "seconds": 0} == {**measure(few_shot, train, validation), "seconds": 0}
    assert result["shots"] != measure(few_shot, train, validation, seed=1)["shots"]


def test_few_shot_of_all_images_equals_scikit_learn():
    """Where a draw takes every image there is, nothing is random."""
    train, validation = blobs(400, 1), blobs(500, 2)
    order = torch.cat([torch.where(train.labels == i)[0][:50] for i in range(4)])
    train = Features(train.features[order], train.labels[order])
    result = measure(FewShot(few_shot_shots=[50], few_shot_draws=2), train, validation)
    normalise = batch_norm(train.features)
    baseline = LogisticRegression(C=1 / (FewShot().few_shot_l2 * 200), tol=1e-8, max_iter=2000)
    baseline.fit(normalise(train.features).double(), train.labels)
    expected = 100 * baseline.score(normalise(validation.features).double(), validation.labels)
    assert 30 < expected < 95
    assert result["accuracy"] == pytest.approx(expected, abs=0.21)


def test_one_draw_has_the_binomial_error():
    train, validation = blobs(100, 1), blobs(100, 2)
    result = measure(FewShot(few_shot_shots=[3], few_shot_draws=1), train, validation)
    p = result["accuracy"] / 100
    assert result["standard_error"] == pytest.approx(100 * (p * (1 - p) / 100) ** 0.5)
    assert result["shots"]["3"]["deviation"] is None


@pytest.mark.parametrize(("classes", "fewest"), [([0, 0, 0, 1, 1], 2), ([0, 0, 0, 0, 0], 0)])
def test_classes_of_too_few_images_are_refused(classes, fewest):
    train = Features(torch.randn(5, 4), torch.tensor(classes))
    validation = Features(torch.randn(2, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=f"--few_shot_shots must be at most {fewest}, .*, got 3"):
        measure(FewShot(few_shot_shots=[4, 3]), train, validation)


def test_more_shots_than_a_class_has_images_are_left_out(capsys):
    train, validation = blobs(60, 1), blobs(30, 2)
    fewest = int(train.labels.bincount().min())
    result = measure(FewShot(few_shot_shots=[fewest + 1, 2], few_shot_draws=2), train, validation)
    assert list(result["shots"]) == ["2"]
    assert f"{fewest + 1} shots are left out, since the smallest class has {fewest} images" in capsys.readouterr().out
