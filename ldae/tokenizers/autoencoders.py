"""Tokenizers that are trained by gradients: patch-wise linear AE and VAE (paper, section 4.2), convolutional VAE (table 1).

`train_ldae.py --tokenizer_type patch_vae` trains one by the loop of all trainings, into OUTPUT_DIR-tokenizer, before the l-DAE;
`--tokenizer FOLDER` takes one that is there. For conv_vae that may also be an AutoencoderKL of diffusers, or a pipeline with one.
"""

import inspect
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from torchmetrics.functional.image.lpips import _NoTrainLpips
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from configuration_ldae import TRAINED, LDAEConfig, pair
from ldae.data.images import count_classes, load_examples
from ldae.training.checkpoints import Checkpoints, read_state, refuse_changes
from modeling_ldae import ConvTokenizer, PatchTokenizer, patchify, unpatchify

# ------------------------------------------------------------------------------------------------------- patch-wise, linear


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
        return pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        return pair(self.patch_size)


@dataclass
class AutoencoderOutput(ModelOutput):
    """loss (scalar), and reconstruction (B, C, H, W): of a sampled latent where convolutional, of the mean where linear."""

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


# ------------------------------------------------------------------------------------------------------------ convolutional


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


LPIPS_BACKBONES = {"vgg": "VGG16", "alex": "AlexNet", "squeeze": "SqueezeNet 1.1"}


@cache
def lpips(net: str = "vgg", weights: str | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """LPIPS: two batches of images (B, 3, H, W) in [-1, 1] -> distances (B, 1, 1, 1); frozen, differentiable.

    Args:
        net: the backbone, of `LPIPS_BACKBONES`.
        weights: a file with torchvision's weights of it, .safetensors or .pth; by default torchvision's download. LPIPS's own
            weights come with torchmetrics.

    Raises:
        FileNotFoundError, ValueError: if the weights cannot be had, or are another network's.
    """
    backbone = f"torchvision's {LPIPS_BACKBONES[net]}"
    helps = (
        f"give a file of {backbone} by --tokenizer_lpips_weights, or leave LPIPS out by --tokenizer_perceptual_weight 0"
    )
    try:
        with torch.random.fork_rng(devices=[]):  # its initial weights must not move the random numbers of the run
            network = _NoTrainLpips(net=net, pnet_rand=weights is not None)
        if weights is not None:
            path = Path(weights).expanduser()
            safe = path.suffix == ".safetensors"
            state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
            # torchvision's "features.5.weight" is torchmetrics' "slice2.5.weight", or "slices.1.5.weight"
            parts = 2 if net == "squeeze" else 1
            names = {name: f"features.{name.split('.', parts)[-1]}" for name in network.net.state_dict()}
            network.net.load_state_dict({name: state[theirs] for name, theirs in names.items()})
    except (OSError, KeyError, RuntimeError, UnpicklingError, SafetensorError) as error:
        if weights is None or isinstance(error, OSError):
            source = f"{backbone} cannot be downloaded" if weights is None else f"there is no file {weights!r}"
            raise FileNotFoundError(f"tokenizer_lpips_weights: {source} ({error}); {helps}") from error
        raise ValueError(f"tokenizer_lpips_weights: {weights!r} is not {backbone} ({error}); {helps}") from error
    return network.to(device)


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
        self.autoencoder = AutoencoderKL(**config.autoencoder)
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
        """The adversarial losses of images and their reconstructions: the autoencoder's, and the discriminator's own."""
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        adversarial = -functional_call(self.discriminator, frozen, (reconstruction,)).mean()
        return adversarial, hinge(self.discriminator(pixel_values), self.discriminator(reconstruction.detach()))


# ------------------------------------------------------------------------------------------------------ beside an l-DAE's run


def build(config: LDAEConfig, train_args) -> PatchAutoencoder | ConvAutoencoder:
    """A new autoencoder for the tokenizer that an l-DAE's configuration names, its losses from `TrainArguments`.

    Raises:
        FileNotFoundError, ValueError: if LPIPS or the discriminator are asked for and cannot work.
    """
    same = {name: getattr(config, name) for name in ("image_size", "num_channels")}
    if config.tokenizer_type != "conv_vae":
        weight = 0.0
        if config.tokenizer_type == "patch_vae":
            weight = 1.0 if train_args.tokenizer_kl_weight is None else train_args.tokenizer_kl_weight
        same |= {"patch_size": config.patch_size, "latent_dim": config.latent_dim}
        return PatchAutoencoder(PatchAutoencoderConfig(**same, kl_weight=weight))
    if train_args.tokenizer_perceptual_weight:
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
    if train_args.tokenizer_adversarial_weight and min(config.image_hw) < 24:
        raise ValueError(f"tokenizer_adversarial_weight needs an image_size of at least 24, got {config.image_size}")
    losses = (
        "perceptual_weight",
        "lpips_net",
        "lpips_weights",
        "adversarial_weight",
        "discriminator_start",
        "discriminator_width",
    )
    same |= {name: getattr(train_args, f"tokenizer_{name}") for name in losses}
    if train_args.tokenizer_kl_weight is not None:
        same["kl_weight"] = train_args.tokenizer_kl_weight
    return ConvAutoencoder(ConvAutoencoderConfig(**same, autoencoder=config.autoencoder_config))


def with_autoencoder(config: LDAEConfig, source: str) -> LDAEConfig:
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
    source, errors = str(Path(source).expanduser()), []
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
def load_into(tokenizer: PatchTokenizer | ConvTokenizer, source: str | Path, config: LDAEConfig):
    """Fills an l-DAE's tokenizer with a trained autoencoder's weights; `ldae.tokenizers.pca.fit_to_images` then sets the scale.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it is another model, or one of other patches or another latent dimension.
    """
    source = str(Path(source).expanduser())
    if config.tokenizer_type == "conv_vae":
        _, subfolder = _locate(source)
        if subfolder is None:
            trained = ConvAutoencoder.from_pretrained(source).autoencoder
        else:
            trained = AutoencoderKL.from_pretrained(source, subfolder=subfolder)
        tokenizer.autoencoder.load_state_dict(trained.state_dict())
        return
    if not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"tokenizer: there is no trained tokenizer in {source!r}")
    found = PatchAutoencoderConfig.from_pretrained(source)
    kind = "patch_vae" if found.kl_weight else "patch_ae"
    asked = (
        PatchAutoencoderConfig.model_type,
        config.num_channels,
        config.patch_hw,
        config.latent_dim,
        config.tokenizer_type,
    )
    got = (found.to_dict().get("model_type"), found.num_channels, found.patch_hw, found.latent_dim, kind)
    names = ("model type", "num_channels", "patch size", "latent_dim", "tokenizer_type")
    for name, a, b in zip(names, asked, got, strict=True):
        if a != b:
            raise ValueError(f"tokenizer: {source!r} has {name} {b}, the l-DAE needs {a}")
    trained = PatchAutoencoder.from_pretrained(source)
    for name in ("V", "U", "mean"):
        getattr(tokenizer, name).copy_(getattr(trained, name))


