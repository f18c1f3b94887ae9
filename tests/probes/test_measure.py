"""`probe` on tiny models: an encoder beside its baselines."""

import pytest
from blobs import measure

from ldae import LDAEForPreTraining
from ldae.features.encoders import Encoder
from ldae.features.extraction import extract_features
from ldae.probes import Knn, LinearFast, Subject, best_baseline, format_probe, probe, unpack
from ldae.probes.retrieval import Retrieval


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
    title, knn = format_probe(result).splitlines()
    assert (title.split(), knn.split()[0], knn.count("±"), "–" in knn) == (["in", "%", "encoder"], "knn", 1, False)


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
