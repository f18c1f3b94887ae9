"""Speed of an encoder, of its folded forms and of timm's own ViT of the same size, in one run; and what int8 costs.

    python -m benchmarks.export --output benchmarks/results/export.json
    python -m benchmarks.export --table benchmarks/results/export.json    # puts the table into README.md

Accuracy is that of k-NN on the embedded photographs, on the pooled features that each contender gives.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import command
from benchmarks.device import in_rounds, ratio
from folding_ldae import plain_vit
from ldae.data.images import ImageDataset
from ldae.data.order import to_pixel_values
from ldae.data.photos import load_photos
from ldae.export import as_onnx
from ldae.export.as_timm import ARCHITECTURE, as_timm
from ldae.export.command import load
from ldae.features.extraction import Features
from ldae.options import option
from ldae.probes.knn import knn_predictions

OWN, OURS, IJEPA, TIMM = "timm's own ViT", "l-DAE", "folded: transformers' I-JEPA", "folded: timm's ViT"
ONNX, INT8 = "folded: onnxruntime", "folded: onnxruntime, int8"
Pool = Callable[[torch.Tensor], torch.Tensor]  # images (B, C, H, W) -> pooled features (B, E)


@dataclass
class ExportSpeedArguments:
    """Time the forward pass of an encoder and of its folded forms."""

    model: str = option("model_cards/ldae-vit-small-tiny-imagenet64", "An l-DAE folder or Hub id.")
    batch_sizes: list[int] = option([1, 64], "Images in a forward pass.")
    rounds: int = option(15, "Timed rounds of each contender.")
    threads: int = option(1, "CPU threads.")
    output: str | None = option(None, "JSON file to write.")
    overwrite: bool = option(False, "Replace a JSON file that is there.")
    table: str | None = option(None, "Only put this JSON file's table into README.md.")


def contenders(model: str, threads: int) -> dict[str, Pool]:
    """What is compared, by its name. timm's own ViT has a class token and random weights."""
    import timm

    encoder = load(model)
    plain, config = plain_vit(encoder), encoder.config
    ijepa, folded = encoder.fold(), as_timm(plain).float()
    own = timm.create_model(
        ARCHITECTURE,
        img_size=config.image_hw,
        patch_size=config.patch_hw,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        num_classes=0,
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        as_onnx.save(plain, Path(folder), int8=True)
        onnx, int8 = (session(Path(folder) / name, threads) for name in (as_onnx.FILE, as_onnx.INT8_FILE))
    return {
        OURS: lambda x: encoder(x).pooler_output,
        IJEPA: lambda x: ijepa(x).last_hidden_state.mean(dim=1),
        TIMM: folded,
        OWN: own,
        ONNX: onnx,
        INT8: int8,
    }


def session(file: Path, threads: int) -> Pool:
    """onnxruntime's session of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    run = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]).run
    return lambda x: torch.from_numpy(run(["pooler_output"], {"pixel_values": x.numpy()})[0])


def features(pool: Pool, split: str, image_hw: tuple[int, int], num_channels: int) -> Features:
    """Pooled features of the embedded photographs."""
    photos = load_photos(split)
    images = ImageDataset(photos, image_hw, num_channels)
    pixels = torch.stack([torch.as_tensor(images[0, i]["pixel_values"]) for i in range(len(images))])
    pooled = torch.cat([pool(some) for some in to_pixel_values(pixels).split(64)])
    return Features(features=pooled, labels=torch.tensor(photos["label"]))


@torch.inference_mode()
def measure(arguments: ExportSpeedArguments) -> Iterator[dict]:
    """Accuracies and differences, then rounds of all contenders in turn, after two of each that are not counted."""
    torch.set_num_threads(arguments.threads)
    config, pools = load(arguments.model).config, contenders(arguments.model, arguments.threads)
    shape = (config.num_channels, *config.image_hw)
    accuracy, of_validation = {}, {}
    for name, pool in pools.items():
        train, validation = (features(pool, split, shape[1:], shape[0]) for split in ("train", "validation"))
        predictions = knn_predictions(train, validation.features, int(train.labels.max()) + 1)
        accuracy[name] = (predictions == validation.labels).double().mean().item()
        of_validation[name] = validation.features
    ours = of_validation[OURS]
    cosine = {n: torch.cosine_similarity(x, ours).min().item() for n, x in of_validation.items()}
    seconds: dict[str, dict[str, list[float]]] = {}
    for size in arguments.batch_sizes:
        x = torch.rand(size, *shape) * 2 - 1
        calls = {name: lambda pool=pool, x=x: pool(x) for name, pool in pools.items()}
        seconds[str(size)] = in_rounds(calls, arguments.rounds, warmup=2)
    yield {"benchmark": "export", "seconds": seconds, "accuracy": accuracy, "least_cosine": cosine}


def table(result: dict) -> str:
    """A result as markdown."""
    arguments, seconds = result["arguments"], result["seconds"]
    batches = list(seconds)
    lines = [
        f"{result['hardware']['processor']}, {arguments['threads']} CPU thread(s), float32, {Path(arguments['model']).name}, "
        f"{arguments['rounds']} rounds; {result['date'][:10]}.",
        "",
        "| | "
        + " | ".join(f"ms, batch of {size} | of timm's own" for size in batches)
        + " | k-NN | least cosine to l-DAE |",
        "|---|" + "---:|" * (2 * len(batches) + 2),
    ]
    for name, accuracy in result["accuracy"].items():
        cells = [
            f"{1000 * statistics.median(seconds[size][name]):.1f} | {ratio(seconds[size][name], seconds[size][OWN]):.2f}"
            for size in batches
        ]
        quality = ["", ""] if name == OWN else [f"{100 * accuracy:.1f} %", f"{result['least_cosine'][name]:.6f}"]
        lines.append(f"| {' | '.join([name, *cells, *quality])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(ExportSpeedArguments, measure, table)
