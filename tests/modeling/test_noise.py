"""The noise of every schedule, what is drawn for a training step, and where patches lie."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_2d_sincos_pos_embed_from_grid
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_method import draw
from torch.testing import assert_close

from modeling_ldae import NoiseSchedule, sincos_positions
from tokenizers_ldae import patchify, unpatchify


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
