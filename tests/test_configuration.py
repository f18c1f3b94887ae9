"""LDAEConfig: its defaults, what it refuses, and that it survives a round trip through a folder."""

import json
import math
import tracemalloc

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from code_ldae import AUTO_MAP
from ldae import LDAEConfig, LDAEModel

REFUSALS = (ValueError, StrictDataclassError)
CONV = {"tokenizer_type": "conv_vae", "input_space": "latent", "prediction": "noise"}


def test_defaults_are_vit_b_and_the_paper():
    config = LDAEConfig()
    assert (config.image_hw, config.patch_hw, config.patch_dim) == ((224, 224), (16, 16), 768)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.intermediate_size, config.decoder_num_hidden_layers, config.conditioning_size) == (3072, 12, 192)
    assert (config.tokenizer_type, config.latent_dim, config.noise_schedule) == ("pca", 32, "linear_sigma")
    assert (config.num_train_timesteps, config.feature_timestep, config.residual_weight) == (1000, 10, 0.1)
    assert config.sigma_max == pytest.approx(1.41421356, abs=1e-8)
    assert config.sigma_single == pytest.approx(0.57735027, abs=1e-8)


@pytest.mark.parametrize(
    ("units", "fields"),
    [
        ("latent", {}),  # the noise's units, where these are not the pixels'
        ("latent", {"tokenizer_type": "pixels", "latent_dim": 768}),
        ("image", {"latent_scaling": "global"}),
        ("image", {"latent_scaling": "none"}),
        ("image", {"loss_units": "image"}),
        ("image", {"tokenizer_type": "patch_ae", "prediction": "projected_image"}),  # has no components
        ("latent", {"tokenizer_type": "patch_ae", "prediction": "noise"}),
    ],
)
def test_noise_and_loss_have_the_same_units(units, fields, tmp_path):
    config = LDAEConfig(**fields)
    assert config.loss_units == units
    config.save_pretrained(tmp_path)
    assert LDAEConfig.from_pretrained(tmp_path).loss_units == units


@pytest.mark.parametrize(
    ("size", "width", "blocks", "heads"),
    [
        ("tiny", 192, 6, 3),
        ("small", 384, 12, 6),
        ("base", 768, 12, 12),
        ("half-large", 1024, 12, 16),
        ("large", 1024, 24, 16),
    ],
)
def test_named_sizes(size, width, blocks, heads):
    config = LDAEConfig.from_size(size, patch_size=8, image_size=64)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (width, blocks, heads)
    assert (config.decoder_num_hidden_layers, config.intermediate_size) == (blocks, 4 * width)
    assert config.patch_dim == 192


def test_fields_override_a_named_size():
    assert LDAEConfig.from_size("tiny", num_hidden_layers=2).decoder_num_hidden_layers == 2


def test_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"size must be one of tiny, .*'huge'"):
        LDAEConfig.from_size("huge")


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        *[(name, {name: 0}) for name in ("num_channels", "hidden_size", "num_attention_heads", "intermediate_size")],
        *[(name, {name: 0}) for name in ("conditioning_size", "num_train_timesteps", "latent_dim")],
        *[(name, {name: -1}) for name in ("num_hidden_layers", "decoder_num_hidden_layers", "feature_timestep")],
        *[(name, {name: value}) for name in ("image_size", "patch_size") for value in (0, -16, (16,), (16,) * 3, "16")],
        ("patch_size", {"image_size": (32, 40)}),
        ("patch_size", {"patch_size": (16, 15)}),
        ("num_attention_heads", {"num_attention_heads": 5}),
        ("hidden_size", {"hidden_size": 6, "num_attention_heads": 3}),
        ("latent_dim", {"latent_dim": 769}),
        ("latent_dim", {"tokenizer_type": "pixels"}),
        ("feature_timestep", {"feature_timestep": 1000}),
        ("feature_timestep", {"num_train_timesteps": 10}),
        ("num_train_timesteps", {"num_train_timesteps": 20, "noise_schedule": "ddpm"}),
        *[(name, {name: value}) for name in ("sigma_max", "sigma_single") for value in (-1, math.nan, math.inf)],
        *[("residual_weight", {"residual_weight": value}) for value in (-0.1, math.nan, math.inf)],
        *[(name, {name: "other"}) for name in ("tokenizer_type", "latent_scaling", "noise_schedule")],
        ("hidden_size", {"hidden_size": 768.0}),
        ("subtract_mean", {"subtract_mean": "yes"}),
        ("latent_dims", {"latent_dims": 16}),
        *[(name, {name: 10**9}) for name in ("num_channels", "hidden_size", "num_attention_heads", "intermediate_size")],
        *[(name, {name: 10**9}) for name in ("num_hidden_layers", "decoder_num_hidden_layers", "conditioning_size")],
        *[(name, {name: 10**9}) for name in ("num_train_timesteps", "num_classes", "num_labels")],
        ("image_size", {"image_size": 16 * 10**6}),
        ("patch_size", {"patch_size": 10**6, "image_size": 10**6}),
        ("hidden_size", {"hidden_size": 2**16, "num_hidden_layers": 2**10, "image_size": 64}),
        *[("hidden_act", {"hidden_act": value}) for value in ("", "__class__", "other")],
        *[("layer_norm_eps", {"layer_norm_eps": value}) for value in (0.0, -1e-6, 1.1, math.nan, math.inf)],
        *[("initializer_range", {"initializer_range": value}) for value in (-0.02, math.nan, math.inf)],
        *[("block_out_channels", {**CONV, "autoencoder": {"block_out_channels": value}}) for value in ([10**9] * 4, 8, [-8] * 4)],
        ("layers_per_block", {**CONV, "autoencoder": {"layers_per_block": 10**9}}),
    ],
    ids=str,
)  # fmt: skip
def test_refusals_name_the_field(field, fields):
    with pytest.raises(REFUSALS, match=rf"\b{field}\b"):
        LDAEConfig(**fields)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("latent_dims", "latent_dim"), ("noise_scheduler", "noise_schedule"), ("sigma_maximum", "sigma_max")],
)
def test_typos_get_a_hint(typo, meant):
    with pytest.raises(ValueError, match=f"no field '{typo}'; did you mean '{meant}'"):
        LDAEConfig(**{typo: 1})


