"""Subjects: what identifies them, and the features that their protocols share."""

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ldae.data import images
from ldae.data.images import ImageDataset, decode
from ldae.features import extraction
from ldae.features.encoders import Encoder
from ldae.features.extraction import extract_features
from ldae.probes import Subject


@pytest.fixture
def passes(monkeypatch):
    """Of every pass over images, whether it gave the features of patches."""
    passes = []

    def noted(*args, **kwargs):
        passes.append(kwargs.get("tokens", False))
        return extract_features(*args, **kwargs)

    monkeypatch.setattr(extraction, "extract_features", noted)
    return passes


def test_identity_tells_encoders_images_and_seeds_apart(labelled_images, tiny_model):
    encoder, fewer = Encoder(tiny_model()), ImageDataset(labelled_images.examples.select(range(6)), (8, 12))
    subjects = [
        Subject(encoder, labelled_images, labelled_images),
        Subject(encoder.untrained(), labelled_images, labelled_images),
        Subject(encoder, fewer, labelled_images),
        Subject(encoder, labelled_images, fewer),
        Subject(encoder, labelled_images, labelled_images, seed=1),
    ]
    assert len({subject.identity for subject in subjects}) == len(subjects)
    assert Subject(encoder, labelled_images, labelled_images).identity == subjects[0].identity


def test_a_subject_refuses_what_no_protocol_can_use(labelled_images, tiny_model, tmp_path):
    encoder = Encoder(tiny_model())

    def subject(examples):
        return Subject(encoder, ImageDataset(examples, (8, 12)), labelled_images)

    none = labelled_images.examples.remove_columns("label").add_column(
        "label", [None] * 7, feature=datasets.Value("int64")
    )
    with pytest.raises(ValueError, match="the training images have no labels"):
        subject(none).features("train")
    with pytest.raises(ValueError, match=r"training images, got none that can be read; the first is .*3\.png"):
        subject(labelled_images.examples.select([3])).features("train")
    encoder.model.layers[0].mlp.fc1.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="the validation features are not all finite"):
        subject(labelled_images.examples).features("validation")


def test_views_of_a_subject(labelled_images, tiny_model, tmp_path):
    subject = Subject(Encoder(tiny_model()), labelled_images, labelled_images, cache=tmp_path / "cache")
    one, other, unkept = subject.view(1), subject.view(2), subject.view(3, keep=False)
    assert subject.view(1) is one
    assert ("view", 3) not in subject.known
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    assert len({x.features.sum().item() for x in (one, other, unkept)}) == 3
    assert torch.equal(one.labels, subject.features("train").labels)


def test_views_decode_each_image_once(labelled_images, tiny_model, monkeypatch):
    calls = []
    monkeypatch.setattr(images, "decode", lambda *args: calls.append(args) or decode(*args))
    subject = Subject(Encoder(tiny_model()), labelled_images, labelled_images)
    subject.view(1)
    seen = len(calls)
    for number in range(2, 5):
        subject.view(number, keep=False)
    assert len(calls) - seen == 3  # the one that cannot be read


def test_only_protocols_that_need_tokens_skip_the_cache(labelled_images, tiny_model, passes, tmp_path):
    encoder = Encoder(tiny_model())

    def subject(tokens=True, cache=tmp_path / "cache"):
        passes.clear()
        return Subject(encoder, labelled_images, labelled_images, cache=cache, tokens=tokens)

    first = subject()  # nothing is in the cache: one pass gives both, and the pooled features are kept
    pooled, with_tokens = first.features("train"), first.features("train", tokens=True)
    assert with_tokens is pooled
    assert passes == [True]
    second = subject()  # the pooled features are read, the others computed
    read = second.features("train")
    assert passes == []
    assert torch.equal(read.features, pooled.features)
    again = second.features("train", tokens=True)
    assert passes == [True]
    assert torch.equal(again.tokens, with_tokens.tokens)
    assert torch.equal(again.features, pooled.features)
    assert second.features("train") is again
    second.drop_tokens()
    assert second.features("train").tokens is None
    assert second.features("train", tokens=True).tokens is not None
    assert passes == [True, True]
    uncached = subject(tokens=False, cache=None)  # no protocol was known to need them
    assert uncached.features("train").tokens is None
    assert uncached.features("train", tokens=True).tokens is not None
    assert passes == [False, True]


def test_other_features_than_the_encoders_are_not_kept(labelled_images, tiny_model, tmp_path):
    encoder, cache = Encoder(tiny_model()), tmp_path / "cache"
    usual = Subject(encoder, labelled_images, labelled_images, cache=cache).features("train").features
    mean = Subject(encoder, labelled_images, labelled_images, cache=cache, represent=lambda x: x.mean(dim=(2, 3)))
    assert mean.features("train").features.shape == (6, 3)
    assert mean.view(1).features.shape == (6, 3)
    assert len(list(cache.glob("*.safetensors"))) == 1
    assert usual.shape == (6, 16)


def test_precision_is_part_of_what_features_are(labelled_images, tiny_model, tmp_path):
    encoder, cache = Encoder(tiny_model()), tmp_path / "cache"
    identities, features = [], []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        subject = Subject(encoder, labelled_images, labelled_images, accelerator, cache=cache)
        assert subject.precision == precision
        identities.append(subject.identity)
        features.append(subject.features("train").features)
    AcceleratorState._reset_state(True)
    assert identities[0] != identities[1]
    exact, rounded = features
    assert len(list(cache.glob("*.safetensors"))) == 2
    assert exact.dtype == rounded.dtype == torch.float32
    assert 0 < (exact - rounded).norm() < 0.05 * exact.norm()
