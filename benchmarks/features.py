"""Speed of feature extraction beside the encoder alone and transformers' pipeline, on the same images in one run.

    python -m benchmarks.features --dtype bfloat16 --rounds 15 --output benchmarks/results/features.json
    python -m benchmarks.features --table benchmarks/results/features.json    # puts the table into README.md

The encoder alone, on one batch that is already a tensor, is the ceiling: nothing can be faster than it.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import pipeline

from benchmarks import command
from benchmarks.device import in_rounds, ratio
from ldae.data.images import ImageDataset, decode
from ldae.data.sources import load_examples
from ldae.features.encoders import load_encoder
from ldae.features.extraction import extract_features
from ldae.options import option
from ldae.report.tables import markdown

CEILING, DECODED, FILES, PIPELINE = (
    "the encoder alone", "ldae.features, images decoded", "ldae.features, from files", "pipeline of transformers",
)  # fmt: skip


@dataclass(kw_only=True)
class FeatureSpeedArguments(command.FileArguments):
    """Time the extraction of pooled features."""

    model: str = option("model_cards/ldae-vit-small-tiny-imagenet64", "An l-DAE folder or Hub id.")
    data: str = option("photos", "'photos', a folder, parquet files or a Hub data set; its training split is read.")
    num_images: int = option(512, "Images in a round.", minimum=1)
    batch_size: int = option(64, "Images in a forward pass.", minimum=1)
    dtype: Literal["float32", "bfloat16"] = option("float32", "Of the weights.")
    rounds: int = option(7, "Timed rounds of each contender.", minimum=1)
    threads: int = option(1, "CPU threads.", minimum=1)


def contenders(arguments: FeatureSpeedArguments) -> dict[str, Callable]:
    """What is timed: each takes all images once."""
    dtype = getattr(torch, arguments.dtype)
    encoder = load_encoder(arguments.model).to(dtype)
    examples = load_examples(arguments.data, "train")
    indices = [i % len(examples) for i in range(arguments.num_images)]  # a small set is read several times
    examples = examples.select(indices)
    decoded = ImageDataset(examples, encoder.image_hw, encoder.num_channels)
    size = arguments.batch_size
    batch = torch.rand(size, encoder.num_channels, *encoder.image_hw) * 2 - 1
    extract = pipeline("image-feature-extraction", model=arguments.model, dtype=dtype, device=-1)

    def alone():
        with torch.inference_mode():
            for _ in range(0, arguments.num_images, size):
                encoder(batch)

    def from_files():
        fresh = ImageDataset(examples, encoder.image_hw, encoder.num_channels, keep_in_memory=False)
        extract_features(encoder, fresh, size, progress=False)

    def by_pipeline():
        extract([decode(image, encoder.num_channels) for image in examples["image"]], pool=True, batch_size=size)

    return {
        CEILING: alone,
        DECODED: lambda: extract_features(encoder, decoded, size, progress=False),
        FILES: from_files,
        PIPELINE: by_pipeline,
    }


def measure(arguments: FeatureSpeedArguments) -> Iterator[dict]:
    """Rounds of all contenders in turn, after one of each that is not counted."""
    torch.set_num_threads(arguments.threads)
    yield {"benchmark": "features", "seconds": in_rounds(contenders(arguments), arguments.rounds, warmup=1)}


def table(result: dict) -> str:
    """A result as markdown."""
    arguments, seconds = result["arguments"], result["seconds"]
    head = (
        f"{result['hardware']['processor']}, {arguments['threads']} CPU thread(s), {Path(arguments['model']).name}, "
        f"{arguments['dtype']}, batches of {arguments['batch_size']}, "
        f"{arguments['rounds']} rounds of {arguments['num_images']} images; {result['date'][:10]}."
    )
    rows = [
        {
            "": name,
            "images a second": f"{arguments['num_images'] / statistics.median(times):.0f}",
            "of the encoder alone": f"{ratio(seconds[CEILING], times):.2f}",
        }
        for name, times in seconds.items()
    ]
    return f"{head}\n\n{markdown(rows)}"


if __name__ == "__main__":
    command.run(FeatureSpeedArguments, measure, table)
