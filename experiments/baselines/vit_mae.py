"""transformers' ViTMAE, pre-trained by `train_ldae.train` on the same images and clock.

    accelerate launch -m experiments.baselines.vit_mae [recipe.yaml] [--options of train_ldae.py]

The encoder has the blocks that the options name, and the decoder as many of the same width as an l-DAE's: those of
--decoder_num_hidden_layers (MAE itself takes 8 of width 512). The pixels of a patch are normalised in the target and 75 % of
the tokens masked, as the authors recommend (MAE, table 3), or all but the share that --keep_ratio names.
"""

import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from ldae.mistakes import run_command
from ldae.options import parse_arguments
from train_ldae import train

KEEP_RATIO = 0.25  # of the tokens, where the options keep all, as an l-DAE does


class ViTMAEBaseline(ViTMAEForPreTraining):
    """ViTMAE with the one method that `train_ldae.train` asks of a model beside `forward`."""

    def sample_noise(self, batch_size: int, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """`noise` (B, N), uniform: the tokens with the smallest are kept."""
        num_patches = self.vit.embeddings.patch_embeddings.num_patches
        return {"noise": torch.rand(batch_size, num_patches, generator=generator, device=self.device)}

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """Sets it in the decoder, too, whose blocks have a copy of the configuration."""
        super().set_attn_implementation(attn_implementation, **kwargs)
        for layer in self.decoder.decoder_layers:
            layer.attention.config._attn_implementation = self.config._attn_implementation


def build(model_args) -> ViTMAEBaseline:
    """A new ViTMAE with the blocks of an l-DAE's options, and its authors' initial values."""
    config = model_args.config()
    same = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads")
    decoder = ("hidden_size", "num_attention_heads", "intermediate_size")
    model = ViTMAEBaseline(
        ViTMAEConfig(
            **{name: getattr(config, name) for name in (*same, "intermediate_size")},
            **{f"decoder_{name}": getattr(config, name) for name in decoder},
            decoder_num_hidden_layers=config.decoder_num_hidden_layers,
            layer_norm_eps=config.layer_norm_eps,
            mask_ratio=1 - (config.keep_ratio if config.keep_ratio < 1 else KEEP_RATIO),
            norm_pix_loss=True,
        )
    )
    # A new ViTMAE of transformers 5.24 has zeros for positions, in the encoder and the decoder, which would handicap it:
    # its own initialization returns early, or zeroes them. What it defines is called here.
    embeddings = model.vit.embeddings
    embeddings.patch_embeddings.projection._is_hf_initialized = False
    with torch.no_grad():
        embeddings.initialize_weights()
        model.decoder.initialize_weights(embeddings.patch_embeddings.num_patches)
    return model


def main():
    model_args, data_args, train_args = parse_arguments()
    torch.manual_seed(train_args.seed)
    train(model_args, data_args, train_args, model=build(model_args))


if __name__ == "__main__":
    run_command(main)
