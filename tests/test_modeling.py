"""The model against independent computations: naive transcriptions, diffusers, timm; and what transformers promises."""

import copy
import math
import re
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_2d_sincos_pos_embed_from_grid
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    pipeline,
)
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from ldae import LDAEBackbone, LDAEForImageClassification, LDAEForPreTraining, LDAEImageProcessor, LDAEModel
from modeling_ldae import NoiseSchedule, sincos_positions
from tokenizers_ldae import PCATokenizer, patchify, unpatchify

HEADS = [LDAEModel, LDAEForPreTraining, LDAEForImageClassification, LDAEBackbone]


def draw(model, count=2, seed=2):
    return model.sample_noise(count, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- the method, naively


def naive_gamma_sigma(config, t):
    """The paper's schedules at one t, written out."""
    T = config.num_train_timesteps
    if config.noise_schedule == "linear_sigma":
        return 1, math.sqrt(2) * t / (T - 1)
    if config.noise_schedule == "single_sigma":
        return 1, math.sqrt(1 / 3)
    gamma2 = 1 - (t + 1) / T
    if config.noise_schedule == "ddpm":
        gamma2 = math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / (T - 1)) for s in range(t + 1))
    return math.sqrt(gamma2), math.sqrt(1 - gamma2)


def naive_components(config, w, patch):
    """Every principal component of a patch (D,), divided by its deviation."""
    V, mean, spectrum = (w[f"ldae.tokenizer.{name}"] for name in ("V", "mean", "spectrum"))
    d = config.latent_dim
    rows = w["ldae.tokenizer.residual"] * spectrum[d:, None].sqrt()  # unit rows, before they were divided
    basis = torch.cat([V, rows])
    assert_close(basis @ basis.T, torch.eye(len(basis)).double(), atol=1e-5, rtol=0)
    return torch.stack([basis[i] @ (patch - mean) / spectrum[i].sqrt() for i in range(len(basis))])


def naive_latent_units(config, w, error):
    """sum_i w_i (r_i / s_i)^2 of one patch's error (D,): along every principal component, in units of its deviation."""
    V, scale, d = w["ldae.tokenizer.V"], w["ldae.tokenizer.scale"], config.latent_dim
    if config.whitens_residual:
        return sum((1 if i < d else 0.1) * error[i] ** 2 for i in range(config.patch_dim))
    total = sum((V[i] @ error / scale[i]) ** 2 for i in range(d))
    outside = error - V.T @ (V @ error)
    weight = (
        0.1 if config.prediction == "image" else 1
    )  # with one factor for all, the loss is equation 4's but for its unit
    return total + weight * sum(outside**2) / scale[0] ** 2


