"""One step from noisy images to clean ones, which every l-DAE can do."""

import torch

from ldae.features.encoders import evaluating
from modeling_ldae import LDAEForPreTraining


@torch.no_grad()
def denoise(
    model: LDAEForPreTraining,
    pixel_values: torch.Tensor,
    timesteps: torch.Tensor | int,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step from noisy images to clean ones, which every l-DAE can do.

    Args:
        pixel_values: clean images (B, C, H, W) in [-1, 1].
        timesteps: the noise level of each image (B,), or one for all, in [0, T).
        generator: draws the noise.
        noise: the noise (B or 1, N, d) itself, in place of what the generator would draw.
        keep: the places (B, K) of the tokens that the encoder sees; all by default.

    Returns:
        The noisy and the denoised images, both (B, C, H, W) in [-1, 1].

    Raises:
        ValueError: for `keep` with a model that was trained with all tokens (`keep_ratio` 1).
    """
    timesteps = torch.as_tensor(timesteps, device=pixel_values.device).expand(len(pixel_values))
    with evaluating(model):
        outputs = model(pixel_values, timesteps=timesteps, generator=generator, noise=noise, keep=keep)
    return outputs.noisy_pixel_values.clamp(-1, 1), outputs.reconstruction.clamp(-1, 1)
