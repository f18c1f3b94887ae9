"""The protocols on features, against scikit-learn, and `probe` on tiny models."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from ldae import LDAEForPreTraining
from ldae.features.encoders import Encoder
from ldae.features.extraction import Features, extract_features
from ldae.metrics import Accuracy
from ldae.probes import Knn, LinearFast, Subject, best_baseline, format_probe, probe, unpack
from ldae.probes.few_shot import FewShot, draw
from ldae.probes.knn import knn_predictions
from ldae.probes.linear_fast import batch_norm, logistic_regression, predict
from ldae.probes.protocol import held_out_mask
from ldae.probes.retrieval import Retrieval, rank
from ldae.seeds import mix_seed


def blobs(n, seed, num_classes=4, width=12, spread=2.5):
    """Overlapping classes in features of very different scales."""
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=generator)
    features = centres[labels] + spread * torch.randn(n, width, generator=generator) + 1
    return Features(features * torch.logspace(-3, 2, width), labels)


def subject_of(train, validation, seed=0):
    """What protocols read of a subject whose features are known."""
    images = [SimpleNamespace(labels=part.labels.numpy()) for part in (train, validation)]
    encoder, known = SimpleNamespace(device=torch.device("cpu")), {"train": train, "validation": validation}
    return Subject(encoder, *images, seed=seed, known=known)


def measure(protocol, train, validation, seed=0):
    return protocol(subject_of(train, validation, seed))


def accuracy(train, validation, **options):
    return measure(Knn(**options), train, validation)["accuracy"]


# --------------------------------------------------------------------------------------------------------------- metric


def test_accuracy_in_percent_with_its_standard_error():
    result = Accuracy().compute(predictions=[0, 1, 1, 0], references=torch.tensor([0, 1, 0, 0]))
    assert result == {"accuracy": 75.0, "standard_error": pytest.approx(100 * (0.75 * 0.25 / 4) ** 0.5)}


def test_accuracy_adds_batches():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 0], references=[0, 1])
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute()["accuracy"] == pytest.approx(200 / 3)


def test_accuracy_writes_no_files(tmp_path):
    Accuracy(cache_dir=str(tmp_path)).compute(predictions=[0], references=[0])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------------------------ protocols


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Knn, {"knn_k": 0}),
        (Knn, {"knn_temperature": 0.0}),
        (LinearFast, {"linear_fast_l2": []}),
        (LinearFast, {"linear_fast_l2": [1e-3, -1e-3]}),
        (LinearFast, {"linear_fast_iterations": 0}),
        (FewShot, {"few_shot_shots": []}),
        (FewShot, {"few_shot_shots": [1, 0]}),
        (FewShot, {"few_shot_draws": 0}),
        (FewShot, {"few_shot_l2": -1.0}),
        (FewShot, {"few_shot_l2": float("nan")}),
        (Retrieval, {"retrieval_k": []}),
        (Retrieval, {"retrieval_k": [0]}),
    ],
)
def test_impossible_options_are_named(cls, options):
    cls().check()
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"--{name} ") as error:
        cls(**options).check()
    assert str(value) in str(error.value)


@pytest.mark.parametrize("cls", [Knn, LinearFast, FewShot, Retrieval])
def test_options_of_a_protocol(cls):
    """Options say what they do, bear the protocol's name, and are those that a result reports."""
    prefix = cls.name.replace("-", "_")
    for option in dataclasses.fields(cls):
        assert option.name.startswith(prefix + "_")
        assert option.metadata["help"].startswith(f"{cls.name}: ")
    small = {"few_shot_draws": 2} if cls is FewShot else {}
    validation = blobs(50, 2)
    subject = subject_of(blobs(150, 1), validation)
    result = cls(**small)(subject)
    assert {option.name for option in dataclasses.fields(cls)} <= set(result["settings"])
    assert result["description"] == cls(**small).description
    assert result["seconds"] > 0
    assert {cls.metric, "standard_error"} <= result.keys()
    if "predictions" in result:  # they are those that the accuracy counts
        right = unpack(result["predictions"]) == validation.labels.numpy()
        assert result["accuracy"] == pytest.approx(100 * right.mean())
        assert torch.equal(subject.labels, validation.labels)
    assert ("predictions" in result) == (cls in (Knn, LinearFast))
    if cls in (Knn, LinearFast):
        assert subject.predictions[cls.name].shape == (50,)


@pytest.mark.parametrize("cls", [Knn, LinearFast, FewShot, Retrieval])
def test_other_processes_measure_nothing(cls):
    subject = subject_of(blobs(50, 1), blobs(50, 2))
    subject.known = {"train": None, "validation": None}
    assert cls()(subject) is None


# ------------------------------------------------------------------------------------------------------------------ knn


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
    assert result["accuracy_standardised"] > result["accuracy"] + 2  # the scales of blobs hide most of their features


