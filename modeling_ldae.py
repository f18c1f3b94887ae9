"""l-DAE: a latent denoising autoencoder that learns visual features (arXiv 2401.14404, section 4).

Read it top to bottom, like the paper: noise, blocks conditioned on t, encoder, decoder and loss, heads.

    z_0 = V (x_0 - mu) / s            latent of each patch          tokenizers_ldae: Tokenizer.encode
    z_t = gamma_t z_0 + sigma_t eps   noise in the latent           NoiseSchedule.add_noise (tables: schedules_ldae)
    x_t = U (s z_t) + mu              back to an image              Tokenizer.decode
    y   = decoder(encoder(x_t, t), t) prediction of x_0             LDAEForPreTraining.predict
    L   = lambda_t sum_i w_i r_i^2,   r = V_full (x_0 - y)          LDAEForPreTraining.loss

Earlier rungs of the paper (tables 1 and 3) are values of the configuration: the network may see z_t instead of x_t
(`input_space`), predict eps, z_0 or U (s z_0) + mu instead of x_0 (`prediction`), and be told a class (`num_classes`). With
`keep_ratio` below 1 the encoder sees a random subset of the tokens of z_t in training, as MAE's does.

V maps a patch to its latent and U maps it back: for PCA they are the first d principal components, as rows, and their transpose.
V_full has all components. mu is the mean patch, s the scale of the latents, and w_i is 1 for i <= d and `residual_weight` above.

Shapes: B images, C channels, N patches (tokens), K tokens kept, D numbers a patch, d latent dimensions, E hidden_size, T
timesteps.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

try:  # inside a package of transformers' remote code
    from .configuration_ldae import LDAEConfig
    from .folding_ldae import as_ijepa, plain_vit
    from .pipeline_ldae import PIPELINES  # noqa: F401 - transformers fetches a folder's code by these imports, this too
    from .schedules_ldae import NoiseTables, noise_tables
    from .tokenizers_ldae import Float32Module, Tokenizer, patchify, unpatchify
except ImportError:  # installed, or run from a checkout
    from configuration_ldae import LDAEConfig
    from folding_ldae import as_ijepa, plain_vit
    from schedules_ldae import NoiseTables, noise_tables
    from tokenizers_ldae import Float32Module, Tokenizer, patchify, unpatchify

logger = logging.get_logger(__name__)

IGNORED = -100  # the label that transformers' losses leave out


# ------------------------------------------------------------------------------------------------------------------- noise


class NoiseSchedule(Float32Module):
    """The configuration's noise schedule as tables over T timesteps: z_t = gamma_t z_0 + sigma_t eps, and lambda_t."""

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.config = config
        for name, table in self.tables()._asdict().items():
            self.register_buffer(name, table.float(), persistent=False)

    def initialize(self):
        """Sets what transformers asks `_init_weights` for: the tables."""
        for name, table in self.tables()._asdict().items():
            init.copy_(getattr(self, name), table.float())

    def tables(self) -> NoiseTables:
        """gamma, sigma and lambda, each (T,), in float64."""
        return noise_tables(self.config)

    def at(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gamma_t and sigma_t, each (B or 1, 1, 1), of timesteps (B,) or (1,)."""
        return self.gamma[timesteps][:, None, None], self.sigma[timesteps][:, None, None]

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t of latents (B, N, d) with standard normal noise (B, N, d) at timesteps (B,) or (1,), in [0, T).

        Raises:
            ValueError: for a timestep out of range.
        """
        check_range("timesteps", timesteps, 0, len(self.gamma))
        gamma, sigma = self.at(timesteps)
        return gamma * latents + sigma * noise


# -------------------------------------------------------------------------------------------- embeddings of place and time


def sincos_positions(hw: tuple[int, int], reference_hw: tuple[int, int], dim: int) -> torch.Tensor:
    """Fixed 2-D sin-cos positions (h * w, dim): half of dim for the column and half for the row, as in MAE's and DiT's code.

    A grid of another size spans the reference grid's range, so positions resize in 2-D without any interpolation.
    """

    def one_axis(position: torch.Tensor) -> torch.Tensor:  # (n,) -> (n, dim / 2)
        omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        angle = position[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    def places(n: int, reference: int) -> torch.Tensor:  # centres of n equal parts of the reference's range
        return (torch.arange(n, dtype=torch.float64) + 0.5) * (reference / n) - 0.5

    (h, w), (h0, w0) = hw, reference_hw
    rows, columns = one_axis(places(h, h0)), one_axis(places(w, w0))
    columns, rows = columns[None].expand(h, -1, -1), rows[:, None].expand(-1, w, -1)  # each (h, w, dim / 2)
    return torch.cat([columns, rows], dim=-1).reshape(h * w, dim).float()


def take(tokens: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The tokens (B, K, E) of (B or 1, N, E) at the places `keep` (B, K), in [0, N)."""
    return tokens.expand(len(keep), -1, -1).gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))


class LDAEEmbeddings(nn.Module):
    """Linear embedding of what the network sees of each patch, plus positions: (B, N, D or d) -> (B, N, E)."""

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.config = config
        self.projection = nn.Linear(config.input_dim, config.hidden_size)
        self.register_buffer("position_embeddings", self._positions(config.grid_hw), persistent=False)

    def initialize(self):
        """Sets what transformers asks `_init_weights` for: the positions."""
        init.copy_(self.position_embeddings, self._positions(self.config.grid_hw))

    def _positions(self, grid_hw: tuple[int, int]) -> torch.Tensor:
        return sincos_positions(grid_hw, self.config.grid_hw, self.config.hidden_size)[None]

    def validate(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool):
        """Raises a ValueError for images whose channels or size do not fit, before any work."""
        config, (channels, height, width) = self.config, pixel_values.shape[1:]
        if channels != config.num_channels:
            raise ValueError(f"pixel_values must have num_channels={config.num_channels} channels, got {channels}")
        if interpolate_pos_encoding:
            if height % config.patch_hw[0] or width % config.patch_hw[1]:
                raise ValueError(
                    f"pixel_values must be a multiple of patch_size={config.patch_hw} high and wide, got {height}x{width}"
                )
        elif (height, width) != config.image_hw:
            raise ValueError(
                f"pixel_values must be {config.image_hw} (image_size) high and wide, got {height}x{width}; "
                "for other sizes pass interpolate_pos_encoding=True"
            )

    def positions(self, image_hw: tuple[int, int]) -> torch.Tensor:
        """The positions (1, N, E) of an image's patches."""
        grid = tuple(size // patch for size, patch in zip(image_hw, self.config.patch_hw, strict=True))
        if not torch.compiler.is_exporting() and grid == self.config.grid_hw:
            return self.position_embeddings
        return self._positions(grid).to(self.position_embeddings)

    def forward(
        self, inputs: torch.Tensor, image_hw: tuple[int, int], keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The tokens (B, N, E) of inputs (B, N, D or d); with `keep` (B, K) those of inputs (B, K, D or d) at these places."""
        tokens = self.projection(inputs.to(input_dtype(self.projection)))
        positions = self.positions(image_hw)
        return tokens + (positions if keep is None else take(positions, keep)).to(tokens.dtype)


class NormalLinear(nn.Linear):
    """Starts normal, with deviation `config.initializer_range`; other linear layers start Xavier-uniform, as DiT's."""


class ZeroLinear(nn.Linear):
    """Starts at zero (adaLN-Zero)."""


class LDAETimestepEmbedding(nn.Module):
    """Sinusoidal features of t through a two-layer MLP: (B,) -> (B, conditioning_size). As DiT's, at a quarter of the width."""

    num_frequencies = 128

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.fc1 = NormalLinear(2 * self.num_frequencies, config.conditioning_size)
        self.fc2 = NormalLinear(config.conditioning_size, config.conditioning_size)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        exponent = (
            torch.arange(self.num_frequencies, device=timesteps.device, dtype=torch.float32) / self.num_frequencies
        )
        angle = timesteps[:, None].float() * torch.exp(-math.log(10000) * exponent)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.fc2(nn.functional.silu(self.fc1(features.to(input_dtype(self.fc1)))))


# ------------------------------------------------------------------------------------------------------------------ blocks


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out. (B, heads, N, E / heads) -> (B, N, heads, E / heads), and the weights (B, heads, N, N)."""
    weights = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1).to(value.dtype)
    output = torch.matmul(nn.functional.dropout(weights, p=dropout, training=module.training), value)
    return output.transpose(1, 2), weights


def full_attention_mask(config: LDAEConfig, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None):
    """The mask that the configuration's attention takes for a mask (B, N) of the patches that are attended to; None: all are."""
    if attention_mask is None:
        return None
    return create_bidirectional_mask(config=config, inputs_embeds=hidden_states, attention_mask=attention_mask)


class LDAEAttention(nn.Module):
    """Self-attention of ViT, through transformers' attention interface: (B, N, E) -> (B, N, E), and its weights if asked."""

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, tokens, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))  # each (B, heads, N, head_dim)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.projection(output.reshape(batch, tokens, width)), weights


class LDAEMLP(nn.Module):
    """Two layers on each token, as ViT's: (B, N, E) -> (B, N, E)."""

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class AdaLayerNorm(nn.Module):
    """LayerNorm whose affine is a function of t: (1 + scale) * norm(h) + shift, shift and scale (B or 1, 1, E)."""

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)

    def forward(self, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(shift, self.norm(hidden_states), 1 + scale)


class LDAELayer(GradientCheckpointingLayer):
    """A ViT block conditioned on t by adaLN-Zero (DiT): t shifts, scales and gates each of its two branches."""

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.modulation = ZeroLinear(config.conditioning_size, 6 * config.hidden_size)
        self.norm1 = AdaLayerNorm(config)
        self.attention = LDAEAttention(config)
        self.norm2 = AdaLayerNorm(config)
        self.mlp = LDAEMLP(config)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, **kwargs) -> torch.Tensor:
        """hidden_states (B, N, E), conditioning (B or 1, conditioning_size) -> (B, N, E)."""
        modulation = self.modulation(nn.functional.silu(conditioning))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        attended, _ = self.attention(self.norm1(hidden_states, shift1, scale1), **kwargs)
        hidden_states = torch.addcmul(hidden_states, gate1, attended)
        return torch.addcmul(hidden_states, gate2, self.mlp(self.norm2(hidden_states, shift2, scale2)))


# ------------------------------------------------------------------------------------------------------------------ models


class LDAEPreTrainedModel(PreTrainedModel):
    config: LDAEConfig
    config_class = LDAEConfig
    base_model_prefix = "ldae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["LDAEEmbeddings", "LDAELayer"]
    _keep_in_fp32_modules_strict = ["tokenizer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": LDAELayer, "attentions": LDAEAttention}

    def __init__(self, config: LDAEConfig, *args, **kwargs):
        config.validate_architecture()  # fields may have been set since it was made, as from_pretrained does
        super().__init__(config, *args, **kwargs)

    def fold(self, timestep: int | None = None, image_size: int | tuple[int, int] | None = None) -> PreTrainedModel:
        """The encoder at one t as a plain ViT of transformers, `IJepaModel`, which computes the same to rounding.

        A classifier comes along, as `IJepaForImageClassification`. `folding_ldae` has the algebra.

        Args:
            timestep: t, in [0, T); `config.feature_timestep` by default.
            image_size: of the images that it takes, multiples of the patch; `config.image_size` by default. It takes others
                only roughly, since its own resizing of positions is not l-DAE's.

        Raises:
            ValueError: for what cannot be exact, or a timestep or size that the model does not take.
        """
        return as_ijepa(plain_vit(self, timestep, image_size)).to(self.device, self.dtype)

    @torch.no_grad()
    def _init_weights(self, module):
        # Only `init.*` here: it leaves alone what from_pretrained has loaded. And only modules that hold tensors of their
        # own: transformers calls this for no others, so a block cannot set the weights of its linear layers here.
        if isinstance(module, nn.Linear):
            if isinstance(module, ZeroLinear):
                init.zeros_(module.weight)
            elif isinstance(module, NormalLinear):
                init.normal_(module.weight, std=self.config.initializer_range)
            else:
                init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, (Tokenizer, NoiseSchedule, LDAEEmbeddings, LDAEDecoder)):
            module.initialize()


class LDAEModel(LDAEPreTrainedModel):
    """The encoder. On clean images, with t fixed at `config.feature_timestep`, its output is the representation."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: LDAEConfig):
        super().__init__(config)
        self.tokenizer = config.tokenizer_class(config)
        self.embeddings = LDAEEmbeddings(config)
        self.timestep_embedding = LDAETimestepEmbedding(config)
        if config.num_classes:  # the last class stands for none
            self.class_embedding = nn.Embedding(config.num_classes + 1, config.conditioning_size)
        self.layers = nn.ModuleList([LDAELayer(config) for _ in range(config.num_hidden_layers)])
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm = norm if config.final_layernorm else nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    def condition(self, timesteps: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
        """Embeds what conditions the blocks, t (B or 1,) and for some models a class (B,), as (B or 1, conditioning_size).

        Raises:
            ValueError: for a t or class out of range.
        """
        check_range("timesteps", timesteps, 0, self.config.num_train_timesteps)
        conditioning = self.timestep_embedding(timesteps)
        if self.config.num_classes:
            classes = torch.full_like(timesteps, self.config.num_classes) if classes is None else classes
            check_range("classes", classes, 0, self.config.num_classes + 1)
            conditioning = conditioning + self.class_embedding(classes)
        return conditioning

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        latents: torch.Tensor | None = None,
        classes: torch.Tensor | None = None,
        image_hw: tuple[int, int] | None = None,
        keep: torch.Tensor | None = None,
        conditioning: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): images, in [-1, 1]. Not needed where `latents` are given.
            timesteps (`torch.LongTensor` of shape `(B,)` or `(1,)`, *optional*): noise level of each image, in [0, T);
                `config.feature_timestep` by default, which is right for clean images.
            interpolate_pos_encoding (`bool`): takes images of other sizes, multiples of the patch.
            latents (`torch.Tensor` of shape `(B, N, d)`, *optional*): z_t, seen instead of the images' own latents.
            classes (`torch.LongTensor` of shape `(B,)`, *optional*): in [0, num_classes]; by default `num_classes`: none.
            image_hw (`(int, int)`, *optional*): height and width that `latents` are of; by default those of the images, or
                `config.image_size`.
            keep (`torch.LongTensor` of shape `(B, K)`, *optional*): places, in [0, N), of the tokens that are seen; all by
                default.
            conditioning (`torch.Tensor` of shape `(B or 1, conditioning_size)`, *optional*): what `condition` gives, where it
                is there already; otherwise made of `timesteps` and `classes`.
            attention_mask (`torch.Tensor` of shape `(B, N)`, *optional*): 1 for the patches that the others attend to, and 0
                for those that they do not, which are left out of `pooler_output` too; all by default.

        Returns:
            `last_hidden_state` (B, N or K, E) and `pooler_output` (B, E), the tokens' mean; there is no class token.

        Raises:
            ValueError: for a size or channel count that the model does not take, neither images nor latents, or a timestep or
                class out of range.
        """
        if latents is None:
            if pixel_values is None:
                raise ValueError("pixel_values must be given, or latents in their place; got neither")
            self.embeddings.validate(pixel_values, interpolate_pos_encoding)
            latents = self.tokenizer.encode(pixel_values)
        if image_hw is None:
            image_hw = self.config.image_hw if pixel_values is None else pixel_values.shape[-2:]
        if conditioning is None:
            if timesteps is None:
                timesteps = torch.full((1,), self.config.feature_timestep, device=latents.device)
            conditioning = self.condition(timesteps, classes)
        inputs = latents if keep is None else take(latents, keep)
        if self.config.input_space == "image":
            # Images pass through the latent space, clean ones too: the embedding has only ever seen what that holds.
            inputs = self.tokenizer.decode_patches(inputs)
        hidden_states = self.embeddings(inputs, image_hw, keep)
        if attention_mask is not None and keep is not None:
            attention_mask = attention_mask.gather(1, keep)
        mask = full_attention_mask(self.config, hidden_states, attention_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, conditioning, attention_mask=mask, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        pooled = hidden_states.mean(dim=1)
        if attention_mask is not None:
            share = attention_mask.to(hidden_states.dtype)[..., None]
            pooled = (hidden_states * share).sum(dim=1) / share.sum(dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


# ------------------------------------------------------------------------------------------------------------ pre-training


class LDAEDecoder(nn.Module):
    """Blocks like the encoder's, then an adaptive LayerNorm and a linear layer to patches: (B, N, E) -> (B, N, D or d).

    Where the encoder sees a subset of the tokens, a learned mask token stands for the others, and all get their positions.
    """

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.config = config
        if config.keep_ratio < 1:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.layers = nn.ModuleList([LDAELayer(config) for _ in range(config.decoder_num_hidden_layers)])
        self.modulation = ZeroLinear(config.conditioning_size, 2 * config.hidden_size)
        self.norm = AdaLayerNorm(config)
        self.head = ZeroLinear(config.hidden_size, config.output_dim)

    def initialize(self):
        """Sets what transformers asks `_init_weights` for: the mask token."""
        if hasattr(self, "mask_token"):
            init.normal_(self.mask_token, std=self.config.initializer_range)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        positions: torch.Tensor,
        keep: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, E), or (B, K, E) at the places `keep` (B, K); conditioning (B or 1, conditioning_size);
        positions (1, N, E); attention_mask (B, N), as the encoder's -> (B, N, D or d)."""
        if hasattr(self, "mask_token"):
            positions = positions.to(hidden_states.dtype)
            if keep is not None:
                tokens = self.mask_token.to(hidden_states.dtype).expand(len(keep), positions.shape[1], -1)
                places = keep[..., None].expand(-1, -1, hidden_states.shape[-1])
                hidden_states = tokens.scatter(1, places, hidden_states)
            hidden_states = hidden_states + positions
        mask = full_attention_mask(self.config, hidden_states, attention_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, conditioning, attention_mask=mask)
        shift, scale = self.modulation(nn.functional.silu(conditioning))[:, None].chunk(2, dim=-1)
        return self.head(self.norm(hidden_states, shift, scale))


@dataclass
class LDAEForPreTrainingOutput(ModelOutput):
    """
    loss (scalar): the weighted error (equation 4), averaged over images, tokens and the numbers of a token's target.
    reconstruction (B, C, H, W): the predicted clean images.
    noisy_pixel_values (B, C, H, W): x_t, what the encoder saw of the images.
        Both are made in evaluation mode, or with `return_reconstruction=True`; training needs neither.
    timesteps (B,): the noise levels.
    hidden_states, attentions: the encoder's, with `output_hidden_states=True` and `output_attentions=True`.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    noisy_pixel_values: torch.FloatTensor | None = None
    timesteps: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class LDAEForPreTraining(LDAEPreTrainedModel):
    """Encoder and decoder with the denoising loss of the paper's end point (section 4.4, equation 4)."""

    def __init__(self, config: LDAEConfig):
        super().__init__(config)
        self.ldae = LDAEModel(config)
        self.noise_schedule = NoiseSchedule(config)
        self.decoder = LDAEDecoder(config)
        self.post_init()

    @property
    def uses_labels(self) -> bool:
        """Whether training needs the images' classes."""
        return self.config.num_classes > 0

    @property
    def _noise_device(self) -> torch.device:
        # `self.device` asks parameters, which DataParallel's replicas have none of
        return self.noise_schedule.gamma.device

    def sample_noise(
        self,
        batch_size: int,
        image_hw: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        """Draws what `forward` adds to images: `noise` (B, N, d), standard normal, and `timesteps` (B,), uniform in [0, T).

        With classes also `drop_class` (B,), bool: whose class is left out. With `keep_ratio` below 1 also `keep` (B, K): the
        places of the tokens that the encoder sees, at random for each image.

        Args:
            batch_size: B.
            image_hw: height and width of the images; `config.image_size` by default.
            generator: draws all of it, on the model's device.

        Raises:
            ValueError: if the grid of patches is no multiple of `mask_block`.
        """
        config, draw = self.config, {"generator": generator, "device": self._noise_device}
        rows, columns = (i // p for i, p in zip(image_hw or config.image_hw, config.patch_hw, strict=True))
        drawn = {
            "noise": torch.randn(batch_size, rows * columns, config.latent_dim, **draw),
            "timesteps": torch.randint(config.num_train_timesteps, (batch_size,), **draw),
        }
        if self.uses_labels:
            drawn["drop_class"] = torch.rand(batch_size, **draw) < config.class_dropout
        if config.keep_ratio < 1:
            drawn["keep"] = self._draw_kept(batch_size, rows, columns, draw)
        return drawn

    def _draw_kept(self, batch_size: int, rows: int, columns: int, draw: dict) -> torch.Tensor:
        """Places (B, K) of random blocks of `mask_block` x `mask_block` patches, at least one."""
        side = self.config.mask_block
        if rows % side or columns % side:
            raise ValueError(f"mask_block={side} must divide the grid of patches, got {rows} x {columns}")
        blocks = rows // side * (columns // side)
        kept = max(1, round(self.config.keep_ratio * blocks))
        block = torch.rand(batch_size, blocks, **draw).argsort(dim=1)[:, :kept]  # (B, blocks kept)
        corner = block // (columns // side) * side * columns + block % (columns // side) * side
        inside = torch.arange(side, device=self._noise_device)
        inside = (inside[:, None] * columns + inside).flatten()  # of the corner's block
        return (corner[..., None] + inside).flatten(1)

    def predict(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        classes: torch.Tensor | None = None,
        image_hw: tuple[int, int] | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The network's prediction (B, N, d or D) for z_t: decoder(encoder(z_t, t), t).

        Args:
            noisy_latents: z_t (B, N, d).
            timesteps: (B,) or (1,), in [0, T).
            classes: (B,), in [0, num_classes]; by default none.
            image_hw: height and width of the images; `config.image_size` by default.
            keep: places (B, K) of the tokens that the encoder sees; all by default.

        Raises:
            ValueError: for `keep` with `keep_ratio` 1, or a timestep or class out of range.
        """
        return self._predict(noisy_latents, timesteps, classes, image_hw, keep)[0]

    def _predict(self, noisy_latents, timesteps, classes, image_hw, keep, **kwargs):
        if keep is not None and self.config.keep_ratio == 1:
            raise ValueError(
                "keep is given to a model with keep_ratio=1, whose decoder has no token for what is left out"
            )
        conditioning = self.ldae.condition(timesteps, classes)
        encoded = self.ldae(
            latents=noisy_latents, image_hw=image_hw, keep=keep, conditioning=conditioning, return_dict=True, **kwargs
        )
        positions = self.ldae.embeddings.positions(image_hw or self.config.image_hw)
        prediction = self.decoder(
            encoded.last_hidden_state, conditioning, positions, keep, kwargs.get("attention_mask")
        )
        return prediction, encoded

    def target(self, pixel_values: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Returns what the network predicts (B, N, d or D), of images (B, C, H, W) with latents z_0 and noise, both (B, N, d)."""
        if self.config.prediction == "noise":
            return noise.expand_as(latents)
        if self.config.prediction == "latent":
            return latents
        patches = patchify(pixel_values, self.config.patch_hw)
        if self.config.prediction == "projected_image":
            patches = self.ldae.tokenizer.decode_patches(latents)
        return self.ldae.tokenizer.whiten(patches) if self.config.whitens_residual else patches

    def loss(self, target: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The loss of targets and predictions, both (B, N, D or d), by `config.prediction`; a mean over B, N and D or d.

        "noise": the plain square, DDPM's simple loss. "latent", "projected_image": lambda_t e_i^2 (section 4.3). "image":
        equation 4, lambda_t w_i r_i^2, where r = V_full (target - prediction), w_i = 1 for i <= d and `residual_weight` above.
        With `loss_units="latent"` r_i of an image is in the units of the scaled latents; where these are whitened, so are target
        and prediction, all components of a patch.
        """
        with maybe_autocast(target.device.type, enabled=False):
            error = target.float() - prediction.float()
            if self.config.prediction == "noise":
                return error.square().sum(-1).mean() / error.shape[-1]
            squares = self._weighted_squares(error)
            return (self.noise_schedule.loss_weight[timesteps] * squares.mean(dim=1)).mean() / error.shape[-1]

    def _weighted_squares(self, error: torch.Tensor) -> torch.Tensor:
        """sum_i w_i r_i^2 (B, N) of errors (B, N, D or d)."""
        config, tokenizer, weight = self.config, self.ldae.tokenizer, self.config.residual_weight
        if config.whitens_residual:
            squares = error.square()
            return squares[..., : config.latent_dim].sum(-1) + weight * squares[..., config.latent_dim :].sum(-1)
        squares = error.square().sum(-1)
        if config.prediction == "image":
            # V_full is orthonormal, so sum_i w_i r_i^2 = w ||e||^2 + (1 - w) ||V e||^2: the d rows of V suffice
            squares = weight * squares + (1 - weight) * (error @ tokenizer.V.T).square().sum(-1)
        if config.predicts_image and config.loss_units == "latent":
            squares = squares / tokenizer.scale[0].square()  # one factor for all components
        return squares

    def clean_images(
        self, prediction: torch.Tensor, noisy_latents: torch.Tensor, timesteps: torch.Tensor, image_hw: tuple[int, int]
    ) -> torch.Tensor:
        """The clean images (B, C, *image_hw), not clamped, that a prediction (B, N, D or d) stands for.

        Args:
            prediction: what `predict` gives.
            noisy_latents: z_t (B, N, d), from which predicted noise is taken away.
            timesteps: (B,) or (1,), those of z_t.
            image_hw: height and width of the images.
        """
        if self.config.whitens_residual:
            prediction = self.ldae.tokenizer.unwhiten(prediction)
        if self.config.predicts_image:
            return unpatchify(prediction, self.config.patch_hw, image_hw)
        if self.config.prediction == "noise":
            gamma, sigma = self.noise_schedule.at(timesteps)
            gamma = torch.where(gamma > 0, gamma, 1)  # gamma = 0 holds no image
            prediction = (noisy_latents - sigma * prediction) / gamma
        return self.ldae.tokenizer.decode(prediction, image_hw)

    @torch.no_grad()
    def denoise(
        self,
        pixel_values: torch.Tensor,
        timesteps: torch.Tensor | int,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step from noisy images to clean ones, which every l-DAE can do, whatever its loss and its prediction are.

        Args:
            pixel_values: clean images (B, C, H, W) in [-1, 1].
            timesteps: the noise level of each image (B,), or one for all, in [0, T).
            generator: draws the noise.
            noise: standard normal (B or 1, N, d), in place of what the generator would draw.
            keep: places (B, K) of the tokens that the encoder sees; all by default.
            interpolate_pos_encoding: takes images of other sizes, multiples of the patch.

        Returns:
            The noisy and the denoised images, both (B, C, H, W) of pixels as those given, clamped to [-1, 1].

        Raises:
            ValueError: for a size or channel count that the model does not take, a timestep out of range, or `keep` with
                `keep_ratio` 1.
        """
        self.ldae.embeddings.validate(pixel_values, interpolate_pos_encoding)
        image_hw = pixel_values.shape[-2:]
        timesteps = torch.as_tensor(timesteps, device=pixel_values.device).expand(len(pixel_values))
        if noise is None:
            noise = self.sample_noise(len(pixel_values), image_hw, generator)["noise"]
        noisy_latents = self.noise_schedule.add_noise(self.ldae.tokenizer.encode(pixel_values), noise, timesteps)
        prediction = self.predict(noisy_latents, timesteps, image_hw=image_hw, keep=keep)
        noisy = self.ldae.tokenizer.decode(noisy_latents, image_hw)
        denoised = self.clean_images(prediction, noisy_latents, timesteps, image_hw)
        return noisy.clamp(-1, 1), denoised.clamp(-1, 1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        interpolate_pos_encoding: bool = False,
        drop_class: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
        return_reconstruction: bool | None = None,
        return_loss: bool = True,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> LDAEForPreTrainingOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): clean images x_0, in [-1, 1].
            noise (`torch.Tensor` of shape `(B or 1, N, d)`, *optional*): standard normal; drawn if not given.
            timesteps (`torch.LongTensor` of shape `(B,)`, *optional*): in [0, T); drawn uniformly if not given.
            generator (`torch.Generator`, *optional*): draws what is not given.
            interpolate_pos_encoding (`bool`): takes images of other sizes, multiples of the patch.
            drop_class (`torch.BoolTensor` of shape `(B,)`, *optional*): whose class is left out; drawn if not given.
            keep (`torch.LongTensor` of shape `(B, K)`, *optional*): places of the tokens that the encoder sees; by default
                drawn in training mode, where `keep_ratio` is below 1, and all in evaluation mode.
            return_reconstruction (`bool`, *optional*): whether to make the images of the output; by default in evaluation mode.
            return_loss (`bool`): whether to compute the loss.
            num_items_in_batch (`int`, *optional*): labels in all micro-batches of a step, as transformers' Trainer counts them;
                the loss is then this micro-batch's part of the step's mean.
            labels (`torch.LongTensor` of shape `(B,)`, *optional*): classes in [0, num_classes), or -1 where one is not known,
                of a model that has them. It is taken from `kwargs`, since Trainer evaluates the loss of a model with a
                parameter of this name only where there are labels.

        Raises:
            ValueError: for a size or channel count that the model does not take, labels that it has no classes for, no
                labels in training where it has, a timestep or label out of range, or `keep` with `keep_ratio` 1.
        """
        labels = kwargs.pop("labels", None)
        self.ldae.embeddings.validate(pixel_values, interpolate_pos_encoding)
        if self.training and not (torch.compiler.is_compiling() or pixel_values.is_meta):
            self._warn_if_not_fitted()
        image_hw = pixel_values.shape[-2:]
        given = {"noise": noise, "timesteps": timesteps, "drop_class": drop_class, "keep": keep}
        drawn = self._draw_missing(given, len(pixel_values), image_hw, generator)
        noise, timesteps, keep = drawn["noise"], drawn["timesteps"], drawn["keep"]
        classes = self._classes(labels, drawn["drop_class"])

        latents = self.ldae.tokenizer.encode(pixel_values)  # z_0: (B, N, d)
        noisy_latents = self.noise_schedule.add_noise(latents, noise, timesteps)  # z_t
        prediction, encoded = self._predict(noisy_latents, timesteps, classes, image_hw, keep, **kwargs)
        loss = None
        if return_loss:
            loss = self.loss(self.target(pixel_values, latents, noise), prediction, timesteps)
            loss = part_of_mean(loss, labels, num_items_in_batch)

        reconstruction = noisy_pixel_values = None
        if not self.training if return_reconstruction is None else return_reconstruction:
            reconstruction = self.clean_images(prediction, noisy_latents, timesteps, image_hw)
            noisy_pixel_values = self.ldae.tokenizer.decode(noisy_latents, image_hw)  # x_t: (B, C, H, W)
        return LDAEForPreTrainingOutput(
            loss, reconstruction, noisy_pixel_values, timesteps, encoded.hidden_states, encoded.attentions
        )

    def _draw_missing(self, given: dict, batch_size: int, image_hw: tuple[int, int], generator) -> dict:
        """Returns what is given, with drawn values in place of None where they are needed; inference drops no tokens."""
        needed = ["noise", "timesteps"]
        needed += ["drop_class"] * self.uses_labels + ["keep"] * (self.training and self.config.keep_ratio < 1)
        missing = [name for name in needed if given[name] is None]
        drawn = self.sample_noise(batch_size, image_hw, generator) if missing else {}
        return {**given, **{name: drawn[name] for name in missing}}

    def _classes(self, labels: torch.Tensor | None, drop_class: torch.Tensor | None) -> torch.Tensor | None:
        """Classes (B,) with `num_classes` in place of what is left out or unknown (-1)."""
        if labels is None:
            if self.uses_labels and self.training:
                raise ValueError(
                    f"labels must be given to train a model with num_classes={self.config.num_classes}, -1 where one is not "
                    "known; transformers' Trainer passes on a column that is called 'label'"
                )
            return None
        if not self.uses_labels:
            raise ValueError("labels are given to a model with num_classes=0, which is told no classes")
        check_range("labels", labels, -1, self.config.num_classes)
        return torch.where(drop_class | (labels < 0), self.config.num_classes, labels)

    def _warn_if_not_fitted(self):
        if not getattr(self, "_fitted", False):
            self._fitted = True  # looked at once: it costs a synchronization
            if not self.ldae.tokenizer.fitted:
                logger.warning(
                    "The tokenizer is not fitted to any images: fit it with ldae.tokenizers.fitting.fit_to_images(model, images)."
                )


class LDAEForImageClassification(LDAEPreTrainedModel):
    """The encoder with a linear classifier on the mean of its tokens (paper: global average pooling, no class token)."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: LDAEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.ldae = LDAEModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): images, in [-1, 1].
            labels (`torch.LongTensor` of shape `(B,)`, *optional*): classes in [0, num_labels); with one label, or
                `config.problem_type="regression"`, numbers.
            interpolate_pos_encoding (`bool`): takes images of other sizes, multiples of the patch.
            num_items_in_batch (`int`, *optional*): labels in all micro-batches of a step, as transformers' Trainer counts them;
                the loss is then this micro-batch's part of the step's mean.

        Returns:
            `logits` (B, num_labels) and, with labels, `loss`, a scalar: transformers' for the configuration's `problem_type`.

        Raises:
            ValueError: for images of another size or number of channels, or a label out of range.
        """
        outputs = self.ldae(pixel_values, None, interpolate_pos_encoding, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            self._check_labels(labels)
            loss = part_of_mean(self.loss_function(labels, logits, self.config), labels, num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _check_labels(self, labels: torch.Tensor):
        of_classes = self.config.problem_type in (None, "single_label_classification") and self.num_labels > 1
        if of_classes and not labels.is_floating_point():
            check_range("labels", torch.where(labels == IGNORED, 0, labels), 0, self.num_labels)


class LDAEBackbone(BackboneMixin, LDAEPreTrainedModel):
    """The encoder as a backbone for detection and segmentation: feature maps (B, E, H / patch, W / patch), any image size.

    With `config.reshape_hidden_states` false they are tokens (B, 1 + N, E), of which the first is the mean of the others and
    stands where ViT has its class token. transformers' DPT and DepthAnything want these.
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^classifier\."]

    def __init__(self, config: LDAEConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.ldae = LDAEModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.ldae.get_input_embeddings()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        """Feature maps of `config.out_features`, each with the final LayerNorm applied.

        Args:
            pixel_values: images (B, C, H, W) in [-1, 1], H and W multiples of the patch.

        Raises:
            ValueError: for sides that are not, or another number of channels.
        """
        outputs = self.ldae(pixel_values, None, True, return_dict=True, **kwargs)
        grid = [size // patch for size, patch in zip(pixel_values.shape[-2:], self.config.patch_hw, strict=True)]
        stages = [
            self.ldae.layernorm(hidden_state)
            for stage, hidden_state in zip(self.stage_names, outputs.hidden_states, strict=True)
            if stage in self.out_features
        ]
        if self.config.reshape_hidden_states:
            feature_maps = tuple(tokens.transpose(1, 2).unflatten(2, grid) for tokens in stages)
        else:
            feature_maps = tuple(torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) for tokens in stages)
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# ---------------------------------------------------------------------------------------------------- checks and dtypes


def check_range(name: str, numbers: torch.Tensor, low: int, high: int):
    """Raises a ValueError with the first of the numbers that is not in [low, high).

    A GPU is not waited for: there CUDA's own assertion ends the program. Nothing is checked while a graph is traced.
    """
    if torch.compiler.is_compiling() or numbers.device.type == "meta":
        return
    fits = (numbers >= low) & (numbers < high)
    if numbers.device.type == "cuda":
        torch._assert_async(fits.all(), f"{name} must be in [{low}, {high})")
    elif not fits.all():
        raise ValueError(f"{name} must be in [{low}, {high}), got {numbers[~fits][0].item()}")


def input_dtype(linear: nn.Module) -> torch.dtype:
    """What a linear layer takes: the dtype of its weight, or float32 if it is quantized to integers or eight bits."""
    dtype = getattr(linear.weight, "dtype", None)  # torch's quantized layers have a method in its place
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float64) else torch.float32


def part_of_mean(
    loss: torch.Tensor, labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """What a micro-batch's mean `loss` adds to the mean over a step, which has `num_items_in_batch` labels in all its parts.

    transformers' Trainer gives that number where a batch has labels, and divides the loss itself where it has none.
    """
    if labels is None or num_items_in_batch is None:
        return loss
    return loss * labels.ne(IGNORED).sum() / num_items_in_batch


__all__ = [
    "LDAEBackbone",
    "LDAEForImageClassification",
    "LDAEForPreTraining",
    "LDAEModel",
    "LDAEPreTrainedModel",
]
