"""timm's VisionTransformer. `timm.create_model` opens it, and so does transformers' `AutoModel` where timm is installed."""

from pathlib import Path
from typing import Any

from torch import nn

from folding_ldae import PlainViT

OPENS = """import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)"""

ARCHITECTURE = "vit_base_patch16_224"  # every argument of it is replaced
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}  # timm's names by transformers'
EPSILON = 1e-6  # of timm's LayerNorm


def as_timm(plain: PlainViT) -> nn.Module:
    """A plain ViT as timm's `VisionTransformer`, in float64. Without a classifier it gives pooled features (B, E).

    Raises:
        ValueError: for an activation or a LayerNorm that timm's files cannot name.
    """
    import timm

    model = timm.create_model(ARCHITECTURE, pretrained=False, **_arguments(plain)).double()
    model.load_state_dict(plain.weights)
    return model.eval()


def _arguments(plain: PlainViT) -> dict[str, Any]:
    config = plain.config
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"timm's ViT has no hidden_act={config.hidden_act!r}, but {', '.join(ACTIVATIONS)}")
    if config.layer_norm_eps != EPSILON:
        raise ValueError(f"timm's files name no layer_norm_eps but {EPSILON}, got {config.layer_norm_eps}")
    return {
        "img_size": list(plain.image_hw),
        "patch_size": list(config.patch_hw),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,  # timm rounds the product down
        "qkv_bias": config.qkv_bias,
        "act_layer": ACTIVATIONS[config.hidden_act],
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,  # the final LayerNorm is before the mean
        "final_norm": config.final_layernorm,
        "num_classes": len(plain.weights["head.weight"]) if plain.classifies else 0,
    }


def save(plain: PlainViT, folder: Path):
    """Writes timm's `config.json`, with the transform of images in it, and the weights in float32.

    Raises:
        ValueError: as `as_timm` does.
    """
    from timm.models import save_for_hf

    config, arguments = plain.config, _arguments(plain)
    half = [0.5] * config.num_channels
    takes = {
        "input_size": [config.num_channels, *plain.image_hw],
        "mean": half,
        "std": half,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    described: dict[str, Any] = {"pretrained_cfg": takes}
    if plain.classifies:
        described["label_names"] = [config.id2label[i] for i in range(config.num_labels)]
    del arguments["num_classes"]  # has a place of its own
    save_for_hf(
        as_timm(plain).float(), str(folder), model_config=described, model_args=arguments, safe_serialization=True
    )
