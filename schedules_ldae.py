"""Noise schedules of l-DAE: how strong the noise is at each of T timesteps, z_t = gamma_t z_0 + sigma_t eps.

A schedule is a function from the configuration to gamma and sigma. Its name in `SCHEDULES` is the configuration's
`noise_schedule`. A new schedule is one more function in this file, and nothing else needs to know of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class NoiseTables(NamedTuple):
    """What a schedule is: `gamma`, `sigma` and the weight of the loss `loss_weight`, each (T,), in float64."""

    gamma: torch.Tensor
    sigma: torch.Tensor
    loss_weight: torch.Tensor

    @property
    def generates(self) -> bool:
        """Whether images can be sampled: the variance is preserved (gamma^2 + sigma^2 = 1), and the image fades with t.

        These are the schedules of diffusion models, which diffusers' samplers are made for.
        """
        preserved = torch.allclose(self.gamma**2 + self.sigma**2, torch.ones_like(self.gamma))
        return preserved and bool((self.gamma.diff() < 0).all())


Schedule = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
SCHEDULES: dict[str, Schedule] = {}
MIN_TIMESTEPS: dict[str, int] = {}


def schedule(min_timesteps: int = 1) -> Callable[[Schedule], Schedule]:
    """Registers a function from an `LDAEConfig` to gamma and sigma, each (T,) in float64, under its own name.

    Args:
        min_timesteps: the smallest T that the schedule is defined for.
    """

    def register(function: Schedule) -> Schedule:
        SCHEDULES[function.__name__] = function
        MIN_TIMESTEPS[function.__name__] = min_timesteps
        return function

    return register


def validate(config: Any):
    """Raises a ValueError if the configuration names no schedule, or has fewer timesteps than the schedule needs."""
    name, T = config.noise_schedule, config.num_train_timesteps
    if name not in SCHEDULES:
        raise ValueError(f"noise_schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    if MIN_TIMESTEPS[name] > T:
        raise ValueError(
            f"num_train_timesteps must be at least {MIN_TIMESTEPS[name]} for noise_schedule={name!r}, got {T}"
        )


def noise_tables(config: Any) -> NoiseTables:
    """The tables of the configuration's schedule.

    lambda_t = gamma_t^2 / (gamma_t^2 + sigma_t^2). That is gamma_t^2 where gamma^2 + sigma^2 = 1 (table 3, "predict clean
    latent"), and 1 / (1 + sigma_t^2) where gamma = 1 (section 4.3).
    """
    gamma, sigma = SCHEDULES[config.noise_schedule](config)
    return NoiseTables(gamma, sigma, gamma**2 / (gamma**2 + sigma**2))


@schedule()
def linear_sigma(config) -> tuple[torch.Tensor, torch.Tensor]:
    """No input scaling, gamma = 1, and sigma linear from 0 to `sigma_max` (section 4.3)."""
    sigma = torch.linspace(0, config.sigma_max, config.num_train_timesteps, dtype=torch.float64)
    return torch.ones_like(sigma), sigma


@schedule()
def single_sigma(config) -> tuple[torch.Tensor, torch.Tensor]:
    """One noise level, gamma = 1 and sigma = `sigma_single` always (section 4.4)."""
    sigma = torch.full((config.num_train_timesteps,), config.sigma_single, dtype=torch.float64)
    return torch.ones_like(sigma), sigma


@schedule()
def linear_gamma2(config) -> tuple[torch.Tensor, torch.Tensor]:
    """gamma^2 falls linearly, 1 > gamma^2 >= 0, and gamma^2 + sigma^2 = 1 (table 1, last row)."""
    T = config.num_train_timesteps
    gamma2 = 1 - torch.arange(1, T + 1, dtype=torch.float64) / T
    return gamma2.sqrt(), (1 - gamma2).sqrt()


@schedule(min_timesteps=21)  # the last beta, 0.02 * 1000 / T, must be a part of 1
def ddpm(config) -> tuple[torch.Tensor, torch.Tensor]:
    """DDPM's linear betas, 1e-4 to 0.02 at T = 1000; at another T as DiT's code scales them, so that the noise ends as strong."""
    try:
        from diffusers import DDPMScheduler
    except ImportError as error:
        raise ImportError("noise_schedule='ddpm' takes its betas from diffusers: pip install diffusers") from error
    T = config.num_train_timesteps
    first, last = (beta * 1000 / T for beta in (1e-4, 0.02))
    gamma2 = DDPMScheduler(T, first, last, "linear").alphas_cumprod.double()
    return gamma2.sqrt(), (1 - gamma2).sqrt()


__all__ = ["SCHEDULES", "NoiseTables", "noise_tables", "schedule"]
