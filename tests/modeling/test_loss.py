"""The loss against the paper's, naively computed, and what a prediction gives back."""

import math

import pytest
import torch
from naive_method import draw, naive_loss
from torch.testing import assert_close

from ldae import LDAEForPreTraining
from tokenizers_ldae import patchify


@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("latent_scaling", ["none", "global", "component"])
def test_loss_is_the_papers(tiny_model, images, latent_scaling, subtract_mean):
    model = tiny_model(latent_scaling=latent_scaling, subtract_mean=subtract_mean, loss_units="image")
    x, drawn = images(model.config), draw(model)
    assert_close(model(x, **drawn).loss.double(), naive_loss(model, x, **drawn), rtol=2e-5, atol=0)


@pytest.mark.parametrize("input_space", ["latent", "image"])
@pytest.mark.parametrize("prediction", ["noise", "latent", "projected_image", "image"])
@pytest.mark.parametrize("noise_schedule", ["ddpm", "linear_gamma2", "linear_sigma", "single_sigma"])
def test_the_loss_of_every_rung_is_the_papers(tiny_model, images, input_space, prediction, noise_schedule):
    model = tiny_model(input_space=input_space, prediction=prediction, noise_schedule=noise_schedule)
    x, drawn = images(model.config), draw(model)
    assert_close(model(x, **drawn).loss.double(), naive_loss(model, x, **drawn), rtol=2e-5, atol=0)


@pytest.mark.parametrize("latent_scaling", ["none", "global", "component"])
@pytest.mark.parametrize("prediction", ["projected_image", "image"])
def test_the_loss_in_the_units_of_the_latents(tiny_model, images, latent_scaling, prediction):
    model = tiny_model(latent_scaling=latent_scaling, prediction=prediction, loss_units="latent")
    x, drawn = images(model.config), draw(model)
    assert_close(model(x, **drawn).loss.double(), naive_loss(model, x, **drawn), rtol=5e-5, atol=0)
    in_image_units = tiny_model(latent_scaling=latent_scaling, prediction=prediction, loss_units="image")
    same = torch.allclose(in_image_units(x, **drawn).loss, model(x, **drawn).loss)
    assert same == (latent_scaling == "none")


