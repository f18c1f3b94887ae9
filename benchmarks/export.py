"""Speed of an encoder, of its folded forms and of timm's own ViT of the same size, in one run; and what int8 costs.

    python -m benchmarks.export --output benchmarks/results/export.json
    python -m benchmarks.export --dtype bfloat16 --output benchmarks/results/export-bf16.json
    python -m benchmarks.export --table benchmarks/results/export.json    # puts the table into README.md

Accuracy is that of k-NN on the embedded photographs, on pooled features of l-DAE and of the graph in int8; what else is folded
gives l-DAE's own features to rounding. The graphs of onnxruntime are timed in float32 only.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import command
from benchmarks.device import in_rounds, ratio
from configuration_ldae import LDAEConfig
from folding_ldae import plain_vit
from ldae.data.images import ImageDataset
from ldae.data.photos import load_photos
from ldae.export import as_onnx
from ldae.export.as_timm import ARCHITECTURE, as_timm
from ldae.export.command import load
from ldae.features.extraction import Features
from ldae.options import option
from ldae.probes.knn import knn_predictions
from ldae.report.tables import markdown

OWN, BARE = "timm's own ViT", "timm's own ViT, no class token"
OURS, IJEPA, TIMM = "l-DAE", "folded: transformers' I-JEPA", "folded: timm's ViT"
ONNX, INT8 = "folded: onnxruntime", "folded: onnxruntime, int8"
Pool = Callable[[torch.Tensor], torch.Tensor]  # images (B, C, H, W) -> pooled features (B, E)


@dataclass(kw_only=True)
class ExportSpeedArguments(command.FileArguments):
    """Time the forward pass of an encoder and of its folded forms."""

    model: str = option("model_cards/ldae-vit-small-tiny-imagenet64", "An l-DAE folder or Hub id.")
    batch_sizes: list[int] = option([1, 32], "Images in a forward pass.", minimum=1)
    dtype: Literal["float32", "bfloat16"] = option("float32", "Of the weights and the images.")
    rounds: int = option(7, "Timed rounds of each contender.", minimum=1)
    threads: int = option(1, "CPU threads.", minimum=1)


def contenders(model: str, threads: int, dtype: torch.dtype) -> dict[str, Pool]:
    """What is compared, by its name. timm's own ViTs have random weights."""
    import timm

    encoder = load(model)
    plain, config = plain_vit(encoder), encoder.config
    ijepa, folded = encoder.fold().to(dtype), as_timm(plain).to(dtype)
    sizes = {
        "img_size": config.image_hw,
        "patch_size": config.patch_hw,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "num_classes": 0,
    }
    own = timm.create_model(ARCHITECTURE, **sizes).eval().to(dtype)
    bare = timm.create_model(ARCHITECTURE, **sizes, class_token=False, global_pool="avg").eval().to(dtype)
    pools: dict[str, Pool] = {
        OURS: lambda x: encoder(x).pooler_output,
        IJEPA: lambda x: ijepa(x).last_hidden_state.mean(dim=1),
        TIMM: folded,
        OWN: own,
        BARE: bare,
    }
    if dtype != torch.float32:
        encoder.to(dtype)
        return pools
    with tempfile.TemporaryDirectory() as folder:
        as_onnx.save(plain, Path(folder), int8=True)
        onnx, int8 = (session(Path(folder) / name, threads) for name in (as_onnx.FILE, as_onnx.INT8_FILE))
    return {**pools, ONNX: onnx, INT8: int8}


def session(file: Path, threads: int) -> Pool:
    """onnxruntime's session of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    run = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]).run
    return lambda x: torch.from_numpy(run(["pooler_output"], {"pixel_values": x.numpy()})[0])


def features(pool: Pool, split: str, config: LDAEConfig) -> Features:
    """Pooled features of the embedded photographs."""
    photos = load_photos(split)
    images = ImageDataset(photos, config.image_hw, config.num_channels)
    pooled = torch.cat([pool(some) for some in images.pixel_values(range(len(images))).split(64)])
    return Features(features=pooled, labels=torch.tensor(photos["label"]))


@torch.inference_mode()
def measure(arguments: ExportSpeedArguments) -> Iterator[dict]:
    """Rounds of all contenders in turn, after two of each that are not counted; then the accuracies, in float32."""
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    config, pools = load(arguments.model).config, contenders(arguments.model, arguments.threads, dtype)
    result: dict[str, Any] = {"benchmark": "export", "seconds": {}, "accuracy": {}}
    for size in arguments.batch_sizes:
        x = torch.rand(size, config.num_channels, *config.image_hw, dtype=dtype) * 2 - 1
        calls = {name: lambda pool=pool, x=x: pool(x) for name, pool in pools.items()}
        result["seconds"][str(size)] = in_rounds(calls, arguments.rounds, warmup=2)
    yield result
    if dtype != torch.float32:
        return
    pooled = {}
    for name in (OURS, INT8):
        train, validation = (features(pools[name], split, config) for split in ("train", "validation"))
        predictions = knn_predictions(train, validation.features, int(train.labels.max()) + 1)
        result["accuracy"][name] = (predictions == validation.labels).double().mean().item()
        pooled[name] = validation.features
    yield {**result, "least_cosine": torch.cosine_similarity(pooled[OURS], pooled[INT8]).min().item()}


def table(result: dict) -> str:
    """A result as markdown."""
    arguments, seconds, accuracy = result["arguments"], result["seconds"], result["accuracy"]
    rows = []
    for name in next(iter(seconds.values())):
        row = {"": name}
        for size, times in seconds.items():
            row[f"ms, images at once: {size}"] = f"{1000 * statistics.median(times[name]):.1f}"
            row[f"of timm's own, {size}"] = f"{ratio(times[name], times[OWN]):.2f}"
        rows.append(row)
    dtype = arguments["dtype"] + (", int8 apart" if accuracy else "")
    head = (
        f"{result['hardware']['processor']}, {arguments['threads']} CPU thread(s), {dtype}, "
        f"{Path(arguments['model']).name}, {arguments['rounds']} rounds; {result['date'][:10]}."
    )
    if not accuracy:
        return f"{head}\n\n{markdown(rows)}"
    foot = (
        f"k-NN on the photographs is right for {100 * accuracy[OURS]:.1f} % by l-DAE and {100 * accuracy[INT8]:.1f} % in int8, "
        f"whose features have a cosine of {result['least_cosine']:.5f} or more to l-DAE's."
    )
    return f"{head}\n\n{markdown(rows)}\n\n{foot}"


if __name__ == "__main__":
    command.run(ExportSpeedArguments, measure, table)
