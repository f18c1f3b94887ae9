"""Configuration of l-DAE. Every rung of the paper (arXiv 2401.14404) is a value of it; nothing else decides behaviour."""

import difflib
import math
from typing import Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import logging

try:  # inside a package of transformers' remote code
    from .code_ldae import AUTO_MAP, CUSTOM_PIPELINES, copy_code
    from .schedules_ldae import validate as validate_schedule
    from .tokenizers_ldae import TOKENIZERS, Tokenizer
except ImportError:  # installed, or run from a checkout
    from code_ldae import AUTO_MAP, CUSTOM_PIPELINES, copy_code
    from schedules_ldae import validate as validate_schedule
    from tokenizers_ldae import TOKENIZERS, Tokenizer

# What transformers itself may hand to a configuration beside the fields below.
_KNOWN_EXTRAS = {
    "attn_implementation", "auto_map", "custom_pipelines", "experts_implementation", "model_type", "name_or_path",
    "num_labels", "out_features", "out_indices", "output_attentions", "per_layer_config", "quantization_config",
    "stage_names", "tie_last_hidden_states", "torch_dtype", "use_cache", "_attn_implementation_autoset", "_commit_hash",
    "_name_or_path",
}  # fmt: skip

# What numbers may be at most. A configuration may come from anywhere, and must not fill the memory before weights are seen.
LIMITS = {
    "num_channels": 2**12, "hidden_size": 2**16, "num_hidden_layers": 2**10, "num_attention_heads": 2**12,
    "intermediate_size": 2**18, "decoder_num_hidden_layers": 2**10, "conditioning_size": 2**16,
    "num_train_timesteps": 10**6, "num_classes": 10**6, "num_labels": 10**6,
}  # fmt: skip
MAX_PATCH_DIM = 2**14  # the tokenizer holds matrices of this size
MAX_POSITIONS = 2**30  # numbers: tokens times hidden_size
MAX_PARAMETERS = 10**11  # of all blocks

# Encoder of each named size; the decoder is as large. "half-large" (12 blocks of ViT-L) is the paper's default.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "half-large": {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}

logger = logging.get_logger(__name__)