def test_a_component_without_variance_has_a_finite_loss(tiny_config, images):
    config = tiny_config(loss_units="latent")
    model = LDAEForPreTraining(config)
    x = images(config, 5)
    x[:, :, :, 1::2] = x[:, :, :, ::2]  # pairs of equal columns: half of the components are constant
    model.ldae.tokenizer.fit([x], config)
    assert (model.ldae.tokenizer.spectrum < 1e-10).sum() > 10
    loss = model(torch.rand_like(x) * 2 - 1, **draw(model, 5)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("fields", [
    {}, {"loss_units": "image"}, {"input_space": "latent", "prediction": "noise", "noise_schedule": "ddpm"},
    {"tokenizer_type": "conv_vae", "input_space": "latent", "prediction": "latent"},
])  # fmt: skip
@pytest.mark.parametrize("keep_ratio", [0.25, 0.5, 0.9])
def test_the_loss_with_dropped_tokens(tiny_model, images, keep_ratio, fields):
    model = tiny_model(keep_ratio=keep_ratio, **fields)
    x, drawn = images(model.config), draw(model)
    num_kept = max(1, round(keep_ratio * 6))
    assert drawn["keep"].shape == (2, num_kept)
    assert all(len(set(row.tolist())) == num_kept and 0 <= row.min() <= row.max() < 6 for row in drawn["keep"])
    assert_close(model(x, **drawn).loss.double(), naive_loss(model, x, **drawn), rtol=5e-5, atol=0)
    everything = {name: value for name, value in drawn.items() if name != "keep"}
    whole = naive_loss(model, x, **everything)
    assert_close(model.eval()(x, **everything).loss.double(), whole, rtol=5e-5, atol=0)  # inference sees all tokens
    permuted = {**drawn, "keep": drawn["keep"].flip(1)}
    assert_close(model(x, **permuted).loss, model(x, **drawn).loss)  # places, not their order


def test_a_model_that_was_trained_on_all_tokens_takes_no_subset(tiny_model, images):
    model = tiny_model()
    with pytest.raises(ValueError, match="keep_ratio=1"):
        model(images(model.config), **draw(model), keep=torch.tensor([[0], [1]]))


def test_pixels_in_the_units_of_the_latents_have_no_residual(tiny_model, images, tmp_path):
    model = tiny_model(tokenizer_type="pixels", latent_dim=48, loss_units="latent")
    x, drawn = images(model.config), draw(model)
    assert_close(model(x, **drawn).loss.double(), naive_loss(model, x, **drawn), rtol=5e-5, atol=0)
    model.save_pretrained(tmp_path)
    assert torch.equal(LDAEForPreTraining.from_pretrained(tmp_path)(x, **drawn).loss, model(x, **drawn).loss)


def test_the_loss_with_a_linear_autoencoder(tiny_model, images):
    """Its U is not the transpose of its V."""
    model = tiny_model(tokenizer_type="patch_ae", prediction="projected_image")
    assert not torch.allclose(model.ldae.tokenizer.U, model.ldae.tokenizer.V.T)
    x, drawn = images(model.config), draw(model)
    assert_close(model(x, **drawn).loss.double(), naive_loss(model, x, **drawn), rtol=2e-5, atol=0)


@pytest.mark.parametrize("prediction", ["noise", "latent"])
def test_the_loss_with_a_convolutional_tokenizer(tiny_model, images, prediction):
    model = tiny_model(tokenizer_type="conv_vae", prediction=prediction, noise_schedule="ddpm")
    x, drawn = images(model.config), draw(model)
    assert_close(model(x, **drawn).loss.double(), naive_loss(model, x, **drawn), rtol=2e-5, atol=0)


def test_the_loss_with_classes(tiny_model, images):
    """The first rung: a class that is left out, or unknown, is class `num_classes`."""
    model = tiny_model(input_space="latent", prediction="noise", noise_schedule="ddpm", num_classes=3)
    x, drawn = images(model.config, 4), draw(model, 4)
    drawn["drop_class"] = torch.tensor([False, True, False, False])
    loss = model(x, labels=torch.tensor([0, 1, 2, -1]), **drawn).loss
    naive = {name: drawn[name] for name in ("noise", "timesteps")}
    assert_close(loss.double(), naive_loss(model, x, **naive, classes=[0, 3, 2, 3]), rtol=2e-5, atol=0)
    assert_close(model(x, **drawn).loss.double(), naive_loss(model, x, **naive), rtol=2e-5, atol=0)
    dropped = draw(model, 2000)["drop_class"].float().mean()
    assert 0.07 < dropped < 0.13
    with pytest.raises(ValueError, match="num_classes=0"):
        tiny_model()(x, labels=torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("loss_units", ["image", "latent"])
@pytest.mark.parametrize("prediction", ["noise", "latent", "projected_image", "image"])
def test_a_perfect_prediction_reconstructs_the_image(tiny_model, images, prediction, loss_units):
    model = tiny_model(prediction=prediction, noise_schedule="linear_gamma2", loss_units=loss_units)
    tokenizer, patches = model.ldae.tokenizer, patchify(images(model.config), model.config.patch_hw)
    latents, timesteps, image_hw = (
        tokenizer.encode(images(model.config)),
        torch.tensor([0, 700]),
        model.config.image_hw,
    )
    noise = torch.randn(latents.shape)
    noisy = model.noise_schedule.add_noise(latents, noise, timesteps)
    projected = patchify(tokenizer.decode(latents, image_hw), model.config.patch_hw)
    perfect = {"noise": noise, "latent": latents, "projected_image": projected, "image": patches}[prediction]
    clean = patches if prediction == "image" else projected
    if model.config.whitens_residual:
        perfect = tokenizer.whiten(perfect)
        assert_close(tokenizer.unwhiten(perfect), clean, atol=1e-4, rtol=1e-4)
    assert_close(model.target(images(model.config), latents, noise), perfect)
    reconstruction = model.clean_images(perfect, noisy, timesteps, image_hw)
    assert_close(patchify(reconstruction, model.config.patch_hw), clean, atol=1e-4, rtol=1e-4)
    assert not model.loss(perfect, perfect, timesteps)
    model.predict = lambda *args, **kwargs: perfect
    seen, denoised = model.denoise(images(model.config), timesteps, noise=noise)
    for made, expected in ((seen, tokenizer.decode_patches(noisy)), (denoised, clean)):  # pixels, whatever the units
        assert_close(patchify(made, model.config.patch_hw), expected.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_denoise_is_what_the_model_does_in_evaluation(tiny_model, images):
    model = tiny_model(keep_ratio=0.5).train()
    x, drawn, generator = images(model.config), draw(model), torch.Generator()
    drawn["timesteps"] = torch.tensor([500, 500])
    for more in ({}, {"keep": drawn.pop("keep")}):
        got = model.denoise(x, 500, noise=drawn["noise"], **more)
        outputs = model.eval()(x, **drawn, **more)
        assert_close(got, (outputs.noisy_pixel_values.clamp(-1, 1), outputs.reconstruction.clamp(-1, 1)))
        assert_close(model.train().denoise(x, drawn["timesteps"], generator.manual_seed(2), **more), got)
    assert model.training
    larger = torch.zeros(1, 3, 16, 24)
    assert model.denoise(larger, 0, interpolate_pos_encoding=True)[1].shape == larger.shape
    with pytest.raises(ValueError, match="interpolate_pos_encoding"):
        model.denoise(larger, 0)
    with pytest.raises(ValueError, match="timesteps"):
        model.denoise(x, 1000)


def test_loss_weights_every_component_of_pixels_alike(tiny_model, images):
    model = tiny_model(tokenizer_type="pixels", latent_dim=48, residual_weight=0, loss_units="image")
    x, drawn = images(model.config), draw(model)
    output = model(x, **drawn)
    weight = 1 / (1 + (math.sqrt(2) * drawn["timesteps"] / 999) ** 2)
    error = (output.reconstruction - x).square().mean(dim=(1, 2, 3))
    assert_close(output.loss, (weight * error).mean())


@pytest.mark.parametrize("rung", [{}, {"input_space": "latent", "prediction": "noise", "num_classes": 2}])
def test_every_parameter_is_trained(tiny_model, images, rung):
    model = tiny_model(**rung)
    x, drawn = images(model.config, 3), draw(model, 3)
    if rung:
        drawn = {**drawn, "drop_class": torch.tensor([False, False, True]), "labels": torch.tensor([0, 1, 0])}
    model(x, **drawn).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
