"""Folded encoders against the l-DAE itself, in float64: every choice of the method that an encoder can be made of."""

import pytest
import torch

from folding_ldae import plain_vit
from ldae import LDAEBackbone, LDAEForImageClassification, LDAEForPreTraining, LDAEModel

CASES = {
    "image": {},
    "latent": {"input_space": "latent", "prediction": "noise"},
    "no scaling": {"latent_scaling": "none"},
    "one scale": {"latent_scaling": "global", "input_space": "latent"},
    "no mean": {"subtract_mean": False},
    "pixels": {"tokenizer_type": "pixels", "latent_dim": 48},
    "patch autoencoder": {"tokenizer_type": "patch_ae", "prediction": "latent"},
    "grey": {"num_channels": 1},
    "four channels, oblong patches": {"num_channels": 4, "patch_size": (2, 4)},
    "no bias": {"qkv_bias": False},
    "tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "classes": {"num_classes": 3},
    "whitened": {"loss_units": "latent"},
    "narrow": {"intermediate_size": 24, "layer_norm_eps": 1e-3, "conditioning_size": 5},
    "square": {"image_size": 8},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("timestep", [None, 700])
def test_folded_is_the_encoder(in_float64, exactly, tiny_model, images, case, timestep):
    model = in_float64(tiny_model(LDAEModel, **CASES[case]))
    x = images(model.config).double()
    timesteps = None if timestep is None else torch.tensor([timestep])
    expected = model(x, timesteps).last_hidden_state
    folded = model.fold(timestep)
    assert not folded.training
    exactly(folded(x).last_hidden_state, expected)
    if timestep is not None:
        assert (model(x).last_hidden_state - expected).abs().max() > 1e-3  # the timestep matters


@pytest.mark.parametrize("cls", [LDAEForPreTraining, LDAEBackbone, LDAEForImageClassification])
def test_every_head_folds(in_float64, exactly, tiny_model, images, cls):
    labels = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "problem_type": "single_label_classification"}
    model = in_float64(tiny_model(cls, **(labels if cls is LDAEForImageClassification else {})))
    x, folded = images(model.config).double(), model.fold()
    if cls is LDAEForImageClassification:
        exactly(folded(x).logits, model(x).logits)
        exactly(folded(x, labels=torch.tensor([0, 2])).loss, model(x, labels=torch.tensor([0, 2])).loss)
        assert folded.config.id2label == labels["id2label"]
    else:
        exactly(folded(x).last_hidden_state, model.ldae(x).last_hidden_state)


@pytest.mark.parametrize("image_size", [16, (4, 20)])
def test_positions_at_another_size_are_those_of_the_formula(in_float64, exactly, tiny_model, image_size):
    model = in_float64(tiny_model(LDAEModel))
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    x = torch.rand(2, 3, height, width, dtype=torch.float64)
    expected = model(x, interpolate_pos_encoding=True).last_hidden_state
    exactly(model.fold(image_size=image_size)(x).last_hidden_state, expected)


def test_blocks_that_are_masked_in_training_do_not_bind_a_plain_vit(in_float64, exactly, tiny_model):
    model = in_float64(tiny_model(LDAEModel, image_size=8, patch_size=4, mask_block=2, keep_ratio=0.5))
    x = torch.rand(2, 3, 12, 4, dtype=torch.float64)
    expected = model(x, interpolate_pos_encoding=True).last_hidden_state
    exactly(model.fold(image_size=(12, 4))(x).last_hidden_state, expected)


def test_folding_keeps_precision_and_leaves_the_model_as_it_was(tiny_model, images, state):
    model = tiny_model(LDAEModel).to(torch.bfloat16)
    before = state(model)
    assert model.fold().dtype == torch.bfloat16
    assert torch.equal(state(model), before)
    assert model.embeddings.projection.weight.requires_grad
    assert all(weight.dtype == torch.float64 for weight in plain_vit(model).weights.values())


def test_what_cannot_be_exact_is_refused(tiny_model):
    with pytest.raises(ValueError, match="tokenizer_type='conv_vae' is no plain ViT"):
        tiny_model(LDAEModel, tokenizer_type="conv_vae").fold()
    with pytest.raises(ValueError, match=r"final_layernorm=False has not; timm's ViT fits"):
        tiny_model(LDAEModel, final_layernorm=False).fold()
    model = tiny_model(LDAEModel)
    for size in (10, (8, 10), (8,), (8, 8, 8), 0):
        with pytest.raises(ValueError, match=r"image_size must be a multiple of patch_size=\(4, 4\)"):
            model.fold(image_size=size)
    with pytest.raises(ValueError, match=r"make .* numbers of positions, which must be at most"):
        model.fold(image_size=10**9)
    with pytest.raises(ValueError, match=r"timesteps must be in \[0, 1000\), got 1000"):
        model.fold(timestep=1000)
