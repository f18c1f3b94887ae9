"""The trainer of the convolutional tokenizer: diffusers' AutoencoderKL with latent diffusion's losses (paper, table 1)."""

import inspect
import math
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from configuration_ldae import LDAEConfig, pair
from ldae.options import TrainArguments
from ldae.retries import retried
from ldae.tokenizers.lpips import LPIPS_BACKBONES, lpips
from ldae.tokenizers.patch_autoencoder import AutoencoderOutput
from tokenizers_ldae import ConvVAETokenizer


class ConvAutoencoderConfig(PreTrainedConfig):
    """A convolutional VAE, `autoencoder` being the arguments of diffusers' AutoencoderKL, and the weights of its losses.

    `discriminator_start`: the training forwards (not optimizer steps, where gradients are accumulated) before the adversarial
    loss. `lpips_net`: "vgg" (latent diffusion's), "alex" or "squeeze", LPIPS's backbones of torchvision. `lpips_weights`: a file
    of that backbone; by default torchvision's download. `discriminator_width`: channels of its first layer.
    """

    model_type = "ldae_conv_autoencoder"

    image_size: int | list[int] | tuple[int, int] = 224
    num_channels: int = 3
    autoencoder: dict | None = None
    kl_weight: float = 1e-6
    perceptual_weight: float = 0.0
    lpips_net: str = "vgg"
    lpips_weights: str | None = None
    adversarial_weight: float = 0.0
    discriminator_start: int = 0
    discriminator_width: int = 64

    @property
    def image_hw(self) -> tuple[int, int]:
        return pair(self.image_size)