def stage(model_args, data_args, train_args):
    """The options and the model of the training that a tokenizer needs before the l-DAE's; None where it needs none.

    Raises:
        ValueError: for options of the l-DAE that its own training would refuse, after the tokenizer's.
    """
    needed = not (train_args.init_from or train_args.tokenizer) and model_args.config().tokenizer_type in TRAINED
    if train_args.tokenizer_only and not needed:
        raise ValueError(
            f"tokenizer_only needs tokenizer_type {', '.join(TRAINED)}, and neither --init_from nor --tokenizer"
        )
    if not needed:
        return None
    last = Checkpoints(Path(train_args.output_dir).expanduser() / "checkpoints").last()
    folder = train_args.output_dir if train_args.tokenizer_only else f"{train_args.output_dir}-tokenizer"
    if train_args.resume and last is not None:  # before its tokenizer is trained on, or another one
        given = {name: value for name, value in vars(train_args).items() if name.startswith("tokenizer_")}
        given |= {} if train_args.tokenizer_only else {"tokenizer": str(Path(folder).expanduser())}
        refuse_changes(read_state(last)["options"], given)
    if data_args.streaming:
        raise ValueError(
            "--streaming reads no stream to its end, which a tokenizer's training does: give --tokenizer FOLDER"
        )
    if train_args.class_conditional:
        columns = (data_args.image_column, data_args.label_column)
        count_classes(load_examples(data_args.data, data_args.train_split, False, *columns))
    set_seed(train_args.seed)  # the autoencoder's initial weights are drawn here
    own = replace(
        train_args,
        output_dir=folder,
        epochs=train_args.tokenizer_epochs,
        max_steps=None,
        max_minutes=None,
        base_learning_rate=train_args.tokenizer_learning_rate,
        learning_rate=None,
        probe=False,
        knn_steps=0,
        image_steps=0,
        class_conditional=False,
        push_to_hub=False,
        gradient_checkpointing=False,
        torch_compile=False,
    )
    return model_args, data_args, own, build(model_args.config(), train_args)