@strict
class LDAEConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of an l-DAE encoder and decoder, its tokenizer and its noise. The defaults are ViT-B at 224 px with the
    paper's end point (section 4.4). `LDAEConfig.from_size("tiny", image_size=64, patch_size=8)` starts from a named size.

    Args:
        image_size (`int` or `(int, int)`, defaults to 224):
            Height and width of the images in pixels; one number means square.
        patch_size (`int` or `(int, int)`, defaults to 16):
            Height and width of a patch in pixels; must divide `image_size`.
        num_channels (`int`, defaults to 3):
            Channels of the images.
        hidden_size (`int`, defaults to 768):
            Width of the encoder and the decoder; a multiple of 4 and of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 12):
            Blocks of the encoder.
        num_attention_heads (`int`, defaults to 12):
            Attention heads of a block.
        intermediate_size (`int`, *optional*, defaults to `4 * hidden_size`):
            Width of the blocks' MLP.
        hidden_act (`str`, defaults to `"gelu"`):
            Activation of the blocks' MLP.
        layer_norm_eps (`float`, defaults to 1e-6):
            Epsilon of every LayerNorm.
        qkv_bias (`bool`, defaults to `True`):
            Whether the projections to queries, keys and values have a bias.
        initializer_range (`float`, defaults to 0.02):
            Deviation of the initial weights of the timestep embedding; other linear layers start Xavier-uniform, as DiT's.
        final_layernorm (`bool`, defaults to `True`):
            Whether the encoder ends in a LayerNorm, as a ViT does (the paper does not say; see docs/defaults.md).
        decoder_num_hidden_layers (`int`, *optional*, defaults to `num_hidden_layers`):
            Blocks of the decoder.
        conditioning_size (`int`, *optional*, defaults to `hidden_size // 4`):
            Width of the MLP that embeds t for adaLN-Zero; the paper uses a quarter of DiT's.
        num_train_timesteps (`int`, defaults to 1000):
            Number of noise levels.
        feature_timestep (`int`, defaults to 10):
            The t at which the encoder is run on clean images (paper, appendix A).
        tokenizer_type (`str`, defaults to `"pca"`):
            `"pca"`: patch-wise PCA. `"pixels"`: the identity, which makes the model the classical DAE of figure 5;
            it needs `latent_dim` equal to `patch_dim`. `"patch_ae"`, `"patch_vae"`: patch-wise linear autoencoders
            (section 4.2), trained by `ldae.tokenizers`. `"conv_vae"`: the convolutional VAE of the first rungs (table 1),
            whose 2 x 2 latents are a token; it needs the latent as input and the noise or the latent as prediction.
        latent_dim (`int`, defaults to 32):
            Dimensions d of a patch's latent, of `patch_dim` = channels x patch height x patch width; with `"conv_vae"` four
            times the autoencoder's latent channels.
        autoencoder (`dict`, *optional*, defaults to latent diffusion's at the stride `patch_size / 2`):
            Arguments of diffusers' AutoencoderKL for `"conv_vae"`, such as {"block_out_channels": [32, 64, 128]}, in place
            of the defaults: widths 128, 256, 512, 512, ..., two layers a block.
        subtract_mean (`bool`, defaults to `True`):
            Whether PCA is taken about the mean patch (the paper does not say).
        latent_scaling (`str`, defaults to `"component"`):
            How latents are scaled before noise is added, which decides what sigma means: `"none"`, `"global"` (one
            factor, so that their mean variance is 1, as latent diffusion does) or `"component"` (each has variance 1).
            The paper does not say; see docs/defaults.md.
        noise_schedule (`str`, defaults to `"linear_sigma"`):
            `"linear_sigma"`: gamma = 1, sigma linear from 0 to `sigma_max` (section 4.3). `"single_sigma"`: gamma = 1,
            sigma = `sigma_single` always. `"linear_gamma2"`: gamma^2 falls linearly to 0 (table 1, last row). `"ddpm"`:
            DDPM's linear betas, from diffusers, scaled with the number of timesteps as in DiT's code.
        sigma_max (`float`, defaults to the root of 2):
            Largest sigma of `"linear_sigma"`, in units of the scaled latent.
        sigma_single (`float`, defaults to the root of 1/3):
            The sigma of `"single_sigma"`, in units of the scaled latent.
        input_space (`str`, defaults to `"image"`):
            What the network sees: `"latent"`, z_t, as DiT does; or `"image"`, x_t, which the tokenizer makes of it (section 4.4).
        prediction (`str`, defaults to `"image"`):
            What the network predicts: `"noise"`, epsilon in the latent space, as DDPM and DiT; `"latent"`, the clean z_0
            (section 4.3); `"projected_image"`, the clean image as the tokenizer gives it back; or `"image"`, the
            original image (section 4.4).
        residual_weight (`float`, defaults to 0.1):
            Weight in the loss of the components outside the latent space (equation 4), where the image is predicted.
        loss_units (`str`, *optional*, defaults to `"latent"` where each component is scaled, and `"image"` elsewhere):
            Units of the error where the image is predicted. `"image"`: those of the pixels, as equation 4 reads. `"latent"`:
            those of the scaled latents and of the noise; with `latent_scaling="component"` the network then predicts all
            principal components of a patch, each divided by its deviation. It needs orthonormal rows: PCA or pixels.
        keep_ratio (`float`, defaults to 1.0):
            Share of the tokens that the encoder sees in training, a random subset of each image's; the decoder fills in the
            others from a mask token. 1 is the paper; below 1 a step is cheaper. Inference always sees all tokens.
        mask_block (`int`, defaults to 1):
            Side, in patches, of the square blocks in which tokens are kept or dropped.
        num_classes (`int`, defaults to 0):
            Classes that the blocks are conditioned on, as DiT's are; 0: none (all rungs but the first).
        class_dropout (`float`, defaults to 0.1):
            How often the class is left out in training, for classifier-free guidance; as DiT's.
        reshape_hidden_states (`bool`, defaults to `True`):
            Whether `LDAEBackbone` gives feature maps; otherwise it gives tokens with their mean before them, as transformers'
            DPT and DepthAnything want them.

    Raises:
        ValueError: for a name that is no field.
        huggingface_hub.errors.StrictDataclassError: for a value of another type or not among those above, or values that
            contradict each other; the message names the field.
    """

    model_type = "ldae"

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    initializer_range: float = 0.02
    final_layernorm: bool = True
    decoder_num_hidden_layers: int | None = None
    conditioning_size: int | None = None
    num_train_timesteps: int = 1000
    feature_timestep: int = 10
    tokenizer_type: str = "pca"
    latent_dim: int = 32
    autoencoder: dict | None = None
    subtract_mean: bool = True
    latent_scaling: Literal["none", "global", "component"] = "component"
    noise_schedule: str = "linear_sigma"
    sigma_max: float | int = math.sqrt(2)
    sigma_single: float | int = math.sqrt(1 / 3)
    input_space: Literal["image", "latent"] = "image"
    prediction: Literal["image", "projected_image", "latent", "noise"] = "image"
    residual_weight: float | int = 0.1
    loss_units: Literal["image", "latent"] | None = None
    keep_ratio: float | int = 1.0
    mask_block: int = 1
    num_classes: int = 0
    class_dropout: float | int = 0.1
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        if unknown := set(kwargs) - _KNOWN_EXTRAS:
            name = sorted(unknown)[0]
            close = difflib.get_close_matches(name, list(self.__dataclass_fields__), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"LDAEConfig has no field {name!r}{hint}")
        self._validate_limits(kwargs.get("num_labels"))
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.decoder_num_hidden_layers is None:
            self.decoder_num_hidden_layers = self.num_hidden_layers
        if self.conditioning_size is None:
            self.conditioning_size = self.hidden_size // 4
        if self.loss_units is None:
            tokenizer = TOKENIZERS.get(self.tokenizer_type, Tokenizer)  # a wrong name is refused below
            has_components = tokenizer.orthonormal or not self.predicts_image
            self.loss_units = "latent" if self.latent_scaling == "component" and has_components else "image"
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        kwargs.pop("stage_names", None)
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """The configuration of a `config.json`. Keys that this version does not know are left out, and a warning names them."""
        if unknown := sorted(set(config_dict) - set(cls.__dataclass_fields__) - _KNOWN_EXTRAS):
            logger.warning(f"The configuration has keys that this l-DAE does not know and leaves out: {unknown}")
        return super().from_dict({name: config_dict[name] for name in config_dict if name not in unknown}, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Writes `config.json`, and beside it the code that its `auto_map` names, so that the folder opens anywhere.

        Models, and transformers' Trainer, save their configuration by this method.
        """
        if copy_code(save_directory):
            self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def _validate_limits(self, num_labels: int | None = None):
        """Raises a ValueError for numbers beyond `LIMITS`. It is called before anything is made of them."""
        for name, limit in LIMITS.items():
            value = num_labels if name == "num_labels" else getattr(self, name)
            if value is not None and value > limit:
                raise ValueError(f"{name} must be at most {limit}, got {value}")

    def _validate_sizes(self):
        """Raises a ValueError for fields that are too large together."""
        E, blocks = self.hidden_size, self.num_blocks
        tokens = math.prod(self.grid_hw)
        # filled in by `__post_init__`
        inner, conditioning = cast(int, self.intermediate_size), cast(int, self.conditioning_size)
        of_block = E * (4 * E + 2 * inner + 6 * conditioning)
        for fields, what, number, limit in (
            ("patch_size and num_channels", "numbers in a patch", self.patch_dim, MAX_PATCH_DIM),
            ("image_size, patch_size and hidden_size", "numbers of positions", tokens * E, MAX_POSITIONS),
            ("hidden_size, intermediate_size and num_hidden_layers", "parameters", blocks * of_block, MAX_PARAMETERS),
        ):
            if number > limit:
                raise ValueError(f"{fields} make {number} {what}, which must be at most {limit}")

    def validate_architecture(self):
        """Raises a ValueError for fields that contradict each other. `@strict` calls it when a configuration is made or saved."""
        self._validate_limits()
        for name in ("num_channels", "hidden_size", "num_attention_heads", "intermediate_size", "conditioning_size",
                     "num_train_timesteps", "latent_dim"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_hidden_layers", "decoder_num_hidden_layers", "num_classes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if len(pair(value)) != 2 or min(pair(value)) < 1:
                raise ValueError(f"{name} must be a positive int or (height, width), got {value}")
        for side, image, patch in zip(("height", "width"), self.image_hw, self.patch_hw, strict=True):
            if image % patch:
                raise ValueError(f"patch_size must divide image_size: {side} {image} is no multiple of {patch}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and {self.num_attention_heads}"
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4 for 2-D sin-cos positions, got {self.hidden_size}")
        self._validate_sizes()
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {self.hidden_act!r}")
        if not 0 < self.layer_norm_eps <= 1:
            raise ValueError(f"layer_norm_eps must be in (0, 1], got {self.layer_norm_eps}")
        if self.latent_dim > self.patch_dim:
            raise ValueError(f"latent_dim must not exceed a patch's {self.patch_dim} numbers, got {self.latent_dim}")
        if not 0 <= self.feature_timestep < self.num_train_timesteps:
            raise ValueError(
                f"feature_timestep must be in [0, {self.num_train_timesteps}), got {self.feature_timestep}"
            )
        validate_schedule(self)
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout must be in [0, 1], got {self.class_dropout}")
        if self.tokenizer_type not in TOKENIZERS:
            raise ValueError(f"tokenizer_type must be one of {', '.join(TOKENIZERS)}, got {self.tokenizer_type!r}")
        self._validate_autoencoder()
        self.tokenizer_class.validate(self)
        self._validate_loss_units()
        self._validate_dropping()
        for name in ("sigma_max", "sigma_single", "residual_weight", "initializer_range"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")

    def _validate_autoencoder(self):
        for name, value in (self.autoencoder or {}).items():
            numbers = value if isinstance(value, list | tuple) else [value]
            if name == "block_out_channels" and numbers is not value:
                raise ValueError(f"the autoencoder's block_out_channels must be a list, got {value!r}")
            limit = LIMITS["num_hidden_layers" if name == "layers_per_block" else "num_channels"]
            if any(isinstance(number, int) and not 0 <= number <= limit for number in numbers):
                raise ValueError(f"the autoencoder's {name} must be in [0, {limit}], got {value}")

    def _validate_dropping(self):
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}")
        if self.mask_block < 1 or any(side % self.mask_block for side in self.grid_hw):
            raise ValueError(
                f"mask_block must divide the grid of patches, {self.grid_hw[0]} x {self.grid_hw[1]}, got {self.mask_block}"
            )

    def _validate_loss_units(self):
        if self.loss_units == "latent" and self.predicts_image and not self.tokenizer_class.orthonormal:
            raise ValueError(
                f"loss_units='latent' divides the components of an image's error, which tokenizer_type="
                f"{self.tokenizer_type!r} has none of; use tokenizer_type='pca' or loss_units='image'"
            )

    @classmethod
    def from_size(cls, size: str, **kwargs) -> "LDAEConfig":
        """The configuration of a named size (`"tiny"`, `"small"`, `"base"`, `"half-large"`, `"large"`); fields override.

        Raises:
            ValueError: for another name.
        """
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        return cls(**{**SIZES[size], **kwargs})

    @property
    def custom_pipelines(self) -> dict[str, dict]:
        """The pipelines that a Hub folder's code brings, as transformers asks for them; `import ldae` registers its own."""
        return CUSTOM_PIPELINES if __package__ else {}  # installed, or run from a checkout

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return pair(self.patch_size)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Height and width of an image, in patches."""
        (height, width), (p, q) = self.image_hw, self.patch_hw
        return height // p, width // q

    @property
    def patch_dim(self) -> int:
        """D, the numbers in a patch."""
        return self.num_channels * self.patch_hw[0] * self.patch_hw[1]

    @property
    def num_blocks(self) -> int:
        """The blocks of encoder and decoder together."""
        return self.num_hidden_layers + cast(int, self.decoder_num_hidden_layers)  # filled in by `__post_init__`

    @property
    def tokenizer_class(self) -> type[Tokenizer]:
        """The class of the tokenizer, which answers whatever depends on it."""
        return TOKENIZERS[self.tokenizer_type]

    @property
    def autoencoder_config(self) -> dict:
        """Arguments of diffusers' AutoencoderKL: latent diffusion's at the stride `patch_size / 2`, where none are given."""
        levels = max(1, self.patch_hw[0].bit_length() - 1)
        given = {"block_out_channels": [min(128 * 2**i, 512) for i in range(levels)], **(self.autoencoder or {})}
        levels = len(given["block_out_channels"])
        defaults = {
            "in_channels": self.num_channels,
            "out_channels": self.num_channels,
            "latent_channels": self.latent_dim // 4,
            "layers_per_block": 2,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
        return {**defaults, **given}

    @property
    def input_dim(self) -> int:
        """Numbers in a token that the network sees: a patch's, or its latent's."""
        return self.patch_dim if self.input_space == "image" else self.latent_dim

    @property
    def output_dim(self) -> int:
        """Numbers in a token that the network predicts: a patch's, or its latent's."""
        return self.patch_dim if self.predicts_image else self.latent_dim

    @property
    def predicts_image(self) -> bool:
        """Whether the network predicts the numbers of patches, not those of latents."""
        return self.prediction in ("image", "projected_image")

    @property
    def whitens_residual(self) -> bool:
        """Whether the network predicts every principal component of a patch divided by its deviation, and not pixels."""
        return self.predicts_image and self.loss_units == "latent" and self.latent_scaling == "component"


def pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width); one number stands for both."""
    return (size, size) if isinstance(size, int) else cast(tuple[int, int], tuple(size))


__all__ = ["LDAEConfig"]