def naive_position(row, column, E):
    """The sin-cos position (E,) of a patch."""
    omega = [10000 ** (-k / (E // 4)) for k in range(E // 4)]
    waves = [f(place * o) for place in (column, row) for f in (math.sin, math.cos) for o in omega]
    return torch.tensor(waves).double()


def naive_network(config, w, tokens, t, class_number, kept):
    """The prediction (N, D or d) of embedded tokens (N, E), of which the encoder sees those at the places `kept`."""
    E = config.hidden_size

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(x):
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)

    def embed_time(t):
        angles = [t * 10000 ** (-k / 128) for k in range(128)]
        features = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]).double()
        hidden = linear(features, "ldae.timestep_embedding.fc1")
        return linear(hidden * torch.sigmoid(hidden), "ldae.timestep_embedding.fc2")

    def attention(x, name):
        query, key, value = linear(x, f"{name}.qkv").split(E, dim=1)
        size, heads = E // config.num_attention_heads, []
        for h in range(config.num_attention_heads):
            s = slice(h * size, (h + 1) * size)
            heads.append(torch.softmax(query[:, s] @ key[:, s].T / math.sqrt(size), dim=1) @ value[:, s])
        return linear(torch.cat(heads, dim=1), f"{name}.projection")

    def block(x, c, name):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(c * torch.sigmoid(c), f"{name}.modulation").split(E)
        x = x + gate1 * attention(layer_norm(x) * (1 + scale1) + shift1, f"{name}.attention")
        hidden = linear(layer_norm(x) * (1 + scale2) + shift2, f"{name}.mlp.fc1")
        return x + gate2 * linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{name}.mlp.fc2")

    c = embed_time(t)
    if config.num_classes:
        c = c + w["ldae.class_embedding.weight"][class_number]
    places = torch.stack([naive_position(*divmod(i, config.grid_hw[1]), E) for i in range(len(tokens))])
    tokens = tokens[kept]
    for i in range(config.num_hidden_layers):
        tokens = block(tokens, c, f"ldae.layers.{i}")
    tokens = layer_norm(tokens) * w["ldae.layernorm.weight"] + w["ldae.layernorm.bias"]
    if config.keep_ratio < 1:
        every = [w["decoder.mask_token"][0, 0]] * len(places)
        for place, token in zip(kept, tokens, strict=True):
            every[place] = token
        tokens = torch.stack(every) + places
    for i in range(config.decoder_num_hidden_layers):
        tokens = block(tokens, c, f"decoder.layers.{i}")
    shift, scale = linear(c * torch.sigmoid(c), "decoder.modulation").split(E)
    return linear(layer_norm(tokens) * (1 + scale) + shift, "decoder.head")


