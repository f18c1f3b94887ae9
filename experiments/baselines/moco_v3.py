"""MoCo v3 (arXiv 2104.02057), pre-trained by `train_ldae.train` on the same images and clock.

    accelerate launch -m experiments.baselines.moco_v3 [recipe.yaml] [--options of train_ldae.py]

The encoder is transformers' ViT with the blocks that the options name, fixed positions and a frozen random patch projection
(section 4.4); the heads and the momentum update are lightly's (`pip install -e .[baselines]`).

Four things differ from the paper. The representation is the mean of the patch tokens, as in all our probes, where the paper
has the class token. The momentum stays at the paper's starting value, 0.99, where the paper raises it to 1 by a cosine:
the loop may end by the clock, and does not tell a model how far it is. The views are cut out of the one crop that the loop
gives, so they take 20 to 100 % of it (paper: 8 to 100 % of the image). Batch statistics are those of one process.
"""

import copy
from dataclasses import dataclass
from itertools import pairwise

import torch
from lightly.models.modules.heads import ProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils import dist
from torch import nn
from torchvision.transforms import v2
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTPreTrainedModel
from transformers.utils import ModelOutput

from experiments.baselines.vit import encoder, patch_mean, vit_config
from ldae.data.images import to_pixel_values
from ldae.mistakes import run_command
from ldae.options import parse_arguments
from train_ldae import train

TEMPERATURE = 0.2
MOMENTUM = 0.99
OUTPUT_DIM = 256


def augmentations(height: int, width: int) -> tuple[v2.Transform, v2.Transform]:
    """The transforms that make the first and the second view of a uint8 image (3, H, W): BYOL's, as in the paper's code.

    The blur's deviation, 0.1 to 2 pixels of 224, is scaled to the image's size.
    """
    scale = min(height, width) / 224
    deviation = (0.1 * scale, 2 * scale)
    size = 2 * round(3 * deviation[1]) + 1  # three deviations to either side
    crop = [v2.RandomResizedCrop((height, width), (0.2, 1), interpolation=v2.InterpolationMode.BICUBIC)]
    color = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), v2.RandomGrayscale(0.2)]
    blur, flip = v2.GaussianBlur(size, deviation), [v2.RandomHorizontalFlip()]
    return (
        v2.Compose([*crop, *color, blur, *flip]),
        v2.Compose([*crop, *color, v2.RandomApply([blur], 0.1), v2.RandomSolarize(128, 0.2), *flip]),
    )


def two_views(pixel_values: torch.Tensor, seeds: torch.Tensor) -> list[torch.Tensor]:
    """Images (B, 3, H, W) in [-1, 1] and a seed for each view (B, 2) -> two such batches of views."""
    images = ((pixel_values + 1) * 127.5).round().to(torch.uint8)  # what they were before the loop scaled them
    views = []
    with torch.random.fork_rng(devices=[]):
        for augment, column in zip(augmentations(*images.shape[-2:]), seeds.T.tolist(), strict=True):
            view = []
            for image, seed in zip(images, column, strict=True):
                torch.default_generator.manual_seed(seed)  # the CPU's, from which all transforms draw
                view.append(augment(image))
            views.append(to_pixel_values(torch.stack(view)))
    return views


def contrastive_loss(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`ctr` of the paper's algorithm 1, of queries and keys (B, D): row i of both is the same image.

    The negatives are all other keys of all processes.
    """
    queries, keys = nn.functional.normalize(queries), nn.functional.normalize(keys)
    if dist.world_size() > 1:
        keys = torch.cat(dist.gather(keys.contiguous()))
    own = torch.arange(len(queries), device=queries.device) + dist.rank() * len(queries)
    return 2 * TEMPERATURE * nn.functional.cross_entropy(queries @ keys.T / TEMPERATURE, own)


@dataclass
class MoCoV3Output(ModelOutput):
    """The loss, a scalar."""

    loss: torch.Tensor | None = None


class MoCoV3(ViTPreTrainedModel):
    """A ViT with MoCo v3's heads and its momentum encoder, which has no gradients and is saved in checkpoints.

    The heads' hidden layers are twice as wide as the blocks' (paper: 4096, which is 1.3 times for ViT-B and 2.7 for ViT-S).
    """

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        if config.num_channels != 3:
            raise ValueError(f"num_channels must be 3, since MoCo v3 changes colours, got {config.num_channels}")
        hidden = 2 * config.intermediate_size
        self.vit = encoder(config)
        deactivate_requires_grad(self.vit.embeddings.patch_embeddings)
        self.projector = _head(config.hidden_size, hidden, hidden, OUTPUT_DIM)
        self.predictor = _head(OUTPUT_DIM, hidden, OUTPUT_DIM)
        self.post_init()
        self.momentum_vit, self.momentum_projector = copy.deepcopy(self.vit), copy.deepcopy(self.projector)
        deactivate_requires_grad(self.momentum_vit)
        deactivate_requires_grad(self.momentum_projector)

    def sample_noise(self, batch_size: int, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """`seeds` (B, 2), int64: one for each view of an image."""
        return {"seeds": torch.randint(1 << 62, (batch_size, 2), generator=generator, device=self.device)}

    def forward(self, pixel_values: torch.Tensor, seeds: torch.Tensor | None = None) -> MoCoV3Output:
        """The symmetrised loss of images (B, 3, H, W) in [-1, 1] (algorithm 1); in training, moves the momentum encoder."""
        if seeds is None:
            seeds = self.sample_noise(len(pixel_values))["seeds"]
        first, second = two_views(pixel_values, seeds)
        if self.training:
            update_momentum(self.vit, self.momentum_vit, MOMENTUM)
            update_momentum(self.projector, self.momentum_projector, MOMENTUM)
        pairs = ((self.query(first), self.key(second)), (self.query(second), self.key(first)))
        return MoCoV3Output(loss=sum(contrastive_loss(queries, keys) for queries, keys in pairs))

    def query(self, view: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 256)."""
        return self.predictor(self.projector(patch_mean(self.vit, view)))

    @torch.no_grad()
    def key(self, view: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 256), without gradients."""
        return self.momentum_projector(patch_mean(self.momentum_vit, view))


def _head(*widths: int) -> ProjectionHead:
    """An MLP with batch normalization after every layer, the last without a scale of its own, as the paper's code has it."""
    last = len(widths) - 2
    return ProjectionHead(
        [
            (before, after, nn.BatchNorm1d(after, affine=i < last), nn.ReLU() if i < last else None)
            for i, (before, after) in enumerate(pairwise(widths))
        ]
    )


def build(model_args) -> MoCoV3:
    """A new MoCo v3 with the blocks of an l-DAE's options."""
    return MoCoV3(vit_config(model_args))


def main():
    model_args, data_args, train_args = parse_arguments()
    if train_args.gradient_accumulation_steps > 1:
        raise ValueError(
            "--gradient_accumulation_steps must be 1, since MoCo v3 moves its momentum encoder and takes its negatives with "
            f"every micro-batch, got {train_args.gradient_accumulation_steps}"
        )
    torch.manual_seed(train_args.seed)
    train(model_args, data_args, train_args, model=build(model_args))


if __name__ == "__main__":
    run_command(main)