def test_a_name_like_no_field_gets_no_hint():
    with pytest.raises(ValueError, match=r"no field 'qqq'$"):
        LDAEConfig(qqq=1)


def test_a_key_of_another_version_warns_and_loads(tmp_path):
    LDAEConfig(latent_dim=8).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 1, "to_dict": "x"}))
    with CaptureLogger(logging.get_logger("configuration_ldae")) as captured:
        loaded = LDAEConfig.from_pretrained(tmp_path)
    assert "['rope_theta', 'to_dict']" in captured.out
    assert loaded.to_dict() == {**LDAEConfig(latent_dim=8).to_dict(), "auto_map": AUTO_MAP}
    with CaptureLogger(logging.get_logger("configuration_ldae")) as captured:
        LDAEConfig.from_pretrained(tmp_path.parent / tmp_path.name, latent_dim=4).save_pretrained(tmp_path)
        LDAEConfig.from_pretrained(tmp_path)
    assert captured.out.count("does not know") == 1


def test_a_huge_number_is_refused_before_anything_is_made_of_it():
    tracemalloc.start()
    for name in ("num_hidden_layers", "num_labels", "decoder_num_hidden_layers"):
        with pytest.raises(REFUSALS, match=f"{name} must be at most"):
            LDAEConfig.from_dict({"model_type": "ldae", name: 10**9})
    assert tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()


def test_a_model_checks_fields_that_were_changed():
    config = LDAEConfig.from_dict({}, num_hidden_layers=10**9)
    with pytest.raises(ValueError, match="num_hidden_layers must be at most"):
        LDAEModel(config)


def test_invalid_changes_are_refused_when_saved(tmp_path):
    config = LDAEConfig()
    config.latent_dim = 1000
    with pytest.raises(REFUSALS, match="latent_dim"):
        config.save_pretrained(tmp_path)


@settings(max_examples=50, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    patch=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    channels=st.integers(1, 6),
)
def test_any_divisible_size_is_taken(grid, patch, channels):
    image = (grid[0] * patch[0], grid[1] * patch[1])
    config = LDAEConfig(image_size=image, patch_size=patch, num_channels=channels, latent_dim=1)
    assert (config.image_hw, config.patch_hw) == (image, patch)
    assert config.patch_dim * grid[0] * grid[1] == channels * image[0] * image[1]
    for i in (0, 1):
        if patch[i] > 1:
            wrong = list(image)
            wrong[i] += 1
            with pytest.raises(REFUSALS, match=f"patch_size must divide image_size: .* {wrong[i]} is no multiple"):
                LDAEConfig(image_size=wrong, patch_size=patch, num_channels=channels, latent_dim=1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"image_size": (32, 64), "patch_size": (8, 16), "num_channels": 1},
        {"tokenizer_type": "pixels", "latent_dim": 768, "noise_schedule": "ddpm", "latent_scaling": "global"},
        {
            "sigma_max": 1,
            "sigma_single": 0,
            "subtract_mean": False,
            "final_layernorm": False,
            "decoder_num_hidden_layers": 3,
        },
        {"out_features": ["stage3", "stage12"], "id2label": {0: "cat", 1: "dog"}},
    ],
    ids=str,
)
def test_round_trip_through_a_folder(fields, tmp_path):
    config = LDAEConfig(**fields)
    config.save_pretrained(tmp_path)
    loaded = LDAEConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    for name in ("image_hw", "patch_hw", "out_features", "id2label"):
        assert getattr(loaded, name) == getattr(config, name)
