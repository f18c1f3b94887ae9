"""The encoder at one timestep as a plain ViT: what is fixed there becomes part of the weights of the layers beside it.

With the embedding W, b, the tokenizer's V, U, mean and scale, and shift, scale and gate of each block at that timestep:

    embedding of images    A = W U V,         bias b + W mean - A mean       `input_space="image"`
    embedding of latents   A = (W / scale) V, bias b - A mean                `input_space="latent"`
    LayerNorm of a branch  weight 1 + scale,  bias shift
    last layer of it       weight and bias times gate
    positions              by their formula, at the size that is asked for

This is exact: outputs differ by rounding alone. `fold` of any l-DAE model gives the ViT as transformers' I-JEPA, which has no
class token; the package's `ldae.export` gives it to other libraries.
"""

import copy
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class PlainViT(NamedTuple):
    """What a ViT without class token is made of.

    config: the l-DAE's, for what folding does not change.
    image_hw: height and width of the images, in pixels.
    weights: by the names of timm's `VisionTransformer`, in float64 on the CPU; with "head" if the model has a classifier.
    """

    config: PreTrainedConfig
    image_hw: tuple[int, int]
    weights: dict[str, torch.Tensor]

    @property
    def fields(self) -> dict[str, Any]:
        """What the configurations of transformers' ViTs call by the same names."""
        same = (
            "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "qkv_bias",
        )  # fmt: skip
        sizes = {"image_size": list(self.image_hw), "patch_size": list(self.config.patch_hw)}
        return {**sizes, **{name: getattr(self.config, name) for name in same}}

    @property
    def classifies(self) -> bool:
        """Whether it has a classifier."""
        return "head.weight" in self.weights


@torch.no_grad()
def plain_vit(
    model: PreTrainedModel, timestep: int | None = None, image_size: int | Iterable[int] | None = None
) -> PlainViT:
    """Folds an l-DAE model, whose classifier comes along. A model that is told classes is folded as if told none.

    Args:
        timestep: in [0, T); the configuration's `feature_timestep` by default, which is right for clean images.
        image_size: (height, width) or one number for both, multiples of the patch; the configuration's by default.

    Raises:
        ValueError: for a tokenizer that is no linear map of each patch, or a timestep or size that the model does not take.
    """
    config: Any = model.config
    if not config.tokenizer_class.linear:
        raise ValueError(
            f"an l-DAE with tokenizer_type={config.tokenizer_type!r} is no plain ViT, since that is no linear map of each "
            "patch; use the l-DAE itself"
        )
    encoder: Any = copy.deepcopy(model.base_model).cpu().double()
    image_hw = _image_hw(config, image_size)
    timesteps = torch.tensor([config.feature_timestep if timestep is None else timestep])
    conditioning = nn.functional.silu(encoder.condition(timesteps))[0]
    weights = {**_embedding(encoder), "pos_embed": encoder.embeddings.positions(image_hw)}
    for i, layer in enumerate(encoder.layers):
        weights |= {f"blocks.{i}.{name}": value for name, value in _block(layer, conditioning).items()}
    weights |= _named("norm", encoder.layernorm.state_dict())
    if isinstance(head := getattr(model, "classifier", None), nn.Linear):
        weights |= _named("head", {name: value.cpu().double() for name, value in head.state_dict().items()})
    return PlainViT(config, image_hw, {name: value.contiguous() for name, value in weights.items()})


def _image_hw(config: Any, image_size: int | Iterable[int] | None) -> tuple[int, int]:
    if image_size is None:
        return config.image_hw
    sizes = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if (
        len(sizes) != 2
        or min(sizes) < 1
        or any(size % patch for size, patch in zip(sizes, config.patch_hw, strict=True))
    ):
        raise ValueError(
            f"image_size must be a multiple of patch_size={config.patch_hw} high and wide, got {image_size}"
        )
    resized = copy.copy(config)
    resized.image_size, resized.mask_block = list(sizes), 1  # a plain ViT drops no tokens
    resized.validate_architecture()  # which bounds the memory that positions take
    return sizes