# --------------------------------------------------------------------------------------------------------- linear-fast


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
    labels = torch.arange(120) % 2
    features = torch.randn(120, 100)
    features[:, 0] += 3 * labels
    found = measure(LinearFast(), Features(features, labels), Features(features, labels))["settings"]
    held_out = found["held_out_accuracy"]
    assert held_out[f"{found['l2']:g}"] == max(held_out.values())
    assert len(set(held_out.values())) > 1


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


# -------------------------------------------------------------------------------------------------------------- few-shot


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
        measure(FewShot(few_shot_shots=[1, 3]), train, validation)


# ------------------------------------------------------------------------------------------------------------- retrieval


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


# ---------------------------------------------------------------------------------------------------------------- probe


def test_probe_gives_the_encoder_beside_its_baseline(labelled_images, tiny_model):
    encoder, seen = Encoder(tiny_model(LDAEForPreTraining), name="mine"), []
    subject = Subject(encoder, labelled_images, labelled_images)
    protocols = [Knn(knn_k=3), LinearFast()]
    result = probe(
        subject, protocols, data_name="noise", on_protocol=lambda result: seen.append(list(result["protocols"]))
    )
    assert (result["kind"], result["model"], result["identity"], result["seed"]) == (
        "probe", "mine", subject.identity, 0,
    )  # fmt: skip
    data = result["data"]
    assert (data["name"], data["num_classes"]) == ("noise", 2)
    assert [name.split(":")[0][-5:] for name in data["unreadable"]] == ["3.png"]
    features = extract_features(encoder, labelled_images)
    floor = extract_features(encoder.untrained(0), labelled_images)
    for part, of in (("protocols", features), ("floor", floor)):
        for protocol in protocols:
            got, expected = result[part][protocol.name], measure(protocol, of, of)
            assert {key: got[key] for key in expected if key != "seconds"} == {
                key: value for key, value in expected.items() if key != "seconds"
            }
    assert "fresh weights and the same tokenizer" in result["floor"]["description"]
    assert seen == [["knn"], *7 * [["knn", "linear-fast"]]]  # the encoder's figures, then those of three baselines
    labels = unpack(data["labels"])
    for part in ("protocols", "floor", "random_vit", "thumbnail"):
        for protocol in protocols:
            figures = result[part][protocol.name]
            right = unpack(figures["predictions"]) == labels
            assert (len(right), 100 * right.mean()) == (6, pytest.approx(figures["accuracy"]))
    assert subject.predictions["knn"].shape == (6,)


def test_probe_does_not_measure_again(labelled_images, tiny_model):
    subject = Subject(Encoder(tiny_model()), labelled_images, labelled_images)
    first = probe(subject, [Knn(knn_k=3)])
    first["protocols"]["knn"]["accuracy"] = -1.0
    result = probe(subject, [Knn(knn_k=3), Retrieval()], earlier=first)
    assert result["protocols"]["knn"]["accuracy"] == -1.0
    assert list(result["protocols"]) == ["knn", "retrieval"]
    alone = probe(Subject(Encoder(tiny_model()), labelled_images, labelled_images), [Retrieval()])
    for part in ("protocols", "floor"):
        assert result[part]["retrieval"]["map"] == alone[part]["retrieval"]["map"]


def test_tokens_do_not_stay_in_memory(labelled_images, tiny_model):
    subject = Subject(Encoder(tiny_model()), labelled_images, labelled_images, tokens=True)
    probe(subject, [Knn(knn_k=3)], baseline=False)
    assert [subject.known[split].tokens for split in ("train", "validation")] == [None, None]


def test_probe_without_baseline(labelled_images, tiny_model):
    subject = Subject(Encoder(tiny_model()), labelled_images, labelled_images)
    result = probe(subject, [Knn(knn_k=3)], baseline=False)
    assert result["floor"] == {}
    assert not {"random_vit", "thumbnail"} & result.keys()
    assert format_probe(result).splitlines()[1].split()[:2] == ["knn", "–"]


def test_the_best_baseline_stands_beside_the_encoder():
    def figures(accuracy):
        return {"accuracy": accuracy, "standard_error": 0.64}

    parts = {"floor": {"knn": figures(30.0)}, "thumbnail": {"description": "pixels", "knn": figures(40.0)}}
    result = {"protocols": {"knn": figures(61.25), "linear": figures(70.0)}, **parts}
    assert best_baseline(result, "knn") == ("thumbnail", figures(40.0))
    assert best_baseline(result, "linear") is None
    _, knn, linear = format_probe(result).splitlines()
    assert knn.split("  ")[0] == "knn"
    assert knn.index("40.0 ± 0.6") < knn.index("61.2 ± 0.6") < knn.index("(thumbnail)")
    assert linear.split() == ["linear", "–", "70.0", "±", "0.6"]
    del result["thumbnail"]  # files of earlier runs have the untrained baseline alone
    assert best_baseline(result, "knn") == ("floor", figures(30.0))
