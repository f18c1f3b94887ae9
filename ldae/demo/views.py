"""The views of one l-DAE that the page shows: denoising, features in colours, the filters of its tokenizer."""

import math

import torch
from PIL import Image

from image_processing_ldae import PIL_MODES
from ldae.data.images import spread
from ldae.demo.reference import Reference, embedded_reference, stored_reference
from ldae.features.encoders import Encoder, evaluating, load_encoder
from ldae.loading import load_config, load_model
from ldae.report.drawing import enlargement, to_images
from ldae.report.figures import MOST_FILTERS, filter_images
from ldae.tokenizers.fitting import explained_variance
from modeling_ldae import LDAEForPreTraining

SIDE = 384  # pixels to which pictures are enlarged
MOST_COLOURED = 64  # images of the reference on whose patches the colours are fitted


class Views:
    """What the page shows of an l-DAE.

    Args:
        encoder: the encoder of an l-DAE, in float32.
        denoiser: the l-DAE with its decoder, or None if the model has none; then it denoises nothing.
        reference: images among which the nearest are looked for.
    """

    def __init__(self, encoder: Encoder, denoiser: LDAEForPreTraining | None, reference: Reference):
        self.encoder, self.denoiser, self.reference = encoder, denoiser, reference
        self.config, self.tokenizer = encoder.config, encoder.model.tokenizer
        self._fit_colours()

    @property
    def sigmas(self) -> tuple[float, float] | None:
        """The weakest and the strongest noise that the model knows, where there is a choice and it denoises at all."""
        if self.denoiser is None:
            return None
        table = self.denoiser.noise_schedule.sigma
        low, high = table.min().item(), table.max().item()
        return (low, high) if low < high else None

    @property
    def drops_tokens(self) -> bool:
        """Whether the model can leave tokens out, since it was trained with a part of them."""
        return self.denoiser is not None and self.config.keep_ratio < 1

    @torch.no_grad()
    def denoise(
        self, pixel_values: torch.Tensor, sigma: float, share: float = 1.0, seed: int = 0
    ) -> tuple[Image.Image, Image.Image, str]:
        """One step from noise to the clean image.

        The noise and the order in which tokens are left out depend on the seed alone: more noise is the same, only stronger.

        Args:
            pixel_values: an image (1, C, H, W) in [-1, 1].
            sigma: how strong the noise is; the nearest level that the model knows is taken.
            share: of the tokens that the encoder sees, in (0, 1].

        Returns:
            The noisy picture, transparent where the encoder does not see it, the denoised one, and their caption.

        Raises:
            ValueError: if the model has no decoder, or for a share below 1 where it was trained with all tokens.
        """
        if self.denoiser is None:
            raise ValueError("this model has no decoder, so it denoises nothing")
        schedule, generator = self.denoiser.noise_schedule, torch.Generator().manual_seed(seed)
        t = int((schedule.sigma - sigma).abs().argmin())
        noise = torch.randn(1, math.prod(self.config.grid_hw), self.config.latent_dim, generator=generator)
        seen = self._seen(share, generator)
        keep = None if share == 1 else seen.flatten().nonzero().T
        noisy, denoised = self.denoiser.denoise(pixel_values, t, noise=noise, keep=keep)
        caption = (
            f"σ = {schedule.sigma[t]:.2f} at t = {t} of {len(schedule.sigma)} · the encoder sees {int(seen.sum())} of "
            f"{seen.numel()} patches · PSNR: noisy {_psnr(pixel_values, noisy):.1f} dB, "
            f"denoised **{_psnr(pixel_values, denoised):.1f} dB**"
        )
        picture = self.picture(noisy)
        picture.putalpha(Image.fromarray(seen.byte().mul(255).numpy()).resize(picture.size, Image.Resampling.NEAREST))
        return picture, self.picture(denoised), caption

    def filters(self) -> list[tuple[Image.Image, str]]:
        """The first patterns of patches that a linear tokenizer measures, with their numbers; none where it keeps the pixels."""
        if not self.tokenizer.linear or torch.equal(self.tokenizer.V, torch.eye(*self.tokenizer.V.shape)):
            return []
        images, _ = filter_images(self.tokenizer, self.config.patch_hw, self.config.num_channels, MOST_FILTERS)
        return [(image, str(i)) for i, image in enumerate(images, 1)]

    @property
    def variance_held(self) -> float | None:
        """The part, in [0, 1], of the patches' variance that the latent holds, where the tokenizer is principal components."""
        if not self.tokenizer.orthonormal or not self.tokenizer.fitted:
            return None
        return explained_variance(self.tokenizer)

    @torch.no_grad()
    def colours(self, pixel_values: torch.Tensor) -> Image.Image:
        """The features of an image's patches (1, C, H, W): their first three principal components as red, green and blue.

        The components are those of the reference's images, so a colour means the same in every image.
        """
        components = (self._tokens(pixel_values) - self._mean) @ self._components  # (1, N, 3)
        levels = ((components - self._low) / (self._high - self._low)).clamp(0, 1) * 2 - 1
        grid = levels.transpose(1, 2).unflatten(2, self.config.grid_hw)
        (picture,) = to_images(grid)
        return picture.resize(self.picture(pixel_values).size, Image.Resampling.NEAREST)

    @torch.no_grad()
    def nearest(self, pixel_values: torch.Tensor, count: int = 8) -> list[tuple[Image.Image, str]]:
        """The images of the reference whose features are nearest to those of an image (1, C, H, W), each with a caption."""
        return self.reference.nearest(self._tokens(pixel_values).mean(dim=1)[0], count)

    def _tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with evaluating(self.encoder):
            return self.encoder(pixel_values).float()

    @torch.no_grad()
    def _fit_colours(self):
        """Sets the mean feature of each place, three components of what is left, and the range of each."""
        rows = spread(len(self.reference.indices), MOST_COLOURED)
        tokens = self._tokens(self.reference.pixel_values(rows))
        self._mean = tokens.mean(dim=0)  # (N, E): most of what a patch's feature says is where the patch lies
        centred = (tokens - self._mean).flatten(0, 1)
        self._components = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)  # (E, 3)
        projected = centred @ self._components
        self._low, self._high = projected.quantile(0.02, dim=0), projected.quantile(0.98, dim=0)
        self._high = torch.maximum(self._high, self._low + 1e-6)

    def _seen(self, share: float, generator: torch.Generator) -> torch.Tensor:
        """Which patches the encoder sees, bool (rows, columns), at least one block of `mask_block` x `mask_block`."""
        side, (rows, columns) = self.config.mask_block, self.config.grid_hw
        rank = torch.rand(rows // side * (columns // side), generator=generator).argsort().argsort()
        blocks = (rank < max(1, round(share * len(rank)))).reshape(rows // side, columns // side)
        return blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)

    def picture(self, pixel_values: torch.Tensor) -> Image.Image:
        """An image (1, C, H, W) in [-1, 1] as a picture of about 384 pixels."""
        return to_images(pixel_values, enlargement(*self.encoder.image_hw, SIDE))[0]


def load_views(model: str, features: str | None = None) -> Views:
    """Loads what the page shows. No code that comes with a model is run.

    Args:
        model: an l-DAE's folder or Hub id.
        features: a folder that `ldae-features` has written with this model; by default the embedded photographs are embedded.

    Raises:
        FileNotFoundError: if there is no such model, or no such features.
        ValueError: if the model is no l-DAE, is damaged, or takes images of channels that no image file has; if the features are
            those of another model.
    """
    config = load_config(model)
    if config.num_channels not in PIL_MODES:
        raise ValueError(f"--model: {model!r} takes images of {config.num_channels} channels, which no upload has")
    denoiser = load_model(model) if "LDAEForPreTraining" in (config.architectures or []) else None
    encoder = load_encoder(model) if denoiser is None else Encoder(denoiser, name=model)
    reference = embedded_reference(encoder) if features is None else stored_reference(features, encoder)
    return Views(encoder, denoiser, reference)


def _psnr(image: torch.Tensor, other: torch.Tensor) -> float:
    """How close two images in [-1, 1] are, in decibels."""
    return 10 * math.log10(4 / (image - other).square().mean().clamp(min=1e-10).item())
