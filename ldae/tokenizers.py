"""Tokenizers that are trained by gradients (paper, section 4.2): patch-wise linear AE and VAE.

`train_ldae.py --tokenizer_type patch_vae` trains one by the loop of all trainings, into OUTPUT_DIR-tokenizer, before the l-DAE;
`--tokenizer FOLDER` takes one that is there.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from configuration_ldae import LDAEConfig
from modeling_ldae import PatchTokenizer, patchify, unpatchify

TRAINED = ("patch_ae", "patch_vae")  # tokenizer types


class PatchAutoencoderConfig(PreTrainedConfig):
    """A patch-wise linear autoencoder; `kl_weight` 0 makes it the AE, more the VAE."""

    model_type = "ldae_patch_autoencoder"

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    latent_dim: int = 32
    kl_weight: float = 0.0

    @property
    def image_hw(self) -> tuple[int, int]:
        return _pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        return _pair(self.patch_size)


@dataclass
class PatchAutoencoderOutput(ModelOutput):
    """loss (scalar), and reconstruction (B, C, H, W) of the sampled latents."""

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None


class PatchAutoencoder(PreTrainedModel):
    """z ~ N(V (x - mean), s^2), x' = U z + mean; ||x - x'||^2 + kl_weight KL(z || N(0, 1)), for each patch x (section 4.2).

    V (d, D) and U (D, d) are trained apart from each other. The AE (kl_weight = 0) has no s; the VAE has one for each latent
    dimension, the same for all patches.
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
        self.log_variance = nn.Parameter(torch.empty(config.latent_dim), requires_grad=config.kl_weight > 0)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if module is self:
            init.orthogonal_(self.V)
            init.orthogonal_(self.U)
            init.zeros_(self.mean)
            init.zeros_(self.log_variance)

    def sample_noise(self, batch_size: int, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """`noise` (B, N, d), standard normal."""
        (height, width), (p, q) = self.config.image_hw, self.config.patch_hw
        shape = (batch_size, (height // p) * (width // q), self.config.latent_dim)
        return {"noise": torch.randn(shape, generator=generator, device=self.device)}

    def forward(self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None) -> PatchAutoencoderOutput:
        """
        Args:
            pixel_values: pictures (B, C, H, W) in [-1, 1].
            noise: (B, N, d), standard normal; drawn if not given. The AE uses none.
        """
        patches = patchify(pixel_values, self.config.patch_hw)
        latents = (patches - self.mean) @ self.V.T
        divergence = 0.0
        if self.config.kl_weight:
            noise = self.sample_noise(len(pixel_values))["noise"] if noise is None else noise
            divergence = (latents.square() + self.log_variance.exp() - 1 - self.log_variance).sum(-1).mean() / 2
            latents = latents + (self.log_variance / 2).exp() * noise
        reconstruction = latents @ self.U.T + self.mean
        error = (patches - reconstruction).square().sum(-1).mean()
        return PatchAutoencoderOutput(
            loss=error + self.config.kl_weight * divergence,
            reconstruction=unpatchify(reconstruction, self.config.patch_hw, pixel_values.shape[-2:]),
        )


def build(config: LDAEConfig, kl_weight: float) -> PatchAutoencoder:
    """A new autoencoder for the tokenizer that an l-DAE's configuration names."""
    same = ("image_size", "patch_size", "num_channels", "latent_dim")
    weight = kl_weight if config.tokenizer_type == "patch_vae" else 0.0
    return PatchAutoencoder(PatchAutoencoderConfig(**{name: getattr(config, name) for name in same}, kl_weight=weight))


@torch.no_grad()
def load_into(tokenizer: PatchTokenizer, folder: str | Path, config: LDAEConfig):
    """Fills an l-DAE's tokenizer with a trained autoencoder's V, U and mean; `ldae.pca.fit_to_pictures` then sets the scale.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it is another model, or one of other patches or another latent dimension.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"tokenizer: there is no trained tokenizer in {str(folder)!r}")
    found = PatchAutoencoderConfig.from_pretrained(folder)
    asked = (PatchAutoencoderConfig.model_type, config.num_channels, config.patch_hw, config.latent_dim)
    got = (found.to_dict().get("model_type"), found.num_channels, found.patch_hw, found.latent_dim)
    for name, a, b in zip(("model type", "num_channels", "patch size", "latent_dim"), asked, got, strict=True):
        if a != b:
            raise ValueError(f"tokenizer: {str(folder)!r} has {name} {b}, the l-DAE needs {a}")
    trained = PatchAutoencoder.from_pretrained(folder)
    for name in ("V", "U", "mean"):
        getattr(tokenizer, name).copy_(getattr(trained, name))


def stage(model_args, data_args, train_args):
    """The options and the model of the training that a tokenizer needs before the l-DAE's; None where it needs none."""
    if train_args.init_from or train_args.tokenizer:
        return None
    config = model_args.config()
    if config.tokenizer_type not in TRAINED:
        return None
    own = replace(
        train_args,
        output_dir=f"{train_args.output_dir}-tokenizer",
        epochs=train_args.tokenizer_epochs,
        max_steps=None,
        max_minutes=None,
        base_learning_rate=train_args.tokenizer_learning_rate,
        learning_rate=None,
        probe=False,
        knn_steps=0,
        picture_steps=0,
        push_to_hub=False,
    )
    return model_args, data_args, own, build(config, train_args.tokenizer_kl_weight)


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
