"""Baselines of a probe: a random ViT and a thumbnail, each against what it says that it is."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTModel

from ldae import LDAEModel
from ldae.features.encoders import Encoder
from ldae.features.extraction import Features
from ldae.probes import Knn, LinearFast, Subject, probe
from ldae.probes.attentive import Attentive
from ldae.probes.baselines import baselines, open_gates, thumbnail_features
from ldae.probes.finetune import FineTune


@pytest.mark.parametrize("t", [0, 500])
@torch.no_grad()
def test_open_gates_make_the_blocks_those_of_a_plain_vit(t, tiny_config):
    model = LDAEModel(tiny_config()).eval()
    hidden, conditioning = torch.randn(2, 6, 16), model.condition(torch.tensor([t]))
    for layer in model.layers:
        assert torch.equal(layer(hidden, conditioning), hidden)  # adaLN-Zero
    open_gates(model)
    for layer in model.layers:
        plain = nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).eval()
        plain.self_attn.in_proj_weight.copy_(layer.attention.qkv.weight)
        plain.self_attn.out_proj.weight.copy_(layer.attention.projection.weight)
        plain.linear1.weight.copy_(layer.mlp.fc1.weight)
        plain.linear2.weight.copy_(layer.mlp.fc2.weight)
        for bias in (plain.linear1.bias, plain.linear2.bias):
            bias.zero_()
        expected = plain(hidden)
        assert not torch.allclose(expected, hidden, atol=0.1)
        torch.testing.assert_close(layer(hidden, conditioning), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (24, 40), (16, 5)])
def test_a_thumbnail_is_pillows(size):
    images = 2 * torch.rand(2, 3, *size) - 1
    got = thumbnail_features(images).unflatten(1, (3, 8, 8))
    for image, small in zip(images, got, strict=True):
        for channel, expected in zip(image, small, strict=True):
            pillow = Image.fromarray(channel.numpy()).resize((8, 8), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(expected, np.asarray(pillow), atol=1e-5)


def test_each_baseline_is_measured_by_the_protocols_that_suit_it(labelled_images, tiny_model):
    protocols = [Knn(), Attentive(), FineTune(), LinearFast()]
    vit = ViTModel(ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    names = {"floor": ["knn", "attentive", "finetune", "linear-fast"], "thumbnail": ["knn", "linear-fast"]}
    for model, extra in ((vit, {}), (tiny_model(LDAEModel), {"random_vit": ["knn", "attentive", "linear-fast"]})):
        subject = Subject(Encoder(model), labelled_images, labelled_images, tokens=True)
        found = {b.key: [protocol.name for protocol in b.protocols] for b in baselines(subject, protocols)}
        assert found == names | extra


def test_the_baselines_of_a_probe_are_those_computed_by_hand(labelled_images, tiny_model):
    encoder = Encoder(tiny_model())
    protocols = [Knn(knn_k=3), LinearFast()]
    result = probe(Subject(encoder, labelled_images, labelled_images), protocols)
    items = [labelled_images[0, i] for i in (0, 1, 2, 4, 5, 6)]  # the fourth cannot be read
    pixel_values = torch.stack([item["pixel_values"] for item in items]) / 127.5 - 1
    labels = torch.tensor([item["label"] for item in items])
    opened = encoder.untrained(0)
    for layer in opened.model.layers:
        layer.modulation.bias.data = torch.tensor([0.0, 0, 1, 0, 0, 1]).repeat_interleave(16)
    with torch.no_grad():
        expected = {"random_vit": opened.pool(pixel_values), "thumbnail": thumbnail_features(pixel_values)}
    subject = Subject(encoder, labelled_images, labelled_images)
    subject.features("train")  # known before: a baseline has features of its own
    found = {b.key: b.subject.features("train").features for b in baselines(subject, [])}
    for key, features in expected.items():
        torch.testing.assert_close(found[key], features)
        known = {split: Features(features, labels) for split in ("train", "validation")}
        by_hand = Subject(encoder, labelled_images, labelled_images, known=known)
        for protocol in protocols:
            got = result[key][protocol.name]
            assert got["predictions"] == protocol(by_hand)["predictions"]
    assert len({result[key]["description"] for key in ("floor", *expected)}) == 3