class PatchDiscriminator(nn.Sequential):
    """PatchGAN (pix2pix), as VQGAN's: images (B, C, H, W) -> a logit for each 70 x 70 window; sides of at least 24.

    Its BatchNorm keeps no running statistics: it is never used outside of training.
    """

    def __init__(self, num_channels: int, width: int = 64):
        layers = [nn.Conv2d(num_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, stride in enumerate((2, 2, 1)):
            convolution = nn.Conv2d(width << i, width << i + 1, 4, stride, 1, bias=False)
            norm = nn.BatchNorm2d(width << i + 1, track_running_stats=False)
            layers += [convolution, norm, nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))


def adaptive_weight(nll: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """VQGAN's balance (equation 7 there) of two losses, scalars: ||d nll|| / (||d adversarial|| + 1e-4), in [0, 1e4]."""
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (nll, adversarial)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


def hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss, from its logits of real and of reconstructed images."""
    return ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2


class ConvAutoencoder(PreTrainedModel):
    """diffusers' AutoencoderKL with the losses of latent diffusion, of which the paper's table 1 takes one after the other away.

    nll + kl_weight KL + adversarial_weight * adaptive_weight * adversarial, where
    nll is ||x - x'||^2 + perceptual_weight LPIPS(x, x'), summed over the numbers of an image (LPIPS counts once for each), KL is
    summed over the latents of an image, and both are averaged over images, as in latent diffusion. The sum is then divided by
    the numbers of an image: Adam does not see it, but the clipping of gradients, shared with the discriminator, would.

    The discriminator's hinge loss is part of the same loss: both players step at once, by one optimizer on one batch, where
    VQGAN lets them alternate. No gradient of one player's loss reaches the other.
    """

    config_class = ConvAutoencoderConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: ConvAutoencoderConfig):
        super().__init__(config)
        # None stands only in the empty configuration that transformers compares others with
        self.autoencoder = AutoencoderKL(**cast(dict[str, Any], config.autoencoder))
        if config.adversarial_weight:
            self.discriminator = PatchDiscriminator(config.num_channels, config.discriminator_width)
            self.register_buffer("forwards", torch.zeros((), dtype=torch.long))  # in training: when to start
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        # diffusers' layers keep torch's own initial weights; the discriminator's are pix2pix's
        if module is self and self.config.adversarial_weight:
            init.zeros_(self.forwards)
            for layer in self.discriminator:
                if isinstance(layer, nn.Conv2d):
                    init.normal_(layer.weight, std=0.02)
                elif isinstance(layer, nn.BatchNorm2d):
                    init.normal_(layer.weight, mean=1.0, std=0.02)

    def sample_noise(self, batch_size: int, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """`noise` (B, latent channels, H / stride, W / stride), standard normal."""
        kl = self.config.autoencoder
        stride = 2 ** (len(kl["block_out_channels"]) - 1)
        shape = (batch_size, kl["latent_channels"], *(size // stride for size in self.config.image_hw))
        return {"noise": torch.randn(shape, generator=generator, device=self.device)}

    def forward(self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None) -> AutoencoderOutput:
        """
        Args:
            pixel_values: images (B, C, H, W) in [-1, 1].
            noise: as `sample_noise` gives it; drawn if not given.
        """
        config, numbers = self.config, math.prod(pixel_values.shape[1:])
        posterior = self.autoencoder.encode(pixel_values).latent_dist
        noise = self.sample_noise(len(pixel_values))["noise"] if noise is None else noise
        reconstruction = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample
        nll = (pixel_values - reconstruction).square().mean() * numbers
        if config.perceptual_weight:
            distance = lpips(config.lpips_net, config.lpips_weights, pixel_values.device)(pixel_values, reconstruction)
            nll = nll + config.perceptual_weight * distance.mean() * numbers
        loss = (nll + config.kl_weight * posterior.kl().mean()) / numbers
        if config.adversarial_weight and self.training:
            adversarial, discriminating = self.players(pixel_values, reconstruction)
            weight = adaptive_weight(nll, adversarial, self.autoencoder.decoder.conv_out.weight)
            # before its start it is computed too, times 0: in several processes every parameter must have a gradient
            started = self.forwards >= config.discriminator_start
            loss = loss + started * (config.adversarial_weight * weight * adversarial / numbers + discriminating)
            self.forwards += 1
        return AutoencoderOutput(loss=loss, reconstruction=reconstruction)

    def players(self, pixel_values: torch.Tensor, reconstruction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The adversarial losses, scalars, of images and reconstructions (B, C, H, W): the autoencoder's, the discriminator's."""
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        adversarial = -functional_call(self.discriminator, frozen, (reconstruction,)).mean()
        return adversarial, hinge(self.discriminator(pixel_values), self.discriminator(reconstruction.detach()))


def build(config: LDAEConfig, train_args: TrainArguments) -> ConvAutoencoder:
    """A new autoencoder for the tokenizer that an l-DAE's configuration names, its losses from `TrainArguments`.

    Raises:
        FileNotFoundError, ValueError: if LPIPS or the discriminator are asked for and cannot work.
    """
    if train_args.tokenizer_perceptual_weight:
        _validate_lpips(config, train_args)
    if train_args.tokenizer_adversarial_weight and min(config.image_hw) < 24:
        raise ValueError(f"tokenizer_adversarial_weight needs an image_size of at least 24, got {config.image_size}")
    losses = ("perceptual_weight", "lpips_net", "lpips_weights", "adversarial_weight", "discriminator_start",
              "discriminator_width")  # fmt: skip
    fields = {name: getattr(train_args, f"tokenizer_{name}") for name in losses}
    if train_args.tokenizer_kl_weight is not None:
        fields["kl_weight"] = train_args.tokenizer_kl_weight
    fields |= {name: getattr(config, name) for name in ("image_size", "num_channels")}
    return ConvAutoencoder(ConvAutoencoderConfig(**fields, autoencoder=config.autoencoder_config))


def _validate_lpips(config: LDAEConfig, train_args: TrainArguments):
    if config.num_channels != 3:
        raise ValueError(f"tokenizer_perceptual_weight needs num_channels=3, got {config.num_channels}")
    distance = lpips(train_args.tokenizer_lpips_net, train_args.tokenizer_lpips_weights)
    image = torch.zeros(1, 3, *config.image_hw)
    try:
        distance(image, image)
    except RuntimeError as error:  # nothing is left of it
        raise ValueError(
            f"tokenizer_perceptual_weight: images of image_size {config.image_size} are too small for "
            f"{LPIPS_BACKBONES[train_args.tokenizer_lpips_net]}"
        ) from error


def configure(config: LDAEConfig, source: str) -> LDAEConfig:
    """An l-DAE's configuration with the architecture of a trained convolutional autoencoder.

    Args:
        source: a folder or Hub id: a `ConvAutoencoder`, diffusers' AutoencoderKL, or a pipeline with one in `vae/`.

    Raises:
        FileNotFoundError: if there is no autoencoder.
        ValueError: if it is another model, or its stride or channels do not fit the l-DAE.
    """
    found, _ = _locate(source)
    known = inspect.signature(AutoencoderKL).parameters  # files of other versions of diffusers may have more
    config.autoencoder = {name: value for name, value in found.items() if name in known}
    try:
        config.validate_architecture()
    except ValueError as error:
        raise ValueError(f"tokenizer: {source!r} does not fit the l-DAE: {error}") from error
    return config


def _locate(source: str) -> tuple[dict, str | None]:
    """AutoencoderKL's arguments in a folder or Hub id, and the subfolder they are in; None: it is a `ConvAutoencoder`."""
    errors = []
    for subfolder in ("", "vae"):
        try:
            found = AutoencoderKL.load_config(source, subfolder=subfolder)
        except OSError as error:
            errors.append(error)
            continue
        if found.get("model_type") == ConvAutoencoderConfig.model_type:
            return found["autoencoder"], None
        if found.get("_class_name") == AutoencoderKL.__name__:
            return found, subfolder
        kind = found.get("_class_name") or found.get("model_type")
        raise ValueError(f"tokenizer: {source!r} is a {kind}, tokenizer_type='conv_vae' needs an AutoencoderKL")
    raise FileNotFoundError(f"tokenizer: there is no trained tokenizer in {source!r} ({errors[0]})") from errors[0]


@torch.no_grad()
def load(tokenizer: ConvVAETokenizer, source: str, config: LDAEConfig):
    """Fills an l-DAE's tokenizer with a trained autoencoder's weights; fitting then sets the scale.

    Raises:
        FileNotFoundError, ValueError: as `configure`.
    """
    _, subfolder = _locate(source)
    if subfolder is None:
        trained = ConvAutoencoder.from_pretrained(source).autoencoder
    else:
        trained = retried(lambda: AutoencoderKL.from_pretrained(source, subfolder=subfolder))
    tokenizer.autoencoder.load_state_dict(trained.state_dict())
