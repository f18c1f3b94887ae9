"""The trainer of the patch-wise linear AE and VAE (paper, section 4.2)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from configuration_ldae import LDAEConfig, pair
from ldae.options import TrainArguments
from tokenizers_ldae import PatchTokenizer, patchify, unpatchify


class PatchAutoencoderConfig(PreTrainedConfig):
    """A patch-wise linear autoencoder; `kl_weight` 0 makes it the AE, more the VAE."""

    model_type = "ldae_patch_autoencoder"

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    latent_dim: int = 32
    kl_weight: float = 0.0

    @property
    def patch_hw(self) -> tuple[int, int]:
        return pair(self.patch_size)


@dataclass
class AutoencoderOutput(ModelOutput):
    """The loss (scalar), and the reconstruction (B, C, H, W) of the mean latent."""

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None


class PatchAutoencoder(PreTrainedModel):
    """z ~ N(V (x - mean), s^2), x' = U z + mean; E ||x - x'||^2 + kl_weight KL(z || N(0, 1)), for each patch x (section 4.2).

    V (d, D) and U (D, d) are trained apart from each other. The AE (kl_weight = 0) has no s. The VAE's, one for each latent
    dimension, is the best one for its U, kl_weight / (2 ||u||^2 + kl_weight), and the mean over z is taken exactly: since both
    maps are linear, nothing needs to be drawn.
    """

    config_class = PatchAutoencoderConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: PatchAutoencoderConfig):
        super().__init__(config)
        dim = config.num_channels * config.patch_hw[0] * config.patch_hw[1]
        self.V = nn.Parameter(torch.empty(config.latent_dim, dim))
        self.U = nn.Parameter(torch.empty(dim, config.latent_dim))
        self.mean = nn.Parameter(torch.empty(dim))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if module is self:
            init.orthogonal_(self.V)
            init.orthogonal_(self.U)
            init.zeros_(self.mean)

    def sample_noise(self, batch_size: int, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """Nothing: what `train_ldae.py` asks of every model that it trains."""
        return {}

    def forward(self, pixel_values: torch.Tensor) -> AutoencoderOutput:
        """
        Args:
            pixel_values: images (B, C, H, W) in [-1, 1].
        """
        weight = self.config.kl_weight
        patches = patchify(pixel_values, self.config.patch_hw)  # (B, N, D)
        latents = (patches - self.mean) @ self.V.T  # (B, N, d)
        reconstruction = latents @ self.U.T + self.mean
        loss = (patches - reconstruction).square().sum(-1).mean()
        if weight:
            square = self.U.square().sum(0)  # (d,), ||u||^2
            s2 = weight / (2 * square + weight)
            loss = loss + (s2 * square).sum()  # of the noise in z
            loss = loss + weight * (latents.square() + s2 - 1 - s2.log()).sum(-1).mean() / 2
        return AutoencoderOutput(
            loss=loss,
            reconstruction=unpatchify(reconstruction, self.config.patch_hw, pixel_values.shape[-2:]),
        )


def build(config: LDAEConfig, train_args: TrainArguments) -> PatchAutoencoder:
    """A new autoencoder for the tokenizer that an l-DAE's configuration names.

    Args:
        train_args: its `tokenizer_kl_weight` is the KL weight of a VAE, 1 by default.
    """
    weight = 0.0
    if config.tokenizer_class.variational:
        weight = 1.0 if train_args.tokenizer_kl_weight is None else train_args.tokenizer_kl_weight
    names = ("image_size", "num_channels", "patch_size", "latent_dim")
    return PatchAutoencoder(PatchAutoencoderConfig(**{n: getattr(config, n) for n in names}, kl_weight=weight))


def configure(config: LDAEConfig, source: str) -> LDAEConfig:
    """The l-DAE's configuration, which a trained patch-wise autoencoder changes nothing of."""
    return config


@torch.no_grad()
def load(tokenizer: PatchTokenizer, source: str, config: LDAEConfig):
    """Fills an l-DAE's tokenizer with a trained autoencoder's weights; fitting then sets the scale.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it is another model, or one of other patches or another latent dimension.
    """
    if not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"tokenizer: there is no trained tokenizer in {source!r}")
    found = PatchAutoencoderConfig.from_pretrained(source)
    asked = {
        "model type": (PatchAutoencoderConfig.model_type, found.to_dict().get("model_type")),
        "num_channels": (config.num_channels, found.num_channels),
        "patch size": (config.patch_hw, found.patch_hw),
        "latent_dim": (config.latent_dim, found.latent_dim),
        "a KL term:": (config.tokenizer_class.variational, found.kl_weight > 0),
    }
    for name, (needed, there) in asked.items():
        if needed != there:
            raise ValueError(
                f"tokenizer: {source!r} has {name} {there}, the l-DAE with tokenizer_type={config.tokenizer_type!r} "
                f"needs {needed}"
            )
    trained = PatchAutoencoder.from_pretrained(source)
    for name in ("V", "U", "mean"):
        getattr(tokenizer, name).copy_(getattr(trained, name))