def _embedding(encoder: Any) -> dict[str, torch.Tensor]:
    tokenizer, projection = encoder.tokenizer, encoder.embeddings.projection
    V, U, mean, scale = (getattr(tokenizer, name).double() for name in ("V", "U", "mean", "scale"))
    W, bias = projection.weight, projection.bias
    if encoder.config.input_space == "image":
        A = W @ U @ V
        bias = bias + W @ mean - A @ mean
    else:
        A = (W / scale) @ V
        bias = bias - A @ mean
    kernel = (encoder.config.num_channels, *encoder.config.patch_hw)
    return _named("patch_embed.proj", {"weight": A.unflatten(1, kernel), "bias": bias})


def _block(layer: Any, conditioning: torch.Tensor) -> dict[str, torch.Tensor]:
    shift1, scale1, gate1, shift2, scale2, gate2 = layer.modulation(conditioning).chunk(6)
    return {
        **_named("norm1", {"weight": 1 + scale1, "bias": shift1}),
        **_named("attn.qkv", layer.attention.qkv.state_dict()),
        **_gated("attn.proj", layer.attention.projection, gate1),
        **_named("norm2", {"weight": 1 + scale2, "bias": shift2}),
        **_named("mlp.fc1", layer.mlp.fc1.state_dict()),
        **_gated("mlp.fc2", layer.mlp.fc2, gate2),
    }


def _gated(name: str, linear: nn.Linear, gate: torch.Tensor) -> dict[str, torch.Tensor]:
    return _named(name, {"weight": gate[:, None] * linear.weight, "bias": gate * linear.bias})


def _named(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": value for name, value in weights.items()}


def renamed(weights: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Weights by other names: every pattern of `names` is replaced, in their order."""

    def name_of(name: str) -> str:
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        return name

    return {name_of(name): value for name, value in weights.items()}


# ----------------------------------------------------------------------------------------------------- transformers' I-JEPA

IJEPA_NAMES = {
    r"^norm\.": "layernorm.",
    r"^blocks\.": "layers.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.attn\.proj\.": ".attention.o_proj.",
    r"\.attn\.": ".attention.",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^(layers|layernorm|embeddings)": r"ijepa.\1",
    r"^head\.": "classifier.",
}


def as_ijepa(plain: PlainViT) -> PreTrainedModel:
    """A plain ViT as transformers' `IJepaModel`, or `IJepaForImageClassification` if it has a classifier, in float64.

    Raises:
        ValueError: for a model without a final LayerNorm, which I-JEPA has.
    """
    from transformers import IJepaConfig, IJepaForImageClassification, IJepaModel

    config: Any = plain.config
    if not config.final_layernorm:
        raise ValueError(
            "transformers' I-JEPA ends in a LayerNorm, which final_layernorm=False has not; timm's ViT fits"
        )
    labels = {"id2label": config.id2label, "label2id": config.label2id, "problem_type": config.problem_type}
    labels = labels if plain.classifies else {}
    ijepa_config = IJepaConfig(**plain.fields, intermediate_size=config.intermediate_size, **labels)
    model = (IJepaForImageClassification if plain.classifies else IJepaModel)(ijepa_config)
    weights = renamed(_with_split_qkv(plain.weights), IJEPA_NAMES)
    if not plain.classifies:
        weights = {name.removeprefix("ijepa."): value for name, value in weights.items()}
    model.double().load_state_dict(weights)
    return model.eval()


def _with_split_qkv(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    split: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        names = [name.replace(".qkv.", f".{letter}_proj.") for letter in "qkv"] if ".qkv." in name else [name]
        split |= dict(zip(names, value.chunk(len(names)), strict=True))
    return split


__all__ = ["PlainViT", "as_ijepa", "plain_vit", "renamed"]
