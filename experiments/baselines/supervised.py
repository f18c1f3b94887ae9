"""A ViT that learns from labels, trained by `train_ldae.train` on the same images and clock. It shows what labels are worth.

    accelerate launch -m experiments.baselines.supervised [recipe.yaml] [--options of train_ldae.py]

Positions are fixed, as in the other baselines; labels are smoothed by 0.1.
"""

import torch
from torch import nn
from transformers import ViTConfig
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.vit.modeling_vit import ViTPreTrainedModel

from experiments.baselines.vit import encoder, patch_mean, vit_config
from ldae.data.sources import count_classes, load_train
from ldae.mistakes import run_command
from ldae.options import DataArguments, parse_arguments
from train_ldae import train


class Supervised(ViTPreTrainedModel):
    """A linear classifier on the mean of a ViT's patch tokens, where transformers' own takes the class token."""

    uses_labels = True  # asks `train_ldae.train` for them

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.vit = encoder(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def sample_noise(self, batch_size: int, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """Nothing: a classifier draws no noise."""
        return {}

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Images (B, C, H, W) in [-1, 1] -> logits (B, classes); labels (B,), -1 where an image has none."""
        logits = self.classifier(patch_mean(self.vit, pixel_values))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=0.1)
        return ImageClassifierOutput(loss=loss, logits=logits)


def build(model_args, data_args: DataArguments) -> Supervised:
    """A new classifier for the classes of the data, with the blocks of an l-DAE's options."""
    examples = load_train(data_args, data_args.streaming)
    labelled = "label" in (examples.features or {})  # `train` raises an error for other data
    return Supervised(vit_config(model_args, num_labels=count_classes(examples) if labelled else 1))


def main():
    model_args, data_args, train_args = parse_arguments()
    torch.manual_seed(train_args.seed)
    train(model_args, data_args, train_args, model=build(model_args, data_args))


if __name__ == "__main__":
    run_command(main)
