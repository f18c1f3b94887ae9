"""The formulas of diffusion models in float64, by hand, and what the tests of generation share."""

import math

import numpy as np
import scipy
import torch

from ldae.generation.pipeline import LDAEPipeline

LATENT = {"input_space": "latent", "prediction": "noise", "noise_schedule": "ddpm"}
KINDS = [
    {"noise_schedule": schedule, "prediction": prediction}
    for schedule in ("ddpm", "linear_gamma2")
    for prediction in ("noise", "latent")
]


def pipeline(model, name="ddim"):
    pipe = LDAEPipeline.from_model(model, name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(pipe, seed=0, **given):
    return pipe(**{"num_inference_steps": 7, "generator": seeded(seed), "output_type": "pt", **given}).images


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def levels_by_hand(count, steps):
    """`steps` of `count` levels, evenly spread, the noisiest first."""
    return [math.floor(count * i / steps + 0.5) - 1 for i in range(steps, 0, -1)]


def gamma2(model, level):
    return 1.0 if level < 0 else float(model.noise_schedule.tables()[0][level]) ** 2


def clean_and_noise(model, prediction, z, g2):
    """z_0 and epsilon that a prediction stands for at gamma^2 = g2."""
    if model.config.prediction == "noise":
        return (z - math.sqrt(1 - g2) * prediction) / math.sqrt(g2), prediction
    return prediction, (z - math.sqrt(g2) * prediction) / math.sqrt(1 - g2)


def naive_distance(a, b):
    (m, s), (n, t) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    return ((m - n) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
