"""The sweep over blocks and timesteps, against the models called by hand."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from ldae import LDAEForPreTraining, LDAEModel
from ldae.data.images import ImageDataset, to_pixel_values
from ldae.features.encoders import Encoder, load_encoder
from ldae.features.extraction import extract_features, shared_features
from ldae.probes import Knn, LinearFast, Subject
from ldae.probes.sweep import TimestepFeatures, block_features, format_sweep, image_noise, load_with_decoder, sweep
from ldae.report import figures

PROTOCOLS = (Knn(knn_k=3), LinearFast(linear_fast_l2=[1e-2], linear_fast_iterations=20))


def labelled_images(folder, count, image_hw=(8, 12)):
    """`count` readable noise images of two classes, and one that cannot be read."""
    rng = np.random.default_rng(count)
    paths = [folder / f"{count}-{i}.png" for i in range(count + 1)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    paths[2].write_bytes(b"no image")
    examples = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(path)} for path in paths], "label": [i % 2 for i in range(count + 1)]},
        features=datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["a", "b"])),
    )
    return ImageDataset(examples, image_hw)


@pytest.fixture
def subject(tiny_model, tmp_path):
    """Of a saved l-DAE with its decoder."""
    tiny_model(LDAEForPreTraining).save_pretrained(tmp_path / "model")
    encoder = load_encoder(str(tmp_path / "model"))
    return Subject(encoder, labelled_images(tmp_path, 9), labelled_images(tmp_path, 6), batch_size=4)


@torch.no_grad()
@pytest.mark.parametrize("keep_ratio", [1.0, 0.5])  # below 1 the decoder adds positions to its tokens
def test_blocks_equal_the_model_called_by_hand(tiny_model, images, tmp_path, keep_ratio):
    tiny_model(LDAEForPreTraining, keep_ratio=keep_ratio).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    x = images(encoder.config)
    got = block_features(encoder, x, load_with_decoder(encoder))
    model = LDAEForPreTraining.from_pretrained(encoder.name)
    seen = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    timesteps = torch.full((len(x),), model.config.feature_timestep)
    outputs = model.ldae(x, timesteps=timesteps, output_hidden_states=True)
    model.predict(model.ldae.tokenizer.encode(x), timesteps)  # clean, with t told
    usual = encoder(x)
    expected = [hidden.mean(dim=1) for hidden in (*outputs.hidden_states[1:], *seen, usual)]
    assert len(expected) == 2 + 1 + 1
    torch.testing.assert_close(got, torch.stack(expected, dim=1))
    assert torch.equal(block_features(encoder, x), got[:, [0, 1, 3]])  # without a decoder


@torch.no_grad()
@pytest.mark.parametrize("t", [0, 40, 800])
def test_noise_is_that_of_pretraining(subject, images, t):
    encoder, model = subject.encoder, LDAEForPreTraining.from_pretrained(subject.encoder.name)
    x = images(encoder.config, count=3)
    noise = torch.stack([image_noise(image, (6, 8), seed=5) for image in x])
    outputs = model(x, noise=noise, timesteps=torch.full((3,), t))
    represent = TimestepFeatures(encoder, t, noisy=True, seed=5)
    x_t = encoder.model.tokenizer.decode(represent.noisy_latents(x), x.shape[-2:])
    torch.testing.assert_close(x_t, outputs.noisy_pixel_values)
    expected = model.ldae(outputs.noisy_pixel_values, torch.full((3,), t)).pooler_output
    torch.testing.assert_close(represent(x), expected)
    clean = TimestepFeatures(encoder, t, noisy=False)(x)
    torch.testing.assert_close(clean, model.ldae(x, torch.full((3,), t)).pooler_output)


def test_noise_is_a_images_own(subject):
    """Neither batches nor what lies beside an image change it; the seed does."""

    def noisy(images, batch_size, seed=0, **kwargs):
        represent = TimestepFeatures(subject.encoder, 500, noisy=True, seed=seed)
        kwargs |= {"batch_size": batch_size, "represent": represent}
        return shared_features(subject.encoder, images, subject.accelerator, **kwargs).features

    all_at_once = noisy(subject.train, 100)
    torch.testing.assert_close(noisy(subject.train, 2), all_at_once)
    torch.testing.assert_close(noisy(subject.train, 2, indices=[4, 3, 7]), all_at_once[[3, 2, 6]])
    assert not torch.allclose(noisy(subject.train, 100, seed=1), all_at_once)
    draws = image_noise(torch.zeros(3, 8, 12), (1000, 8), 0)
    assert abs(draws.mean()) < 0.05
    assert abs(draws.std() - 1) < 0.05


def test_every_row_is_measured(subject, tmp_path):
    t = subject.encoder.config.feature_timestep
    result = sweep(subject, load_with_decoder(subject.encoder), (0, t, 80), PROTOCOLS, "noise")
    assert [(row["part"], row["block"]) for row in result["depth"]] == [("encoder", 1), ("encoder", 2), ("decoder", 1)]
    assert [(row["t"], row["noisy"]) for row in result["timesteps"]] == [
        (s, noisy) for s in (0, t, 80) for noisy in (False, True)
    ]
    for row in [*result["depth"], *result["timesteps"], {"protocols": result["floor"]}]:
        assert {"knn", "linear-fast"} <= row["protocols"].keys()
    assert (result["kind"], result["model"], result["seed"]) == ("sweep", subject.encoder.name, 0)
    assert (result["data"]["name"], result["data"]["num_train"], result["data"]["num_classes"]) == ("noise", 10, 2)
    assert len(result["data"]["unreadable"]) == 2
    assert '"predictions"' not in json.dumps(result)

    def without_seconds(figures):  # nor predictions, which a sweep does not keep
        without = ("seconds", "predictions")
        return {name: {k: v for k, v in figures[name].items() if k not in without} for name in ("knn", "linear-fast")}

    ordinary = {protocol.name: protocol(subject) for protocol in PROTOCOLS}
    (row,) = (row for row in result["timesteps"] if row["t"] == t and not row["noisy"])
    assert without_seconds(row["protocols"]) == without_seconds(ordinary)
    lines = format_sweep(result).splitlines()
    assert len(lines) == 1 + 1 + 3 + 6
    with Image.open(figures.sweep(result, tmp_path / "new" / "sweep.png")) as image:
        assert image.size == (1350, 540)


def test_a_transformers_vit_has_its_blocks(tmp_path):
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                       intermediate_size=32)  # fmt: skip
    encoder = Encoder(ViTModel(config).eval(), mean=[0.5], std=[0.5])
    train, validation = (labelled_images(tmp_path, count, (8, 8)) for count in (9, 6))
    got = extract_features(encoder, train, represent=lambda x: block_features(encoder, x)).features
    pixel_values = torch.stack([train[0, i]["pixel_values"] for i in range(10) if i != 2])
    with torch.no_grad():
        hidden_states = encoder.model(to_pixel_values(pixel_values), output_hidden_states=True).hidden_states
    for i in range(2):  # ViTModel's last hidden state is after its LayerNorm
        torch.testing.assert_close(got[:, i], hidden_states[i + 1][:, 1:].mean(dim=1))
    assert load_with_decoder(encoder) is None
    result = sweep(Subject(encoder, train, validation), protocols=PROTOCOLS[:1])
    assert [(row["part"], row["block"]) for row in result["depth"]] == [("encoder", i) for i in (1, 2, 3)]
    assert result["timesteps"] == []
    with Image.open(figures.sweep(result, tmp_path / "sweep.png")) as image:
        assert image.size == (780, 540)


def test_an_encoder_without_decoder(tiny_model, tmp_path):
    tiny_model(LDAEModel).save_pretrained(tmp_path / "encoder")
    assert load_with_decoder(load_encoder(str(tmp_path / "encoder"))) is None


# -------------------------------------------------------------------------------------------------------------- refused


def test_impossible_timesteps(subject):
    with pytest.raises(ValueError, match=r"timesteps must be in \[0, 1000\), got 1000"):
        sweep(subject, timesteps=(0, 1000))


def test_an_encoder_without_blocks(subject, monkeypatch):
    monkeypatch.setattr(Encoder, "blocks", [])
    with pytest.raises(ValueError, match=r"--sweep measures .* blocks, and .* has none"):
        sweep(subject)


def test_features_that_are_not_finite(subject):
    subject.encoder.model.layers[1].mlp.fc2.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="not all finite"):
        sweep(subject, protocols=PROTOCOLS[:1])
