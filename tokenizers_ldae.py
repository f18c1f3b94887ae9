"""Tokenizers of l-DAE: an image becomes one latent vector a patch, and latents become an image again.

    z = V (x - mean) / scale       the latent of a patch, `encode`
    x = U (scale z) + mean         and back, `decode`

A tokenizer is an object that answers for itself: what a configuration must be for it, whether its rows are orthonormal, how
it is fitted. Its name in `TOKENIZERS` is the configuration's `tokenizer_type`, and nothing else asks for that name. A new
tokenizer is one more class in this file; one that is trained by gradients also has a trainer in `ldae.tokenizers`.

Shapes: B images, C channels, N patches (tokens), D numbers in a patch, d latent dimensions.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

try:  # inside a package of transformers' remote code
    from .moments_ldae import PatchMoments
except ImportError:  # installed, or run from a checkout
    from moments_ldae import PatchMoments

VARIANCE_FLOOR = 1e-6  # of the mean variance: what a component is taken to have at least, where it is divided by it


def patchify(pixel_values: torch.Tensor, patch_hw: tuple[int, int]) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, D), patches in row-major order, each as (channel, row, column)."""
    batch, channels, height, width = pixel_values.shape
    p, q = patch_hw
    x = pixel_values.reshape(batch, channels, height // p, p, width // q, q)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * q)


def unpatchify(patches: torch.Tensor, patch_hw: tuple[int, int], image_hw: tuple[int, int]) -> torch.Tensor:
    """(B, N, D) -> (B, C, H, W), the inverse of `patchify`."""
    p, q = patch_hw
    rows, columns = image_hw[0] // p, image_hw[1] // q
    x = patches.reshape(patches.shape[0], rows, columns, -1, p, q)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, rows * p, columns * q)


