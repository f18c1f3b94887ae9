"""l-DAE: a latent denoising autoencoder that learns visual features (arXiv 2401.14404, section 4).

Read it top to bottom, like the paper: tokenizer, noise, blocks conditioned on t, encoder, decoder and loss, heads.

    z_0 = V (x_0 - mu) / s            latent of each patch          PatchTokenizer.encode (first rungs: ConvTokenizer)
    z_t = gamma_t z_0 + sigma_t eps   noise in the latent           NoiseSchedule.add_noise
    x_t = U (s z_t) + mu              back to an image             PatchTokenizer.decode
    y   = decoder(encoder(x_t, t), t) prediction of x_0             LDAEModel, LDAEDecoder
    L   = lambda_t sum_i w_i r_i^2,   r = V_full (x_0 - y)          LDAEForPreTraining.loss

Earlier rungs of the paper's road (tables 1 and 3) are values of the configuration: the network may see z_t instead of x_t
(`input_space`), predict eps, z_0 or U (s z_0) + mu instead of x_0 (`prediction`), and be told a class (`num_classes`).

Shapes: B images, C channels, N patches (tokens), D numbers a patch, d latent dimensions, E hidden_size, T timesteps.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

try:  # inside a package of transformers' remote code
    from .configuration_ldae import LDAEConfig
except ImportError:  # installed, or run from a checkout
    from configuration_ldae import LDAEConfig

logger = logging.get_logger(__name__)


# ------------------------------------------------------------------------------------------------------ patches, tokenizer


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
    """Its numbers stay float32 when the model around it is cast, as by `model.half()`."""

    def _apply(self, fn, recurse: bool = True):
        def without_cast(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(without_cast, recurse)


class PatchTokenizer(Float32Module):
    """The linear patch tokenizer (paper, section 4.2): z = V (x - mean) / scale and back, x = U (scale z) + mean.

    PCA is V with orthonormal rows and U its transpose; pixels are V = U = identity. The numbers are part of the
    checkpoint and always float32. `ldae.tokenizers.pca.fit_to_images` fills them; until then V picks the patch's first d numbers.
    """

    def __init__(self, config: LDAEConfig):
        super().__init__()
        dim, latent_dim = config.patch_dim, config.latent_dim
        self.patch_hw = config.patch_hw
        self.register_buffer("V", torch.eye(latent_dim, dim, dtype=torch.float32))
        self.register_buffer("U", torch.eye(dim, latent_dim, dtype=torch.float32))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(latent_dim, dtype=torch.float32))
        # variance of the patches along every principal component, all zero while the tokenizer is not fitted
        self.register_buffer("spectrum", torch.zeros(dim, dtype=torch.float32))

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> scaled latents (B, N, d), in float32."""
        with torch.autocast(pixel_values.device.type, enabled=False):
            return (patchify(pixel_values.float(), self.patch_hw) - self.mean) @ self.V.T / self.scale

    def decode(self, latents: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
        """Scaled latents (B, N, d) -> images (B, C, *image_hw), in float32."""
        with torch.autocast(latents.device.type, enabled=False):
            patches = (latents.float() * self.scale) @ self.U.T + self.mean
        return unpatchify(patches, self.patch_hw, image_hw)


class ConvTokenizer(Float32Module):
    """The convolutional tokenizer of the first rungs (paper, table 1): diffusers' AutoencoderKL and its scale.

    A token is a 2 x 2 patch of the posterior's mode, divided by `scale`. Its weights are part of the checkpoint, always float32
    and never trained; `ldae.tokenizers.autoencoders` trains them before, `ldae.tokenizers.pca.fit_to_images` sets the scale.
    """

    def __init__(self, config: LDAEConfig):
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
        # variance of the latents' components before they are scaled, all zero while the scale is not fitted
        self.register_buffer("spectrum", torch.zeros(config.latent_dim, dtype=torch.float32))

    def train(self, mode: bool = True) -> "ConvTokenizer":
        return super().train(False)  # it is used as it is, whatever the model around it does

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> scaled latents (B, N, d), in float32."""
        with torch.autocast(pixel_values.device.type, enabled=False):
            latents = self.autoencoder.encode(pixel_values.float()).latent_dist.mode()
            return patchify(latents, (2, 2)) / self.scale

    def decode(self, latents: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
        """Scaled latents (B, N, d) -> images (B, C, *image_hw), in float32."""
        with torch.autocast(latents.device.type, enabled=False):
            latent_hw = image_hw[0] // self.stride, image_hw[1] // self.stride
            return self.autoencoder.decode(unpatchify(latents.float() * self.scale, (2, 2), latent_hw)).sample


def _autoencoder_kl(config: dict) -> nn.Module:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError("tokenizer_type='conv_vae' is diffusers' AutoencoderKL: pip install diffusers") from error
    return AutoencoderKL(**config)


# ------------------------------------------------------------------------------------------------------------------- noise


class NoiseSchedule(Float32Module):
    """Tables over T timesteps: z_t = gamma_t z_0 + sigma_t eps, and the loss weight lambda_t.

    lambda_t = gamma_t^2 / (gamma_t^2 + sigma_t^2): that is gamma_t^2 where gamma^2 + sigma^2 = 1 (table 3, "predict clean
    latent"), and 1 / (1 + sigma_t^2) where gamma = 1 (section 4.3).
    """

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.config = config
        for name, table in zip(("gamma", "sigma", "loss_weight"), self.tables(), strict=True):
            self.register_buffer(name, table.float(), persistent=False)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gamma, sigma, lambda, each (T,), in float64."""
        config, T = self.config, self.config.num_train_timesteps
        if config.noise_schedule == "linear_sigma":
            sigma = torch.linspace(0, config.sigma_max, T, dtype=torch.float64)
            gamma = torch.ones_like(sigma)
        elif config.noise_schedule == "single_sigma":
            sigma = torch.full((T,), config.sigma_single, dtype=torch.float64)
            gamma = torch.ones_like(sigma)
        elif config.noise_schedule == "linear_gamma2":  # 1 > gamma^2 >= 0
            gamma2 = 1 - torch.arange(1, T + 1, dtype=torch.float64) / T
            gamma, sigma = gamma2.sqrt(), (1 - gamma2).sqrt()
        else:
            gamma2 = _ddpm_alphas_cumprod(T).double()
            gamma, sigma = gamma2.sqrt(), (1 - gamma2).sqrt()
        return gamma, sigma, gamma**2 / (gamma**2 + sigma**2)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t of latents (B, N, d) with standard normal noise (B, N, d) at timesteps (B,) or (1,), in [0, T)."""
        gamma, sigma = self.gamma[timesteps][:, None, None], self.sigma[timesteps][:, None, None]
        return gamma * latents + sigma * noise


def _ddpm_alphas_cumprod(num_train_timesteps: int) -> torch.Tensor:
    """Betas from 1e-4 to 0.02 at T = 1000; at another T as DiT's code scales them, so that the noise ends as strong."""
    try:
        from diffusers import DDPMScheduler
    except ImportError as error:
        raise ImportError("noise_schedule='ddpm' takes its betas from diffusers: pip install diffusers") from error
    first, last = (beta * 1000 / num_train_timesteps for beta in (1e-4, 0.02))
    return DDPMScheduler(num_train_timesteps, first, last, "linear").alphas_cumprod


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
    return torch.cat([columns.repeat(h, 1), rows.repeat_interleave(w, dim=0)], dim=1).float()


class LDAEEmbeddings(nn.Module):
    """Linear embedding of what the network sees of each patch, plus positions: (B, N, D or d) -> (B, N, E)."""

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.config = config
        self.grid = tuple(i // p for i, p in zip(config.image_hw, config.patch_hw, strict=True))
        self.projection = nn.Linear(config.input_dim, config.hidden_size)
        positions = sincos_positions(self.grid, self.grid, config.hidden_size)
        self.register_buffer("position_embeddings", positions[None], persistent=False)

    def check(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool):
        """Refuses images whose channels or size do not fit, before any work."""
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

    def forward(self, inputs: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
        tokens = self.projection(inputs.to(self.projection.weight.dtype))
        positions = self.position_embeddings
        grid = tuple(size // patch for size, patch in zip(image_hw, self.config.patch_hw, strict=True))
        if torch.compiler.is_exporting() or grid != self.grid:
            positions = sincos_positions(grid, self.grid, self.config.hidden_size).to(positions.device)[None]
        return tokens + positions.to(tokens.dtype)


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
        return self.fc2(nn.functional.silu(self.fc1(features.to(self.fc1.weight.dtype))))


# ------------------------------------------------------------------------------------------------------------------ blocks


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out. (B, heads, N, E / heads) -> (B, N, heads, E / heads), and the weights (B, heads, N, N)."""
    weights = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1).to(value.dtype)
    output = torch.matmul(nn.functional.dropout(weights, p=dropout, training=module.training), value)
    return output.transpose(1, 2), weights


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

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, tokens, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))  # each (B, heads, N, head_dim)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, None, scaling=self.scaling, **kwargs)
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


class LDAEDecoder(nn.Module):
    """Blocks like the encoder's, then an adaptive LayerNorm and a linear layer to patches: (B, N, E) -> (B, N, D or d)."""

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.layers = nn.ModuleList([LDAELayer(config) for _ in range(config.decoder_num_hidden_layers)])
        self.modulation = ZeroLinear(config.conditioning_size, 2 * config.hidden_size)
        self.norm = AdaLayerNorm(config)
        self.head = ZeroLinear(config.hidden_size, config.output_dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, **kwargs) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, conditioning, **kwargs)
        shift, scale = self.modulation(nn.functional.silu(conditioning))[:, None].chunk(2, dim=-1)
        return self.head(self.norm(hidden_states, shift, scale))


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
        elif isinstance(module, LDAEEmbeddings):
            positions = sincos_positions(module.grid, module.grid, self.config.hidden_size)
            init.copy_(module.position_embeddings, positions[None])
        elif isinstance(module, PatchTokenizer):
            init.copy_(module.V, torch.eye(*module.V.shape))
            init.copy_(module.U, torch.eye(*module.U.shape))
            init.zeros_(module.mean)
            init.ones_(module.scale)
            init.zeros_(module.spectrum)
        elif isinstance(module, ConvTokenizer):
            init.ones_(module.scale)
            init.zeros_(module.spectrum)
        elif isinstance(module, NoiseSchedule):
            for name, table in zip(("gamma", "sigma", "loss_weight"), module.tables(), strict=True):
                init.copy_(getattr(module, name), table.float())


class LDAEModel(LDAEPreTrainedModel):
    """The encoder. On clean images, with t fixed at `config.feature_timestep`, its output is the representation."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: LDAEConfig):
        super().__init__(config)
        self.tokenizer = (ConvTokenizer if config.tokenizer_type == "conv_vae" else PatchTokenizer)(config)
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
        """What the blocks are told: t (B or 1,), and in the first rung a class (B,), as (B or 1, conditioning_size)."""
        conditioning = self.timestep_embedding(timesteps)
        if self.config.num_classes:
            classes = torch.full_like(timesteps, self.config.num_classes) if classes is None else classes
            conditioning = conditioning + self.class_embedding(classes)
        return conditioning

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        latents: torch.Tensor | None = None,
        classes: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): images, in [-1, 1].
            timesteps (`torch.LongTensor` of shape `(B,)` or `(1,)`, *optional*): noise level of each image, in [0, T);
                `config.feature_timestep` by default, which is right for clean images.
            interpolate_pos_encoding (`bool`): takes images of other sizes, multiples of the patch.
            latents (`torch.Tensor` of shape `(B, N, d)`, *optional*): z_t, seen instead of the images' own latents.
            classes (`torch.LongTensor` of shape `(B,)`, *optional*): in [0, num_classes]; by default `num_classes`: none.

        Returns:
            `last_hidden_state` (B, N, E) and `pooler_output` (B, E), the tokens' mean; there is no class token.

        Raises:
            ValueError: for a size or channel count that the model does not take.
        """
        if timesteps is None:
            timesteps = torch.full((1,), self.config.feature_timestep, device=pixel_values.device)
        self.embeddings.check(pixel_values, interpolate_pos_encoding)
        if latents is None:
            latents = self.tokenizer.encode(pixel_values)
        image_hw, inputs = pixel_values.shape[-2:], latents
        if self.config.input_space == "image":
            # Images pass through the latent space, clean ones too: the embedding has only ever seen what that holds.
            inputs = patchify(self.tokenizer.decode(latents, image_hw), self.config.patch_hw)
        conditioning = self.condition(timesteps, classes)
        hidden_states = self.embeddings(inputs, image_hw)
        for layer in self.layers:
            hidden_states = layer(hidden_states, conditioning, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states.mean(dim=1))


@dataclass
class LDAEForPreTrainingOutput(ModelOutput):
    """
    loss (scalar): the weighted error (equation 4), averaged over images, tokens and the numbers of a token's target.
    reconstruction (B, C, H, W): the predicted clean images.
    noisy_pixel_values (B, C, H, W): x_t, what the encoder saw.
        Both are None in training mode with a convolutional tokenizer, whose decoder would cost more than the step.
    timesteps (B,): the noise levels.
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

    def sample_noise(
        self, batch_size: int, num_patches: int | None = None, generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """Draws what `forward` adds: `noise` (B, N, d), standard normal, and `timesteps` (B,), uniform in [0, T).

        With classes also `drop_label` (B,), bool: whose class is left out.
        """
        if num_patches is None:
            num_patches = self.ldae.embeddings.position_embeddings.shape[1]
        noise = torch.randn(batch_size, num_patches, self.config.latent_dim, generator=generator, device=self.device)
        timesteps = torch.randint(
            self.config.num_train_timesteps, (batch_size,), generator=generator, device=self.device
        )
        drawn = {"noise": noise, "timesteps": timesteps}
        if self.uses_labels:
            chance = torch.rand(batch_size, generator=generator, device=self.device)
            drawn["drop_label"] = chance < self.config.class_dropout
        return drawn

    def loss(self, target: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The loss of targets and predictions, both (B, N, D or d), by `config.prediction`; a mean over B, N and D or d.

        "noise": the plain square, DDPM's simple loss. "latent", "projected_image": lambda_t e_i^2 (section 4.3). "image":
        equation 4, lambda_t w_i r_i^2, where r = V_full (target - prediction); V_full is orthonormal, so sum_i w_i r_i^2 =
        w ||e||^2 + (1 - w) ||V e||^2 with w = residual_weight: the d rows of V suffice.
        """
        tokenizer, weight = self.ldae.tokenizer, self.config.residual_weight
        with torch.autocast(target.device.type, enabled=False):
            error = target.float() - prediction.float()
            squares = error.square().sum(-1)
            if self.config.prediction == "noise":
                return squares.mean() / error.shape[-1]
            if self.config.prediction == "image":
                squares = weight * squares + (1 - weight) * (error @ tokenizer.V.T).square().sum(-1)
            return (self.noise_schedule.loss_weight[timesteps] * squares.mean(dim=1)).mean() / error.shape[-1]

    def clean_images(
        self, prediction: torch.Tensor, noisy_latents: torch.Tensor, timesteps: torch.Tensor, image_hw: tuple[int, int]
    ) -> torch.Tensor:
        """The clean images (B, C, *image_hw) that a prediction (B, N, D or d) stands for."""
        if self.config.prediction in ("image", "projected_image"):
            return unpatchify(prediction, self.config.patch_hw, image_hw)
        if self.config.prediction == "noise":
            gamma, sigma = (
                table[timesteps][:, None, None] for table in (self.noise_schedule.gamma, self.noise_schedule.sigma)
            )
            gamma = torch.where(gamma > 0, gamma, 1)  # gamma = 0 holds no image
            prediction = (noisy_latents - sigma * prediction) / gamma
        return self.ldae.tokenizer.decode(prediction, image_hw)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        interpolate_pos_encoding: bool = False,
        labels: torch.Tensor | None = None,
        drop_label: torch.Tensor | None = None,
        **kwargs,
    ) -> LDAEForPreTrainingOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): clean images x_0, in [-1, 1].
            noise (`torch.Tensor` of shape `(B or 1, N, d)`, *optional*): standard normal; drawn if not given.
            timesteps (`torch.LongTensor` of shape `(B,)`, *optional*): in [0, T); drawn uniformly if not given.
            generator (`torch.Generator`, *optional*): draws what is not given.
            interpolate_pos_encoding (`bool`): takes images of other sizes, multiples of the patch.
            labels (`torch.LongTensor` of shape `(B,)`, *optional*): classes in [0, num_classes), of a model that has them.
            drop_label (`torch.BoolTensor` of shape `(B,)`, *optional*): whose class is left out; drawn if not given.

        Raises:
            ValueError: for a size or channel count that the model does not take, or labels that it has no classes for.
        """
        self.ldae.embeddings.check(pixel_values, interpolate_pos_encoding)
        if self.training and not torch.compiler.is_compiling():
            self._warn_if_not_fitted()
        tokenizer, patch_hw, image_hw = self.ldae.tokenizer, self.config.patch_hw, pixel_values.shape[-2:]
        patches = patchify(pixel_values, patch_hw)  # x_0: (B, N, D)
        given = {"noise": noise, "timesteps": timesteps, "drop_label": drop_label}
        if noise is None or timesteps is None or (self.uses_labels and drop_label is None):
            drawn = self.sample_noise(len(pixel_values), patches.shape[1], generator)
            given = {name: drawn.get(name) if value is None else value for name, value in given.items()}
        noise, timesteps = given["noise"], given["timesteps"]
        classes = self._classes(labels, given["drop_label"])

        latents = tokenizer.encode(pixel_values)  # z_0: (B, N, d)
        noisy_latents = self.noise_schedule.add_noise(latents, noise, timesteps)  # z_t
        outputs = self.ldae(
            pixel_values, timesteps, interpolate_pos_encoding, noisy_latents, classes, return_dict=True, **kwargs
        )
        prediction = self.decoder(outputs.last_hidden_state, self.ldae.condition(timesteps, classes))  # (B, N, D or d)
        if self.config.prediction == "noise":
            target = noise.expand_as(prediction)
        elif self.config.prediction == "latent":
            target = latents
        else:
            target = (
                patches
                if self.config.prediction == "image"
                else patchify(tokenizer.decode(latents, image_hw), patch_hw)
            )

        reconstruction = noisy_pixel_values = None
        if not (self.training and self.config.tokenizer_type == "conv_vae"):
            reconstruction = self.clean_images(prediction, noisy_latents, timesteps, image_hw)
            noisy_pixel_values = tokenizer.decode(noisy_latents, image_hw)  # x_t: (B, C, H, W)
        return LDAEForPreTrainingOutput(
            loss=self.loss(target, prediction, timesteps),
            reconstruction=reconstruction,
            noisy_pixel_values=noisy_pixel_values,
            timesteps=timesteps,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _classes(self, labels: torch.Tensor | None, drop_label: torch.Tensor | None) -> torch.Tensor | None:
        """Classes (B,) with `num_classes` in place of what is left out or unknown (-1)."""
        if labels is None:
            return None
        if not self.uses_labels:
            raise ValueError("labels are given to a model with num_classes=0, which is told no classes")
        return torch.where(drop_label | (labels < 0), self.config.num_classes, labels)

    def _warn_if_not_fitted(self):
        if not getattr(self, "_fitted", False):
            self._fitted = True  # looked at once: it costs a synchronization
            if not self.ldae.tokenizer.spectrum.any():
                logger.warning(
                    "The tokenizer is not fitted to any images: fit it with ldae.tokenizers.pca.fit_to_images(model, images)."
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
        **kwargs,
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): images, in [-1, 1].
            labels (`torch.LongTensor` of shape `(B,)`, *optional*): classes in [0, num_labels); with one label, or
                `config.problem_type="regression"`, numbers.
            interpolate_pos_encoding (`bool`): takes images of other sizes, multiples of the patch.

        Returns:
            `logits` (B, num_labels) and, with labels, `loss`, a scalar: transformers' for the configuration's `problem_type`.

        Raises:
            ValueError: for images of another size or number of channels.
        """
        outputs = self.ldae(pixel_values, None, interpolate_pos_encoding, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LDAEBackbone(BackboneMixin, LDAEPreTrainedModel):
    """The encoder as a backbone for detection and segmentation: feature maps (B, E, H / patch, W / patch), any image size."""

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
        """Feature maps (B, E, H / patch, W / patch) of `config.out_features`, each with the final LayerNorm applied.

        Args:
            pixel_values: images (B, C, H, W) in [-1, 1], H and W multiples of the patch.

        Raises:
            ValueError: for sides that are not, or another number of channels.
        """
        outputs = self.ldae(pixel_values, None, True, return_dict=True, **kwargs)
        grid = [size // patch for size, patch in zip(pixel_values.shape[-2:], self.config.patch_hw, strict=True)]
        feature_maps = tuple(
            self.ldae.layernorm(hidden_state).transpose(1, 2).unflatten(2, grid)
            for stage, hidden_state in zip(self.stage_names, outputs.hidden_states, strict=True)
            if stage in self.out_features
        )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "LDAEBackbone",
    "LDAEForImageClassification",
    "LDAEForPreTraining",
    "LDAEModel",
    "LDAEPreTrainedModel",
]
