"""The models whose training step is timed: l-DAE, ViTMAE and DiT with the same blocks on images of the same size."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from ldae import LDAEConfig, LDAEForPreTraining
from ldae.optimization import compile_blocks


@dataclass(frozen=True)
class Contender:
    """One line of the table: a model, its attention, the share of tokens that its encoder sees, compiled or not."""

    family: str
    attention: str | None = None
    keep_ratio: float = 1.0
    compiled: bool = False

    @property
    def name(self) -> str:
        """Names it, for example "l-DAE, sdpa, 50 % of the tokens, compiled"."""
        tokens = None if self.keep_ratio == 1 else f"{self.keep_ratio:.0%} of the tokens".replace("%", " %")
        return ", ".join(filter(None, (self.family, self.attention, tokens, "compiled" if self.compiled else None)))


def contenders(attention: list[str], keep_ratio: float = 1.0, compiled: bool = False) -> list[Contender]:
    """Everything that one run compares.

    Args:
        attention: implementations that l-DAE and ViTMAE are timed with.
        keep_ratio: below 1, l-DAE and ViTMAE are timed with this share of the tokens too.
        compiled: whether each is timed a second time with its blocks compiled.
    """
    shares = dict.fromkeys((1.0, keep_ratio))
    chosen = [
        Contender(family, name, share) for family in ("l-DAE", "ViTMAE") for name in attention for share in shares
    ]
    chosen.append(Contender("DiT"))
    if compiled:
        chosen += [Contender(c.family, c.attention, c.keep_ratio, compiled=True) for c in chosen]
    return chosen


class DiTForTraining(nn.Module):
    """Diffusers' DiT predicting its input: the cost of a DiT training step without its noise."""

    def __init__(self, config: LDAEConfig):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.transformer = DiTTransformer2DModel(
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.hidden_size // config.num_attention_heads,
            in_channels=config.num_channels,
            num_layers=config.num_blocks,
            sample_size=config.image_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=1000,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> the loss, a scalar."""
        t, labels = torch.randint(1000, (2, len(pixel_values)), device=pixel_values.device)
        return nn.functional.mse_loss(self.transformer(pixel_values, t, labels).sample, pixel_values)


def make(contender: Contender, config: LDAEConfig) -> nn.Module:
    """The contender's model, with the blocks of `config`."""
    attention = {"attn_implementation": contender.attention}
    if contender.family == "l-DAE":
        # A configuration of its own: a model's attention is written into it, and models read it there at each step.
        config = LDAEConfig.from_dict({**config.to_dict(), "keep_ratio": contender.keep_ratio})
        model = LDAEForPreTraining._from_config(config, **attention)
        model.ldae.tokenizer.spectrum.fill_(1)  # stands for a fitted tokenizer
        return model
    if contender.family == "DiT":
        return DiTForTraining(config)
    blocks = ("hidden_size", "num_attention_heads", "intermediate_size")
    sizes = ("num_hidden_layers", "decoder_num_hidden_layers", "image_size", "patch_size")
    mae = ViTMAEConfig(
        **{name: getattr(config, name) for name in (*blocks, *sizes)},
        **{f"decoder_{name}": getattr(config, name) for name in blocks},
        mask_ratio=1 - contender.keep_ratio,
    )
    return ViTMAEForPreTraining._from_config(mae, **attention)


def compile_contender(model: nn.Module):
    """Compiles the model's blocks one by one, as train_ldae.py does."""
    if isinstance(model, DiTForTraining):
        for block in model.transformer.transformer_blocks:
            block.compile()
    else:
        compile_blocks(model)


class Step:
    """A contender's training step; calling it takes one.

    Args:
        contender: what to train.
        config: the blocks and the size of the images.
        batch_size: images in a step.
        device: where the model and the images are.
        bf16: whether the forward pass runs under bf16 autocast.
    """

    def __init__(self, contender: Contender, config: LDAEConfig, batch_size: int, device: torch.device, bf16: bool):
        torch.manual_seed(0)
        with device:  # initial values of hundreds of millions of weights take long on a CPU
            self.model = make(contender, config).to(device).train()
        if contender.compiled:
            compile_contender(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.images = torch.rand(batch_size, config.num_channels, *config.image_hw, device=device) * 2 - 1
        self.device, self.bf16 = device, bf16

    def backward(self, images: torch.Tensor):
        """Forward and backward of the images (B, C, H, W)."""
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            output = self.model(images)
        (output if isinstance(output, torch.Tensor) else output.loss).backward()

    def __call__(self):
        self.backward(self.images)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parameters(self) -> int:
        """Number of the model's parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def flops_per_image(contender: Contender, config: LDAEConfig) -> float:
    """Floating-point operations of the matrix products in one image's forward and backward pass.

    They are counted and not computed, by tensors of the meta device. Attention is counted as its products are written, so
    nothing that a kernel computes twice counts twice.
    """
    batch_size, meta = 2, torch.device("meta")
    step = Step(Contender(contender.family, contender.attention, contender.keep_ratio), config, batch_size, meta, False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step.backward(step.images)
    return counter.get_total_flops() / batch_size