class Float32Module(nn.Module):
    """A module whose numbers stay float32 when the model around it is cast, as by `model.half()`."""

    def _apply(self, fn, recurse: bool = True):
        def without_cast(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(without_cast, recurse)


def latent_scale(variance: torch.Tensor, latent_scaling: str) -> torch.Tensor:
    """Returns what latents of a variance (d,) are divided by, (d,), for a configuration's `latent_scaling`."""
    if latent_scaling == "global":
        variance = variance.mean().expand_as(variance)
    elif latent_scaling == "none":
        variance = torch.ones_like(variance)
    # a component without variance is constant: any scale does, but not zero, nor the root of rounding below zero
    return variance.clamp(min=1e-12).sqrt()


class Tokenizer(Float32Module):
    """What every tokenizer answers. Its numbers are part of the checkpoint, always float32 and never trained with the l-DAE."""

    linear: ClassVar[bool] = True  # a linear map of each patch, whose numbers are `V`, `U` and `mean`
    orthonormal: ClassVar[bool] = False  # V V^T = I and U = V^T, so that an error has components to weigh (equation 4)
    trainer: ClassVar[str | None] = None  # the module of `ldae.tokenizers` that trains it before the l-DAE

    # the configuration's fields that a fitted tokenizer is made for: other weights start from it only with the same
    defined_by: ClassVar[tuple[str, ...]] = (
        "tokenizer_type", "num_channels", "patch_hw", "latent_dim", "latent_scaling",
    )  # fmt: skip

    scale: torch.Tensor  # (d,), what latents are divided by
    spectrum: torch.Tensor  # variance of the patches along every component, all zero while the tokenizer is not fitted

    @classmethod
    def validate(cls, config: Any):
        """Raises a ValueError for a configuration that contradicts this tokenizer."""

    @property
    def fitted(self) -> bool:
        """Whether `fit` has seen images."""
        return bool(self.spectrum.any())

    def initialize(self):
        """Sets what transformers asks `_init_weights` for: the numbers of a tokenizer that is not fitted."""
        init.ones_(self.scale)
        init.zeros_(self.spectrum)

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1] -> scaled latents (B, N, d), in float32."""
        raise NotImplementedError(f"{type(self).__name__} has no encode")

    def decode(self, latents: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
        """Scaled latents (B, N, d) -> images (B, C, *image_hw), in float32."""
        raise NotImplementedError(f"{type(self).__name__} has no decode")

    def fit(self, batches: Iterable[torch.Tensor], config: Any) -> "Tokenizer":
        """Fills the tokenizer from images, in one streaming pass.

        Args:
            batches: images (B, C, H, W) in [-1, 1]. With several processes each brings its own share; all get the same result.
            config: the model's `LDAEConfig`: `subtract_mean` and `latent_scaling` decide mean and scale.

        Raises:
            ValueError: if there is no image, or one is not finite.
        """
        raise NotImplementedError(f"{type(self).__name__} has no fit")


class PatchTokenizer(Tokenizer):
    """A linear patch tokenizer (section 4.2): z = V (x - mean) / scale and back, x = U (scale z) + mean.

    `V` (d, D), `U` (D, d), `mean` (D,), `scale` (d,) and `spectrum` (D,) are its numbers. Until they are fitted, V picks the
    patch's first d numbers. With `config.whitens_residual` it also holds the other D - d principal components, as the rows of
    `residual`, each divided by its deviation.
    """

    def __init__(self, config: Any):
        super().__init__()
        dim, latent_dim = config.patch_dim, config.latent_dim
        self.patch_hw = config.patch_hw
        self.register_buffer("V", torch.eye(latent_dim, dim, dtype=torch.float32))
        self.register_buffer("U", torch.eye(dim, latent_dim, dtype=torch.float32))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(latent_dim, dtype=torch.float32))
        self.register_buffer("spectrum", torch.zeros(dim, dtype=torch.float32))
        if config.whitens_residual:
            self.register_buffer("residual", torch.eye(dim, dtype=torch.float32)[latent_dim:].clone())

    def initialize(self):
        super().initialize()
        init.copy_(self.V, torch.eye(*self.V.shape))
        init.copy_(self.U, torch.eye(*self.U.shape))
        init.zeros_(self.mean)
        if hasattr(self, "residual"):
            init.copy_(self.residual, torch.eye(len(self.mean))[len(self.V) :])

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with maybe_autocast(pixel_values.device.type, enabled=False):
            return (patchify(pixel_values.float(), self.patch_hw) - self.mean) @ self.V.T / self.scale

    def decode_patches(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, N, d) -> patches (B, N, D), in float32."""
        with maybe_autocast(latents.device.type, enabled=False):
            return (latents.float() * self.scale) @ self.U.T + self.mean

    def decode(self, latents: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
        return unpatchify(self.decode_patches(latents), self.patch_hw, image_hw)

    def whiten(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches (B, N, D) -> all their principal components, each divided by its deviation, (B, N, D): first the latents."""
        with maybe_autocast(patches.device.type, enabled=False):
            centred = patches.float() - self.mean
            return torch.cat([centred @ self.V.T / self.scale, centred @ self.residual.T], dim=-1)

    def unwhiten(self, whitened: torch.Tensor) -> torch.Tensor:
        """The inverse of `whiten`."""
        with maybe_autocast(whitened.device.type, enabled=False):
            latents, rest = whitened.float().split([len(self.V), len(self.residual)], dim=-1)
            variance = 1 / self.residual.square().sum(dim=1)  # rows were divided by their deviations
            return self.decode_patches(latents) + (rest * variance) @ self.residual

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor], config: Any) -> "PatchTokenizer":
        moments = PatchMoments(config.patch_dim, self.scale.device)
        for pixel_values in batches:
            moments.update(patchify(pixel_values.to(moments.count.device), config.patch_hw))
        moments.all_reduce()
        mean, components, variance = moments.components(config.subtract_mean)
        self.spectrum.copy_(variance)
        self.scale.copy_(latent_scale(self._fill(moments, mean, components, variance), config.latent_scaling))
        return self

    def _fill(self, moments: PatchMoments, mean: torch.Tensor, components: torch.Tensor, variance: torch.Tensor):
        """Sets V, U and mean of a fit, and returns the variance (d,) of the latents before they are scaled."""
        raise NotImplementedError(f"{type(self).__name__} has no fit")

    def _fill_basis(self, basis: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """`_fill` by the rows of an orthonormal basis (D, D), with the variance (D,) along each: the latent holds the first d."""
        self.V.copy_(basis[: len(self.V)])
        self.U.copy_(self.V.T)
        self.mean.copy_(mean)
        if hasattr(self, "residual"):
            deviation = variance.clamp(min=VARIANCE_FLOOR * variance.mean().clamp(min=1e-6)).sqrt()
            self.residual.copy_((basis / deviation[:, None])[len(self.V) :])
        return variance[: len(self.V)]


class PCATokenizer(PatchTokenizer):
    """Patch-wise PCA: the d first principal components of the patches (section 4.2 and figure 4)."""

    orthonormal = True
    defined_by = (*Tokenizer.defined_by, "subtract_mean")

    def _fill(self, moments, mean, components, variance):
        return self._fill_basis(components, mean, variance)


class PixelTokenizer(PatchTokenizer):
    """The identity, which makes the model the classical DAE of figure 5."""

    orthonormal = True

    @classmethod
    def validate(cls, config: Any):
        if config.latent_dim != config.patch_dim:
            raise ValueError(
                f"tokenizer_type='pixels' needs latent_dim={config.patch_dim} (all of a patch), got {config.latent_dim}"
            )

    def _fill(self, moments, mean, components, variance):
        identity = torch.eye(len(mean)).to(mean)
        return self._fill_basis(identity, mean, moments.variance_along(identity, mean))


class PatchAETokenizer(PatchTokenizer):
    """A patch-wise linear autoencoder, ||x - U V x||^2 (section 4.2). Its maps are trained before; `fit` sets the scale."""

    trainer = "patch_autoencoder"
    variational: ClassVar[bool] = False  # whether it was trained with a KL term

    @classmethod
    def validate(cls, config: Any):
        if config.prediction == "image":
            raise ValueError(
                f"prediction='image' weighs the principal components of the error, which tokenizer_type="
                f"{config.tokenizer_type!r} has none of; use tokenizer_type='pca' or another prediction"
            )

    def _fill(self, moments, mean, components, variance):
        return moments.variance_along(self.V, self.mean)


class PatchVAETokenizer(PatchAETokenizer):
    """A patch-wise linear VAE, ||x - U V x||^2 + KL (section 4.2). It differs from the AE in how it was trained."""

    variational = True


class ConvVAETokenizer(Tokenizer):
    """The convolutional tokenizer of the first rungs (table 1): diffusers' AutoencoderKL and its scale.

    A token is a 2 x 2 patch of the posterior's mode, divided by `scale`. `ldae.tokenizers` trains it before; `fit` sets the
    scale, and `spectrum` (d,) is the variance of the latents before they are scaled.
    """

    linear = False
    trainer = "conv_autoencoder"
    defined_by = (*Tokenizer.defined_by, "autoencoder_config")

    def __init__(self, config: Any):
        super().__init__()
        self.stride = config.patch_hw[0] // 2
        self.autoencoder = _autoencoder_kl(config.autoencoder_config).float()
        # As buffers they are saved and moved, but no optimizer or average sees them; `requires_grad=False` would not do:
        # from_pretrained makes every parameter trainable.
        for module in self.autoencoder.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
        self.register_buffer("scale", torch.ones(config.latent_dim, dtype=torch.float32))
        self.register_buffer("spectrum", torch.zeros(config.latent_dim, dtype=torch.float32))

    @classmethod
    def validate(cls, config: Any):
        if config.input_space != "latent" or config.prediction not in ("noise", "latent"):
            raise ValueError(
                "tokenizer_type='conv_vae' needs input_space='latent' and prediction='noise' or 'latent', got "
                f"{config.input_space!r} and {config.prediction!r}: no image is made of its latents in training"
            )
        kl = config.autoencoder_config
        stride = 2 ** (len(kl["block_out_channels"]) - 1)
        if config.patch_hw != (2 * stride, 2 * stride):
            raise ValueError(
                f"patch_size must be {2 * stride}, twice the autoencoder's stride of {stride} (its block_out_channels are "
                f"{list(kl['block_out_channels'])}), got {config.patch_size}"
            )
        if config.latent_dim != 4 * kl["latent_channels"]:
            raise ValueError(
                f"latent_dim must be 4 x the autoencoder's latent_channels (2 x 2 latents a token), got "
                f"{config.latent_dim} and {kl['latent_channels']}"
            )
        for name in ("in_channels", "out_channels"):
            if kl[name] != config.num_channels:
                raise ValueError(f"the autoencoder's {name} must be num_channels={config.num_channels}, got {kl[name]}")

    def train(self, mode: bool = True) -> "ConvVAETokenizer":
        return super().train(False)  # it is used as it is, whatever the model around it does

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with maybe_autocast(pixel_values.device.type, enabled=False):
            latents = self.autoencoder.encode(pixel_values.float()).latent_dist.mode()
            return patchify(latents, (2, 2)) / self.scale

    def decode(self, latents: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
        with maybe_autocast(latents.device.type, enabled=False):
            latent_hw = image_hw[0] // self.stride, image_hw[1] // self.stride
            return self.autoencoder.decode(unpatchify(latents.float() * self.scale, (2, 2), latent_hw)).sample

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor], config: Any) -> "ConvVAETokenizer":
        moments = PatchMoments(config.latent_dim, self.scale.device)
        self.scale.fill_(1)
        for pixel_values in batches:
            moments.update(self.encode(pixel_values.to(self.scale.device)))
        moments.all_reduce()
        variance = moments.variance()
        self.scale.copy_(latent_scale(variance, config.latent_scaling))
        self.spectrum.copy_(variance)
        return self


def _autoencoder_kl(config: dict) -> nn.Module:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError("tokenizer_type='conv_vae' is diffusers' AutoencoderKL: pip install diffusers") from error
    return AutoencoderKL(**config)


TOKENIZERS: dict[str, type[Tokenizer]] = {
    "pca": PCATokenizer,
    "pixels": PixelTokenizer,
    "patch_ae": PatchAETokenizer,
    "patch_vae": PatchVAETokenizer,
    "conv_vae": ConvVAETokenizer,
}

__all__ = ["TOKENIZERS", "Tokenizer", "patchify", "unpatchify"]
