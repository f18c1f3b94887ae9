"""The encoder and its heads by hand; shapes; what is refused or warned of. `tests/export` compares it with plain ViTs."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_method import draw
from torch.testing import assert_close
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from ldae import LDAEBackbone, LDAEForImageClassification, LDAEForPreTraining, LDAEModel
from tokenizers_ldae import patchify, unpatchify

HEADS = [LDAEModel, LDAEForPreTraining, LDAEForImageClassification, LDAEBackbone]


def test_interpolation_at_the_native_size_changes_nothing(tiny_model, images):
    model = tiny_model(LDAEModel)
    x = images(model.config)
    native, resized = model(x), model(x, interpolate_pos_encoding=True)
    assert torch.equal(native.last_hidden_state, resized.last_hidden_state)


def test_encoder_sees_the_latent_subspace_only(tiny_model, images):
    model = tiny_model()
    encoder, config = model.ldae, model.config
    x, other = images(config), patchify(images(config, seed=3), config.patch_hw)
    inside = other @ encoder.tokenizer.V.T @ encoder.tokenizer.V
    features = encoder(x).last_hidden_state
    for change, same in ((other - inside, True), (inside, False)):
        changed = encoder(x + unpatchify(change, config.patch_hw, config.image_hw)).last_hidden_state
        assert torch.allclose(changed, features, atol=1e-5) == same
    noisy = model(x, **draw(model)).noisy_pixel_values  # x_t lies in it already
    again = encoder.tokenizer.decode(encoder.tokenizer.encode(noisy), config.image_hw)
    assert_close(again, noisy, atol=1e-5, rtol=1e-5)


def test_features_are_those_of_the_feature_timestep(tiny_model, images):
    encoder = tiny_model(LDAEModel, feature_timestep=25)
    x = images(encoder.config)
    features = encoder(x).pooler_output
    assert_close(features, encoder(x, torch.tensor([25, 25])).pooler_output)
    assert not torch.allclose(features, encoder(x, torch.tensor([10])).pooler_output, atol=1e-4)


def test_heads_read_the_encoder(tiny_model, images):
    classifier = tiny_model(LDAEForImageClassification, num_labels=5)
    x, labels = images(classifier.config), torch.tensor([4, 1])
    output, features = classifier(x, labels), classifier.ldae(x)
    assert_close(
        output.logits,
        features.last_hidden_state.mean(dim=1) @ classifier.classifier.weight.T + classifier.classifier.bias,
    )
    assert_close(output.loss, -output.logits.log_softmax(dim=1)[[0, 1], labels].mean())

    backbone = tiny_model(LDAEBackbone, out_features=["stage1", "stage2"])
    maps, features = backbone(x).feature_maps, backbone.ldae(x, output_hidden_states=True)
    assert [m.shape for m in maps] == [(2, 16, 2, 3)] * 2
    assert_close(maps[1].flatten(2).transpose(1, 2), features.last_hidden_state)
    assert_close(maps[0].flatten(2).transpose(1, 2), backbone.ldae.layernorm(features.hidden_states[1]))


@settings(max_examples=15, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    patch=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    channels=st.sampled_from([1, 4]),
    larger=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_shapes(tiny_model, images, grid, patch, channels, larger):
    size = (grid[0] * patch[0], grid[1] * patch[1])
    fields = {"image_size": size, "patch_size": patch, "num_channels": channels, "latent_dim": 2}
    model = tiny_model(**fields)
    x = images(model.config).repeat(1, 1, *larger)
    tokens = grid[0] * larger[0] * grid[1] * larger[1]
    output = model(x, interpolate_pos_encoding=True)
    assert output.loss.shape == ()
    assert output.reconstruction.shape == output.noisy_pixel_values.shape == x.shape
    assert output.timesteps.shape == (2,)
    features = model.ldae(x, interpolate_pos_encoding=True)
    assert (features.last_hidden_state.shape, features.pooler_output.shape) == ((2, tokens, 16), (2, 16))
    feature_map = tiny_model(LDAEBackbone, **fields)(x).feature_maps[0]
    assert feature_map.shape == (2, 16, grid[0] * larger[0], grid[1] * larger[1])


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 1, 8, 12), {}, "pixel_values must have num_channels=3 channels, got 1"),
        ((2, 3, 12, 8), {}, r"pixel_values must be \(8, 12\) \(image_size\) high and wide, got 12x8"),
        (
            (2, 3, 8, 10),
            {"interpolate_pos_encoding": True},
            r"pixel_values must be a multiple of patch_size=\(4, 4\) .* got 8x10",
        ),
    ],
)
def test_images_that_do_not_fit_are_refused(tiny_model, cls, shape, options, message):
    if cls is LDAEBackbone:  # takes any multiple of the patch
        options = {}
        if shape[2] == 12:
            assert tiny_model(cls)(torch.zeros(shape)).feature_maps[0].shape == (2, 16, 3, 2)
            return
    with pytest.raises(ValueError, match=message):
        tiny_model(cls)(torch.zeros(shape), **options)


@pytest.mark.parametrize("t", [-1, 1000, 10**9])
def test_timesteps_out_of_range_are_refused(tiny_model, images, t):
    model = tiny_model()
    x, drawn, timesteps = images(model.config), draw(model), torch.tensor([0, t])
    message = re.escape(f"timesteps must be in [0, 1000), got {t}")
    for call in (
        lambda: model(x, **{**drawn, "timesteps": timesteps}),
        lambda: model.predict(drawn["noise"], timesteps),
        lambda: model.ldae(x, timesteps),
        lambda: model.noise_schedule.add_noise(drawn["noise"], drawn["noise"], timesteps),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("label", [3, -2, 10**12])
def test_labels_out_of_range_are_refused(tiny_model, images, label):
    model, labels = tiny_model(num_classes=3), torch.tensor([0, label])
    x, drawn = images(model.config), draw(model)
    with pytest.raises(ValueError, match=re.escape(f"labels must be in [-1, 3), got {label}")):
        model(x, **drawn, labels=labels)
    with pytest.raises(ValueError, match=re.escape("classes must be in [0, 4), got -1")):
        model.predict(drawn["noise"], drawn["timesteps"], torch.tensor([3, -1]))
    with pytest.raises(ValueError, match=re.escape(f"labels must be in [0, 3), got {label}")):
        tiny_model(LDAEForImageClassification, num_labels=3)(x, labels)


def test_labels_that_are_no_classes_are_taken(tiny_model, images):
    x = images(tiny_model().config)
    ignored = tiny_model(LDAEForImageClassification, num_labels=3)(x, torch.tensor([1, -100]))
    assert_close(ignored.loss, -ignored.logits.log_softmax(dim=1)[0, 1])
    number = tiny_model(LDAEForImageClassification, num_labels=1)(x, torch.tensor([-5.0, 7.0]))
    assert_close(number.loss, (number.logits[:, 0] - torch.tensor([-5.0, 7.0])).square().mean())


def test_a_tokenizer_that_is_not_fitted_warns_once(tiny_config, tiny_model, images):
    def warnings(model):
        with CaptureLogger(logging.get_logger("modeling_ldae")) as captured:
            for _ in range(3):
                model(images(model.config))
        return captured.out.count("fit_to_images")

    assert warnings(LDAEForPreTraining(tiny_config()).train()) == 1
    assert warnings(LDAEForPreTraining(tiny_config()).eval()) == 0
    assert warnings(tiny_model().train()) == 0
