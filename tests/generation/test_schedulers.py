"""Sampling against the formulas of DDIM and DDPM in float64."""

import math

import pytest
import torch
from samplers import KINDS, clean_and_noise, gamma2, levels_by_hand, pipeline, randn, sample, seeded
from torch.testing import assert_close

from ldae.generation.schedulers import SCHEDULERS, make_scheduler, respace
from tokenizers_ldae import patchify


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("fields", KINDS)
def test_the_scheduler_has_the_models_noise(make, fields, name):
    model = make(**fields)
    scheduler = make_scheduler(model, name)
    table = model.noise_schedule.tables()[0].square()
    kept = 1000 if fields["noise_schedule"] == "ddpm" else 999  # not gamma = 0
    assert len(scheduler.alphas_cumprod) == scheduler.config.num_train_timesteps == kept
    assert_close(scheduler.alphas_cumprod.double(), table[:kept], rtol=1e-5, atol=0)
    assert scheduler.config.prediction_type == {"noise": "epsilon", "latent": "sample"}[fields["prediction"]]
    assert not scheduler.config.thresholding
    assert not scheduler.config.get("clip_sample", False)
    for steps in (1, 2, 13, 30, 50, kept):  # diffusers' own timesteps end in -1 for 13 and 30 of 999
        spaced, levels = respace(scheduler, steps)
        assert levels == levels_by_hand(kept, steps)
        assert spaced.timesteps.tolist() == list(range(steps))[::-1]
        rtol = 1e-2 if steps < 3 else 1e-4  # 1 - beta in float32, beta near 1
        assert_close(spaced.alphas_cumprod.double(), table[levels[::-1]], rtol=rtol, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("fields", KINDS)
def test_ddim_against_its_formula(make, fields, eta, monkeypatch):
    """Equations 12 and 16 of arXiv 2010.02502, with a number of steps that does not divide T."""
    model, seen = make(**fields), []
    predict = model.predict

    def network(z, t, classes):
        seen.append((z, int(t)))
        return predict(z, t, classes)

    monkeypatch.setattr(model, "predict", network)
    pixels = sample(pipeline(model), eta=eta, batch_size=2)
    generator = seeded()
    z = torch.randn(2, 6, 8, generator=generator).double()
    levels = levels_by_hand(999 if fields["noise_schedule"] == "linear_gamma2" else 1000, 7)
    assert [t for _, t in seen] == levels
    for (shown, level), before in zip(seen, [*levels[1:], -1], strict=True):
        assert_close(shown.double(), z, rtol=1e-3, atol=1e-3)
        g2, target = gamma2(model, level), gamma2(model, before)
        with torch.no_grad():
            output = predict(shown, torch.tensor([level])).double()
        clean, noise = clean_and_noise(model, output, z, g2)
        deviation = eta * math.sqrt((1 - target) / (1 - g2) * (1 - g2 / target))
        z = math.sqrt(target) * clean + math.sqrt(1 - target - deviation**2) * noise
        if eta:
            z = z + deviation * torch.randn(2, 6, 8, generator=generator).double()
    tokenizer = model.ldae.tokenizer
    expected = (z * tokenizer.scale) @ tokenizer.U.T.double() + tokenizer.mean
    assert_close(patchify(pixels, (4, 4)).double(), (expected / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fields", KINDS)
def test_ddpm_against_its_formula(make, fields):
    """Equation 7 of arXiv 2006.11239, and the variance beta_t (1 - gamma^2_{t-1}) / (1 - gamma^2_t)."""
    model, count = make(**fields), 4000
    scheduler, levels = respace(make_scheduler(model, "ddpm"), 7)
    z, output = randn(1, 6, 8), randn(1, 6, 8, seed=1)
    for i in (0, 3, 6):
        g2, target = gamma2(model, levels[i]), gamma2(model, [*levels, -1][i + 1])
        drawn = scheduler.step(
            output.expand(count, -1, -1), scheduler.timesteps[i], z.expand(count, -1, -1), generator=seeded()
        ).prev_sample
        clean, _ = clean_and_noise(model, output.double(), z.double(), g2)
        alpha = g2 / target
        mean = math.sqrt(target) * (1 - alpha) / (1 - g2) * clean + math.sqrt(alpha) * (1 - target) / (1 - g2) * z
        deviation = math.sqrt((1 - alpha) * (1 - target) / (1 - g2))
        assert_close(drawn.double().mean(0, keepdim=True), mean, rtol=1e-3, atol=1e-3 + 5 * deviation / count**0.5)
        assert_close(drawn.double().std(0).mean().item(), deviation, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("fields", KINDS)
def test_a_perfect_network_gives_the_image_back(make, images, fields, name, monkeypatch):
    model = make(**fields)
    tokenizer = model.ldae.tokenizer
    clean = tokenizer.encode(0.3 * images(model.config, 1))

    def perfect(z, t, classes):
        g2 = gamma2(model, int(t))
        return clean if fields["prediction"] == "latent" else (z - math.sqrt(g2) * clean) / math.sqrt(1 - g2)

    monkeypatch.setattr(model, "predict", perfect)
    expected = (tokenizer.decode(clean, model.config.image_hw) / 2 + 0.5).clamp(0, 1)
    for steps in (1, 7, 30):
        pixels = sample(pipeline(model, name), num_inference_steps=steps)
        assert_close(pixels, expected, rtol=0, atol=1e-3)
