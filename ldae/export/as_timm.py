"""timm's VisionTransformer. `timm.create_model` opens it, and so does transformers' `AutoModel` where timm is installed."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from folding_ldae import PlainViT
from ldae.files import write_json

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

    model = timm.create_model(ARCHITECTURE, num_classes=_num_classes(plain), **_arguments(plain)).double()
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
    }


def _num_classes(plain: PlainViT) -> int:
    return plain.config.num_labels if plain.classifies else 0


def save(plain: PlainViT, folder: Path):
    """Writes timm's `config.json`, with the transform of images in it, and the weights in float32.

    `save_for_hf` of timm 1.0.31 puts num_classes among model_args, which transformers' wrapper then passes twice.

    Raises:
        ValueError: as `as_timm` does.
    """
    config, half = plain.config, [0.5] * plain.config.num_channels
    description: dict[str, Any] = {
        "architecture": ARCHITECTURE,
        "num_classes": _num_classes(plain),
        "num_features": config.hidden_size,
        "global_pool": "avg",
        "model_args": _arguments(plain),
        "pretrained_cfg": {
            "input_size": [config.num_channels, *plain.image_hw],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": half,
            "std": half,
            "num_classes": _num_classes(plain),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if plain.classifies:
        description["label_names"] = [config.id2label[i] for i in range(config.num_labels)]
    save_file(as_timm(plain).float().state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", description)