def naive_loss(model, images, noise, timesteps, classes=None, keep=None):
    """The paper's sections 4.2 to 4.4, one image and one patch at a time, with the full D x D basis; all in float64."""
    config = model.config
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    (p, q), D, d = config.patch_hw, config.patch_dim, config.latent_dim
    scale, is_conv = w["ldae.tokenizer.scale"], config.tokenizer_type == "conv_vae"
    if is_conv:  # diffusers by hand; V and the rest are not used
        part = "ldae.tokenizer.autoencoder."
        kl = AutoencoderKL(**config.autoencoder_config).double()
        kl.load_state_dict({name.removeprefix(part): tensor for name, tensor in w.items() if name.startswith(part)})
        latent_images = kl.encode(images.double()).latent_dist.mean.detach()
    mean, U, V = (None if is_conv else w[f"ldae.tokenizer.{name}"] for name in ("mean", "U", "V"))
    if not is_conv:
        V = torch.linalg.qr(torch.cat([V.T, torch.randn(D, D).double()], dim=1)).Q.T  # rows: d, then the rest
        V[:d] = w["ldae.tokenizer.V"]
    if config.tokenizer_type == "pca":
        assert_close(V @ V.T, torch.eye(D).double(), atol=1e-6, rtol=0)

    losses = []
    classes = [config.num_classes] * len(images) if classes is None else classes
    for index, (image, eps, t, class_number) in enumerate(
        zip(images.double(), noise.double(), timesteps.tolist(), classes, strict=True)
    ):
        gamma, sigma = naive_gamma_sigma(config, t)
        loss_weight = 1 / (1 + sigma**2) if gamma == 1 else gamma**2
        targets, tokens = [], []
        for row in range(config.image_hw[0] // p):
            for column in range(config.image_hw[1] // q):
                patch = image[:, row * p : (row + 1) * p, column * q : (column + 1) * q].flatten()
                if is_conv:
                    z0 = latent_images[index, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten() / scale
                else:
                    z0 = V[:d] @ (patch - mean) / scale
                zt = gamma * z0 + sigma * eps[len(targets)]
                seen = zt if config.input_space == "latent" else U @ (zt * scale) + mean
                embedded = seen @ w["ldae.embeddings.projection.weight"].T + w["ldae.embeddings.projection.bias"]
                tokens.append(embedded + naive_position(row, column, config.hidden_size))
                target = {"noise": eps[len(targets)], "latent": z0, "image": patch}
                if config.prediction == "projected_image":
                    target["projected_image"] = U @ (z0 * scale) + mean
                if config.whitens_residual:
                    target = {name: naive_components(config, w, x) for name, x in target.items() if len(x) == D}
                targets.append(target[config.prediction])
        kept = range(len(tokens)) if keep is None else keep[index].tolist()
        for target, prediction in zip(
            targets, naive_network(config, w, torch.stack(tokens), t, class_number, list(kept)), strict=True
        ):
            r = target - prediction
            if config.prediction == "noise":
                losses.append(sum(r**2) / d)
            elif config.predicts_image and config.loss_units == "latent":
                losses.append(loss_weight * naive_latent_units(config, w, r) / D)
            elif config.prediction == "image":
                r = V @ r
                losses.append(loss_weight * sum((1 if i < d else 0.1) * r[i] ** 2 for i in range(D)) / D)
            else:
                losses.append(loss_weight * sum(r**2) / len(r))
    return sum(losses) / len(losses)


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


def test_kept_tokens_are_fair_and_drawn_like_noise(tiny_model):
    model = tiny_model(keep_ratio=0.5)
    keep = draw(model, 4000)["keep"]
    assert torch.equal(keep, draw(model, 4000)["keep"])
    counts = torch.bincount(keep.flatten(), minlength=6) / 4000
    assert (counts - 0.5).abs().max() < 4 * (0.25 / 4000) ** 0.5
    plain = draw(tiny_model(), 4000)
    assert all(torch.equal(value, draw(model, 4000)[name]) for name, value in plain.items())


def test_tokens_are_dropped_in_blocks(tiny_model):
    model = tiny_model(image_size=[16, 24], patch_size=[4, 4], keep_ratio=0.5, mask_block=2)
    for kept in draw(model, 20)["keep"]:
        rows, columns = kept // 6, kept % 6
        assert len(set(kept.tolist())) == 12
        blocks = set(zip((rows // 2).tolist(), (columns // 2).tolist(), strict=True))
        assert len(blocks) == 3  # whole blocks of 4


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
    for label in (3, 9):
        with pytest.raises(ValueError, match=rf"labels must be in \[-1, 3\), got {label}"):
            model(x, labels=torch.tensor([0, 1, 2, label]), **drawn)


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


# ------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("schedule", "gamma", "sigma"),
    [
        ("linear_sigma", lambda t: 1, lambda t: 1.3 * t / 999),
        ("single_sigma", lambda t: 1, lambda t: 0.6),
        ("linear_gamma2", lambda t: math.sqrt(1 - (t + 1) / 1000), lambda t: math.sqrt((t + 1) / 1000)),
    ],
)
def test_schedules_are_their_formulas(tiny_config, schedule, gamma, sigma):
    tables = NoiseSchedule(tiny_config(noise_schedule=schedule, sigma_max=1.3, sigma_single=0.6)).tables()
    for t, values in enumerate(zip(*(table.tolist() for table in tables), strict=True)):
        # 1 / (1 + sigma^2) of section 4.3; where gamma^2 + sigma^2 = 1 the paper's weight is gamma^2
        weight = 1 / (1 + sigma(t) ** 2) if gamma(t) == 1 else gamma(t) ** 2
        assert values == pytest.approx((gamma(t), sigma(t), weight), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("timesteps", [21, 100, 1000, 4000])
def test_ddpm_ends_in_noise_at_any_number_of_timesteps(tiny_config, timesteps):
    """Betas times 1000 / T, as DiT's code has them: the logarithm of the signal that is left hardly depends on T."""
    schedule = NoiseSchedule(tiny_config(noise_schedule="ddpm", num_train_timesteps=timesteps))
    betas = torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64)
    assert_close(schedule.gamma.double() ** 2, (1 - betas).cumprod(0), rtol=1e-4, atol=1e-9)
    assert schedule.gamma[-1] ** 2 < 1e-4


def test_exact_noise_gives_the_image_back_at_the_last_levels_of_ddpm(tiny_model, images):
    model = tiny_model(prediction="noise", noise_schedule="ddpm")
    x, t = images(model.config), torch.tensor([980, 999])
    latents = model.ldae.tokenizer.encode(x)
    noise = torch.randn(latents.shape)
    noisy = model.noise_schedule.add_noise(latents, noise, t)
    clean = model.clean_images(noise, noisy, t, model.config.image_hw)
    assert_close(clean, model.ldae.tokenizer.decode(latents, model.config.image_hw), atol=1e-3, rtol=0)


def test_ddpm_is_diffusers(tiny_config):
    schedule = NoiseSchedule(tiny_config(noise_schedule="ddpm"))
    z, eps, t = torch.randn(4, 6, 8), torch.randn(4, 6, 8), torch.tensor([0, 10, 500, 999])
    assert_close(schedule.add_noise(z, eps, t), DDPMScheduler().add_noise(z, eps, t))
    assert_close(schedule.loss_weight, DDPMScheduler().alphas_cumprod)


def test_everything_random_can_be_given(tiny_model, images):
    model = tiny_model()
    x, drawn = images(model.config), draw(model)
    given_all, by_generator = model(x, **drawn), model(x, generator=torch.Generator().manual_seed(2))
    for name in ("loss", "reconstruction", "noisy_pixel_values", "timesteps"):
        assert torch.equal(given_all[name], by_generator[name]), name
    assert torch.equal(given_all.timesteps, drawn["timesteps"])
    fixed_t = [model(x, timesteps=drawn["timesteps"], generator=torch.Generator().manual_seed(s)) for s in (3, 4)]
    assert all(torch.equal(output.timesteps, drawn["timesteps"]) for output in fixed_t)
    assert not torch.equal(fixed_t[0].noisy_pixel_values, fixed_t[1].noisy_pixel_values)


def test_drawn_noise_is_standard_normal_and_timesteps_uniform(tiny_model):
    drawn = draw(tiny_model(), count=4000)
    assert drawn["noise"].shape == (4000, 6, 8)
    assert abs(drawn["noise"].mean()) < 0.01
    assert abs(drawn["noise"].std() - 1) < 0.01
    assert (drawn["timesteps"].min(), drawn["timesteps"].max()) == (0, 999)  # P(either is missing) < 4 %, and seeded
    assert abs(drawn["timesteps"].double().mean() - 499.5) < 20


# ----------------------------------------------------------------------------------------------- patches, positions


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    patch=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.integers(1, 4),
)
def test_patches_go_back_to_the_image(grid, patch, channels):
    x = torch.randn(2, channels, grid[0] * patch[0], grid[1] * patch[1])
    patches = patchify(x, patch)
    assert patches.shape == (2, grid[0] * grid[1], channels * patch[0] * patch[1])
    assert torch.equal(patches[:, -1], x[:, :, -patch[0] :, -patch[1] :].flatten(1))
    assert torch.equal(unpatchify(patches, patch, x.shape[-2:]), x)


def test_positions_are_diffusers():
    assert_close(sincos_positions((7, 7), (7, 7), 32), get_2d_sincos_pos_embed(32, 7, base_size=7).float())
    columns, rows = torch.meshgrid(torch.arange(5.0), torch.arange(3.0), indexing="xy")
    not_square = get_2d_sincos_pos_embed_from_grid(32, torch.stack([columns, rows]), output_type="pt")
    assert_close(sincos_positions((3, 5), (3, 5), 32), not_square.float())


def test_resized_positions_span_the_same_range():
    # three times finer: the centre of each group of 3 x 3 is where the coarse patch was
    fine = sincos_positions((6, 9), (2, 3), 32).view(6, 9, 32)
    assert_close(fine[1::3, 1::3].reshape(6, 32), sincos_positions((2, 3), (2, 3), 32))


def test_interpolation_at_the_native_size_changes_nothing(tiny_model, images):
    model = tiny_model(LDAEModel)
    x = images(model.config)
    native, resized = model(x), model(x, interpolate_pos_encoding=True)
    assert torch.equal(native.last_hidden_state, resized.last_hidden_state)


# ---------------------------------------------------------------------------------------------------------- encoder


@pytest.mark.parametrize("final_layernorm", [True, False])
def test_at_a_fixed_t_the_encoder_is_a_plain_vit(tiny_model, images, final_layernorm):
    model = tiny_model(LDAEModel, final_layernorm=final_layernorm)
    config, tokenizer = model.config, model.tokenizer
    vit = VisionTransformer(
        config.image_hw, config.patch_hw, num_classes=0, global_pool="avg", class_token=False, fc_norm=False,
        embed_dim=16, depth=2, num_heads=2, final_norm=final_layernorm,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    with torch.no_grad():
        project, embedding = tokenizer.U @ tokenizer.V, model.embeddings.projection
        weights = {
            "patch_embed.proj.weight": (embedding.weight @ project).view(16, 3, *config.patch_hw),
            "patch_embed.proj.bias": embedding.bias + embedding.weight @ (tokenizer.mean - project @ tokenizer.mean),
            "pos_embed": model.embeddings.position_embeddings,
        }
        conditioning = torch.nn.functional.silu(model.timestep_embedding(torch.tensor([10])))
        for i, layer in enumerate(model.layers):
            shift1, scale1, gate1, shift2, scale2, gate2 = layer.modulation(conditioning)[0].split(16)
            weights |= {
                f"blocks.{i}.norm1.weight": 1 + scale1,
                f"blocks.{i}.norm1.bias": shift1,
                f"blocks.{i}.attn.qkv.weight": layer.attention.qkv.weight,
                f"blocks.{i}.attn.qkv.bias": layer.attention.qkv.bias,
                f"blocks.{i}.attn.proj.weight": gate1[:, None] * layer.attention.projection.weight,
                f"blocks.{i}.attn.proj.bias": gate1 * layer.attention.projection.bias,
                f"blocks.{i}.norm2.weight": 1 + scale2,
                f"blocks.{i}.norm2.bias": shift2,
                f"blocks.{i}.mlp.fc1.weight": layer.mlp.fc1.weight,
                f"blocks.{i}.mlp.fc1.bias": layer.mlp.fc1.bias,
                f"blocks.{i}.mlp.fc2.weight": gate2[:, None] * layer.mlp.fc2.weight,
                f"blocks.{i}.mlp.fc2.bias": gate2 * layer.mlp.fc2.bias,
            }
        if final_layernorm:
            weights |= {"norm.weight": model.layernorm.weight, "norm.bias": model.layernorm.bias}
        vit.load_state_dict(weights)
        x = images(config)
        output = model(x)
        assert_close(vit.forward_features(x), output.last_hidden_state, atol=1e-5, rtol=1e-5)
        assert_close(vit(x), output.pooler_output, atol=1e-5, rtol=1e-5)


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


# ------------------------------------------------------------------------------------------------ saving and loading


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize(
    ("cls", "auto"),
    [
        (LDAEModel, AutoModel),
        (LDAEForPreTraining, AutoModelForPreTraining),
        (LDAEForImageClassification, AutoModelForImageClassification),
        (LDAEBackbone, LDAEBackbone),  # AutoBackbone of a local folder is broken in transformers 5.24
    ],
)
@pytest.mark.parametrize("noise_schedule", ["linear_sigma", "ddpm"])
def test_every_class_loads_a_pretraining_folder(tiny_model, images, tmp_path, cls, auto, noise_schedule):
    model = tiny_model(noise_schedule=noise_schedule)
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is cls
    new = {"classifier.weight", "classifier.bias"} if cls is LDAEForImageClassification else set()
    assert set(info["missing_keys"]) == new
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    saved = tensors(model)  # non-persistent buffers are among them
    for name, tensor in tensors(loaded).items():
        if name not in new:
            assert torch.equal(tensor, saved[f"ldae.{name}" if cls is LDAEModel else name]), name
    if cls is LDAEForPreTraining:
        assert tensors(loaded).keys() == saved.keys()
        x, drawn = images(model.config), draw(model)
        assert torch.equal(loaded(x, **drawn).loss, model(x, **drawn).loss)
    if new:
        assert loaded.classifier.weight.isfinite().all()
        assert loaded.classifier.weight.any()


def test_fields_changed_on_loading_are_heeded(tiny_model, images, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    fields = {"noise_schedule": "single_sigma", "image_size": (12, 8), "num_train_timesteps": 20}
    loaded, made = LDAEForPreTraining.from_pretrained(tmp_path, **fields), tiny_model(**fields)
    x, drawn = images(made.config), draw(made)
    assert torch.equal(loaded(x, **drawn).loss, made(x, **drawn).loss)


def test_bfloat16_leaves_tokenizer_and_noise_in_float32(tiny_model, images, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = LDAEForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for kept in (PCATokenizer, NoiseSchedule):
        (original,), (module,) = ([m for m in each.modules() if isinstance(m, kept)] for each in (model, loaded))
        for name, buffer in original.named_buffers():
            assert module.get_buffer(name).dtype == torch.float32
            assert torch.equal(module.get_buffer(name), buffer)
    x, drawn = images(model.config), draw(model)
    output, expected = loaded(x, **drawn), model(x, **drawn)
    assert torch.equal(output.noisy_pixel_values, expected.noisy_pixel_values)
    assert_close(output.loss, expected.loss, rtol=0.03, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokenizer_type", ["pca", "conv_vae"])
def test_a_cast_leaves_tokenizer_and_noise_in_float32(tiny_model, images, dtype, tokenizer_type):
    rung = {"input_space": "latent", "prediction": "noise"} if tokenizer_type == "conv_vae" else {}
    model = tiny_model(tokenizer_type=tokenizer_type, **rung)
    x, drawn = images(model.config), draw(model)
    expected = model(x, **drawn)
    cast = copy.deepcopy(model).to(dtype)
    assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
    for name, buffer in model.ldae.tokenizer.named_buffers():
        assert torch.equal(cast.ldae.tokenizer.get_buffer(name), buffer), name
    output = cast(x, **drawn)
    assert torch.equal(output.noisy_pixel_values, expected.noisy_pixel_values)
    assert_close(output.loss, expected.loss, rtol=0.03, atol=0)


def test_a_new_model_starts_as_adaln_zero(tiny_config, images):
    model = LDAEForPreTraining(tiny_config(conditioning_size=128, initializer_range=0.03))
    for linear in (model.ldae.timestep_embedding.fc1, model.ldae.timestep_embedding.fc2):
        assert linear.weight.std().item() == pytest.approx(0.03, rel=0.03)
    bound = (6 / (16 + 3 * 16)) ** 0.5  # Xavier's
    assert model.decoder.layers[0].attention.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    x = images(model.config)
    output = model(x, **draw(model), output_hidden_states=True, return_reconstruction=True)
    assert not output.reconstruction.any()
    assert torch.equal(output.hidden_states[0], output.hidden_states[-1])
    assert output.hidden_states[0].any()


def test_a_tokenizer_that_is_not_fitted_warns_once(tiny_config, tiny_model, images):
    def warnings(model):
        with CaptureLogger(logging.get_logger("modeling_ldae")) as captured:
            for _ in range(3):
                model(images(model.config))
        return captured.out.count("fit_to_images")

    assert warnings(LDAEForPreTraining(tiny_config()).train()) == 1
    assert warnings(LDAEForPreTraining(tiny_config()).eval()) == 0
    assert warnings(tiny_model().train()) == 0


# ------------------------------------------------------------------------------------ training, attention, compiling


def test_gradient_checkpointing_changes_no_gradient(tiny_model, images):
    gradients = []
    for checkpointing in (False, True):
        model, calls = tiny_model().train(), []
        if checkpointing:
            model.gradient_checkpointing_enable()  # the training script calls it too; transformers 5.17 knows no other
        for layer in [*model.ldae.layers, *model.decoder.layers]:
            layer.mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(images(model.config), **draw(model)).loss.backward()
        assert len(calls) == (6 if checkpointing else 3)  # each of the three blocks is run again
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name in gradients[0]:
        assert_close(gradients[1][name], gradients[0][name], msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_attention_implementations_agree_with_eager(tiny_model, images, attention):
    outputs = {}
    for name in ("eager", attention):
        model = tiny_model(hidden_size=32)  # flex_attention wants heads of at least 16
        model.set_attn_implementation(name)
        assert model.ldae.layers[0].attention.config._attn_implementation == name
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # to compile flex_attention takes a minute
            outputs[name] = model(images(model.config), **draw(model))
    assert_close(outputs[attention].reconstruction, outputs["eager"].reconstruction, atol=1e-5, rtol=1e-5)


def test_attention_weights_come_from_eager(tiny_model, images):
    model = tiny_model()
    model.set_attn_implementation("eager")
    output = model(images(model.config), **draw(model), output_attentions=True)
    assert [weights.shape for weights in output.attentions] == [(2, 2, 6, 6)] * 2
    assert_close(output.attentions[0].sum(dim=-1), torch.ones(2, 2, 6))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(tiny_model, images, training):
    model = tiny_model().train(training)
    x, drawn = images(model.config), draw(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(x, **drawn).loss, model(x, **drawn).loss)


@pytest.mark.parametrize("options", [{}, {"interpolate_pos_encoding": True}], ids=["native", "any-size"])
def test_exports_with_dynamic_batch_and_size(tiny_model, images, options):
    model = tiny_model(LDAEModel)
    x = images(model.config)
    Dim = torch.export.Dim
    dynamic = {0: Dim("batch")}
    if options:
        dynamic |= {2: 4 * Dim("rows", max=64), 3: 4 * Dim("columns", max=64)}
    shapes = {"pixel_values": dynamic, **dict.fromkeys(options)}
    exported = torch.export.export(model, (), {"pixel_values": x, **options}, dynamic_shapes=shapes).module()
    other = torch.randn(5, 3, *((20, 8) if options else (8, 12)))
    output = exported(pixel_values=other, **options)
    assert_close(output.last_hidden_state, model(other, **options).last_hidden_state, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- pipelines


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A folder as one would publish it, with an image processor."""
    folder = tmp_path_factory.mktemp("published")
    tiny_model(LDAEForImageClassification, num_labels=3).save_pretrained(folder)
    size = {"height": 8, "width": 12}
    LDAEImageProcessor(size).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pipelines_take_any_image(folder, mode):
    image = Image.effect_noise((30, 20), 80).convert(mode)
    features = torch.tensor(pipeline("image-feature-extraction", model=str(folder))(image, pool=True))
    assert features.shape == (1, 16)
    pixel_values = LDAEImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = LDAEModel.from_pretrained(folder)(pixel_values).pooler_output
        logits = LDAEForImageClassification.from_pretrained(folder)(pixel_values).logits
    assert_close(features, expected, atol=1e-5, rtol=1e-5)
    best = pipeline("image-classification", model=str(folder))(image, top_k=3)
    scores = torch.tensor([entry["score"] for entry in best])
    assert_close(scores, logits.softmax(dim=1)[0].sort(descending=True).values, atol=1e-5, rtol=1e-5)
