"""A graph of ONNX for any number of images, of any size in multiples of the patch."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from folding_ldae import PlainViT, as_ijepa
from ldae.export.processor import save_processor
from modeling_ldae import sincos_positions

OPENS = """import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
outputs = session.run(None, {{"pixel_values": pixel_values}})  # float32, (B, C, H, W)"""

FILE, INT8_FILE = "model.onnx", "model.int8.onnx"


class AnySize(nn.Module):
    """I-JEPA's embeddings with positions by l-DAE's formula, which are exact at every size: (B, C, H, W) -> (B, N, E)."""

    def __init__(self, patch_embeddings: nn.Module, plain: PlainViT):
        super().__init__()
        self.patch_embeddings = patch_embeddings
        self.patch_hw, self.grid_hw = plain.config.patch_hw, plain.config.grid_hw

    def forward(self, pixel_values: torch.Tensor, **ignored: Any) -> torch.Tensor:
        tokens = self.patch_embeddings(pixel_values)
        height, width = (side // patch for side, patch in zip(pixel_values.shape[-2:], self.patch_hw, strict=True))
        return tokens + sincos_positions((height, width), self.grid_hw, tokens.shape[-1]).to(tokens)


class Exported(nn.Module):
    """`logits` of a classifier; otherwise `last_hidden_state` (B, N, E) and `pooler_output` (B, E)."""

    def __init__(self, plain: PlainViT):
        super().__init__()
        self.vit: Any = as_ijepa(plain).float()
        self.outputs = ["logits"] if plain.classifies else ["last_hidden_state", "pooler_output"]
        encoder = self.vit.base_model
        encoder.embeddings = AnySize(encoder.embeddings.patch_embeddings, plain)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.vit(pixel_values)
        if "logits" in self.outputs:
            return (outputs.logits,)
        return outputs.last_hidden_state, outputs.last_hidden_state.mean(dim=1)


def save(plain: PlainViT, folder: Path, int8: bool = False):
    """Writes `model.onnx` with its weights beside it, and an image processor.

    Args:
        int8: also writes `model.int8.onnx`, whose linear layers have weights of 8 bits.

    Raises:
        ValueError: as `as_ijepa` does.
    """
    (p, q), dim = plain.config.patch_hw, torch.export.Dim
    sizes = {0: dim("batch"), 2: p * dim("rows", max=1024), 3: q * dim("columns", max=1024)}
    model = Exported(plain).eval()
    example = torch.zeros(2, plain.config.num_channels, 3 * p, 5 * q)  # no two sizes the same, and none 1
    torch.onnx.export(
        model,
        (example,),
        folder / FILE,
        dynamo=True,
        dynamic_shapes=(sizes,),
        input_names=["pixel_values"],
        output_names=model.outputs,
        custom_translation_table={torch.ops.aten.cos.default: _cos},
        verbose=False,
    )
    save_processor(plain, folder)
    if int8:
        quantize(folder)


def _cos(angle: Any) -> Any:
    """cos x = 1 - 2 sin²(x / 2), for the positions' float64 angles: onnxruntime before 1.29 has no cosine of float64."""
    import onnxscript

    op: Any = onnxscript.opset18
    one, two = (op.CastLike(number, angle) for number in (1.0, 2.0))
    half = op.Sin(op.Div(angle, two))
    return op.Sub(one, op.Mul(two, op.Mul(half, half)))


def quantize(folder: Path):
    """Writes `model.int8.onnx` beside `model.onnx`: onnxruntime's dynamic quantization of the matrix products."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises a pre-processing, which refuses weights in a file of their own
    try:
        quantize_dynamic(
            folder / FILE,
            folder / INT8_FILE,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.disable(disabled)
