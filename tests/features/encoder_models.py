"""Tiny encoders of every kind."""

import torch
from transformers import TimmWrapperConfig, TimmWrapperModel

from ldae import LDAEConfig, LDAEModel

TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MAE = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TIMM = {  # architecture and arguments of tiny models; the images they take; their number of blocks
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}, 3),
    "registers": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "reg_tokens": 4},
        3,
    ),
    "cnn": ("resnet18", {"channels": [8, 8, 16, 16]}, 2),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": [1, 1, 1], "num_heads": [1, 2, 2]},
        3,
    ),
}


def randomise(model):
    """Every weight random: an l-DAE's fresh blocks are the identity."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def ldae_model(cls=LDAEModel):
    model = randomise(cls(LDAEConfig(**TINY, latent_dim=8)))
    tokenizer = model.base_model.tokenizer
    tokenizer.V.copy_(torch.linalg.qr(torch.randn(48, 8))[0].T)
    tokenizer.U.copy_(tokenizer.V.T)
    return model


def timm_model(kind):
    architecture, arguments, _ = TIMM[kind]
    return TimmWrapperModel(TimmWrapperConfig(architecture=architecture, model_args=arguments)).eval()
