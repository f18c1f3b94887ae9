"""Features over a data set, against the model called by hand, and their cache."""

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from ldae import LDAEModel
from ldae.data.images import ImageDataset, to_pixel_values
from ldae.features import extraction
from ldae.features.encoders import Encoder
from ldae.features.extraction import cached_features, extract_features, shared_features

READABLE = (0, 1, 2, 4, 5, 6)


@pytest.fixture
def examples(tmp_path):
    """Seven noise images of two classes; the fourth is no image."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    paths[3].write_bytes(b"no image")
    return datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(path)} for path in paths], "label": [0, 1, 0, 1, 0, 1, 1]},
        features=datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["a", "b"])),
    )


@pytest.fixture
def images(examples):
    return ImageDataset(examples, (8, 12))


@pytest.fixture
def encoder(tiny_model):
    return Encoder(tiny_model(LDAEModel))


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def raw(images, indices, view=0):
    return torch.stack([images[view, i]["pixel_values"] for i in indices])


# ----------------------------------------------------------------------------------------------------------- extraction


@torch.no_grad()
def test_features_equal_the_model_called_by_hand(images, encoder):
    got = extract_features(encoder, images, batch_size=2)
    expected = encoder.model(to_pixel_values(raw(images, READABLE))).pooler_output
    torch.testing.assert_close(got.features, expected)
    assert got.labels.tolist() == [0, 1, 0, 0, 1, 1]
    assert [name[-5:] for name in got.names] == [f"{i}.png" for i in READABLE]
    assert got.tokens is None
    assert not got.features.requires_grad


def test_training_modes_are_restored(images, encoder):
    encoder.model.train()
    encoder.model.layers[0].eval()
    extract_features(encoder, images, indices=[0])
    assert encoder.model.training
    assert encoder.model.layers[1].training
    assert not encoder.model.layers[0].training


def test_a_data_set_without_a_readable_image_is_kept_as_empty(examples, encoder, tmp_path):
    images = ImageDataset(examples.select([3]), (8, 12))
    for _ in range(2):  # computed, then read
        got = cached_features(encoder, images, Accelerator(cpu=True), tmp_path / "cache")
        assert (len(got), tuple(got.features.shape), got.indices.tolist(), len(got.bad)) == (0, (0, 0), [], 1)


def test_unreadable_images_are_named_and_left_out(images, encoder):
    got = extract_features(encoder, images, batch_size=1)  # the unreadable one alone in its batch
    assert len(got) == 6
    assert len(got.bad) == 1
    assert "3.png" in got.bad[0]
    nothing = extract_features(encoder, images, indices=[3], tokens=True)
    assert (len(nothing), nothing.features.shape, nothing.bad) == (0, (0, 0), got.bad)


def test_indices_take_a_part(images, encoder):
    everything, part = extract_features(encoder, images), extract_features(encoder, images, indices=[4, 0])
    torch.testing.assert_close(part.features, everything.features[[3, 0]])  # 3: the unreadable one is left out


@torch.no_grad()
def test_tokens(images, encoder):
    got = extract_features(encoder, images, batch_size=4, tokens=True)
    assert (got.tokens.dtype, got.tokens.shape) == (torch.float16, (6, 6, 16))
    torch.testing.assert_close(got.tokens, encoder(to_pixel_values(raw(images, READABLE))).half())
    torch.testing.assert_close(got.tokens.float().mean(dim=1), got.features, atol=2e-3, rtol=2e-3)
    assert torch.equal(got.features, extract_features(encoder, images, batch_size=4).features)


@torch.no_grad()
def test_a_view_is_another_crop_and_the_same_for_the_same_number(examples, encoder):
    images = ImageDataset(examples, (8, 12), crop="random_resized", flip=True)
    one, again, other = (extract_features(encoder, images, view=view).features for view in (1, 1, 2))
    assert torch.equal(one, again)
    assert (one != other).any(dim=1).all()
    torch.testing.assert_close(one, encoder.pool(to_pixel_values(raw(images, READABLE, view=1))))


def test_one_process_takes_all(images, encoder, accelerator):
    one, shared = extract_features(encoder, images), shared_features(encoder, images, accelerator)
    assert torch.equal(one.features, shared.features)
    assert (one.names, one.bad) == (shared.names, shared.bad)


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def calls(monkeypatch):
    """Counts extractions."""
    calls = []

    def counting(*args, **kwargs):
        calls.append(kwargs)
        return extract_features(*args, **kwargs)

    monkeypatch.setattr(extraction, "extract_features", counting)
    return calls


def test_cache_computes_once(images, encoder, accelerator, calls, tmp_path):
    folder = tmp_path / "new" / "cache"
    one, again = (cached_features(encoder, images, accelerator, folder) for _ in range(2))
    assert len(calls) == 1
    for name in ("features", "labels"):
        assert torch.equal(getattr(one, name), getattr(again, name))
    assert (one.names, one.bad) == (again.names, again.bad)
    assert sorted(path.suffix for path in folder.iterdir()) == [
        ".safetensors",
        ".sha256",
    ]  # no half-written file is left
    cached_features(encoder, images, accelerator, None)
    assert len(calls) == 2


@pytest.mark.parametrize("damaged", ["cut", "flipped", "without-digest"])
def test_a_damaged_cache_is_named_and_computed_again(images, encoder, accelerator, calls, tmp_path, capsys, damaged):
    sound = cached_features(encoder, images, accelerator, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    if damaged == "cut":
        path.write_bytes(content[:-20])
    elif damaged == "flipped":
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    else:
        (tmp_path / f".{path.name}.sha256").unlink()
    again = cached_features(encoder, images, accelerator, tmp_path)
    assert f"{path} is damaged" in capsys.readouterr().out
    assert len(calls) == 2
    assert torch.equal(again.features, sound.features)
    cached_features(encoder, images, accelerator, tmp_path)
    assert len(calls) == 2


def test_cache_tells_apart(examples, encoder, tiny_model, accelerator, calls, tmp_path):
    crops = {"crop": "random_resized", "flip": True}
    changed = tiny_model(LDAEModel)
    changed.layers[0].mlp.fc1.bias.data[0] += 1e-3
    relabelled = examples.remove_columns("label").add_column("label", [1, 1, 0, 1, 0, 1, 1])
    asked = [
        (encoder, ImageDataset(examples, (8, 12)), 0),
        (Encoder(changed), ImageDataset(examples, (8, 12)), 0),
        (Encoder(encoder.model, mean=[0.1] * 3), ImageDataset(examples, (8, 12)), 0),
        (encoder, ImageDataset(examples.select(range(6)), (8, 12)), 0),
        (encoder, ImageDataset(relabelled, (8, 12)), 0),
        (encoder, ImageDataset(examples, (8, 12), crop="random"), 0),
        (encoder, ImageDataset(examples, (8, 12), **crops), 0),
        (encoder, ImageDataset(examples, (8, 12), **crops), 1),
        (encoder, ImageDataset(examples, (8, 12), **crops, seed=1), 1),
        (encoder, ImageDataset(examples, (8, 12), **crops, min_area=0.08), 1),
    ]
    first = [cached_features(*x, accelerator, tmp_path / "cache", view=view) for *x, view in asked]
    assert len(calls) == len(asked)
    second = [cached_features(*x, accelerator, tmp_path / "cache", view=view) for *x, view in asked]
    assert len(calls) == len(asked)
    assert all(torch.equal(a.features, b.features) for a, b in zip(first, second, strict=True))


def test_tokens_are_never_kept_on_disk(images, encoder, accelerator, calls, tmp_path):
    folder = tmp_path / "cache"
    computed, read = (cached_features(encoder, images, accelerator, folder, tokens=True) for _ in range(2))
    assert len(calls) == 1
    assert computed.tokens is not None
    assert read.tokens is None
    assert torch.equal(read.features, computed.features)
    (path,) = folder.glob("*.safetensors")
    assert load_file(path).keys() == {"features", "labels", "indices"}
