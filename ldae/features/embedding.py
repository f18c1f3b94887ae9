"""Images in, features with their names out: what `ldae.embed` gives and what `ldae-features` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ldae import launch
from ldae.data.images import ImageDataset
from ldae.data.sources import label_fault, load_examples
from ldae.features.encoders import Encoder, load_encoder
from ldae.features.extraction import Features, extract_features
from ldae.features.shards import to_table
from ldae.names import relative_names
from ldae.options import EncodingArguments, option

if TYPE_CHECKING:
    import datasets


@dataclass(kw_only=True)
class EmbedArguments(EncodingArguments):
    """The options that say which images are embedded, and how."""

    model: str = option(MISSING, "An l-DAE folder or Hub id, or any other vision encoder that AutoModel loads.")
    data: str = option(
        MISSING,
        "A folder of images with or without labels, a folder of parquet files, or a Hub data set (NAME:CONFIGURATION "
        "where it has several); or 'photos'.",
    )
    split: str = option("train", "Split whose images are taken; 'train' is all of a folder without splits.")
    features: Literal["pooled", "patches", "both"] = option(
        "pooled", "pooled: the mean of the patches, (E); patches: a feature for each, (N, E); or both."
    )
    dtype: Literal["float32", "float16"] = option("float32", "Type of the features' numbers.")
    on_bad_image: Literal["skip", "error"] = option("skip", "Unreadable images are named and skipped, or stop the run.")


def embed(options: EmbedArguments) -> datasets.Dataset:
    """Computes features in memory.

    Returns:
        A row for each readable image, in the columns that `to_table` names, which give NumPy arrays.

    Raises:
        FileNotFoundError, ValueError: as `load` does; a `ValueError` also if no image can be read.
    """
    import datasets

    accelerator = launch.start(options.mixed_precision)
    encoder, images = load(options, accelerator)
    with accelerator.autocast():
        features = embedded(options, encoder, images)
    for name in features.bad:
        print(f"left out, unreadable: {name}")
    if not len(features):
        raise ValueError(f"data: none of the {len(images)} images can be read, the first is {features.bad[0]}")
    description = describe(options, encoder, images, accelerator.mixed_precision)
    return datasets.Dataset(to_table(features, description)).with_format("numpy")


def load(options: EmbedArguments, accelerator: Accelerator) -> tuple[Encoder, ImageDataset]:
    """Loads the encoder, onto the device, and the images.

    Raises:
        FileNotFoundError, ValueError: as `load_encoder` and `load_examples` do; a `ValueError` also for labels that cannot be.
    """
    with accelerator.main_process_first():  # one process downloads and prepares
        examples = load_examples(options.data, options.split, **options.columns)
        encoder = load_encoder(options.model, options.trust_remote_code).to(accelerator.device)
    if (fault := label_fault(examples)) is not None:
        raise ValueError(f"--data {options.data!r}: {fault}; choose another --label_column")
    return encoder, ImageDataset(examples, encoder.image_hw, encoder.num_channels, keep_in_memory=False)


def embedded(
    options: EmbedArguments,
    encoder: Encoder,
    images: ImageDataset,
    indices: Sequence[int] | None = None,
    bar: tqdm | None = None,
) -> Features:
    """Computes the features of all images, or of some, whose names are relative to the data's folder.

    Raises:
        ValueError: for the first unreadable image, with on_bad_image="error".
    """
    features = extract_features(
        encoder,
        images,
        options.batch_size,
        options.num_workers,
        indices,
        tokens=options.features != "pooled",
        tokens_dtype=getattr(torch, options.dtype),
        on_bad_image=options.on_bad_image,
        bar=bar,
    )
    names, bad = (relative_names(part, options.data) for part in (features.names, features.bad))
    return replace(features, names=names, bad=bad)


def describe(options: EmbedArguments, encoder: Encoder, images: ImageDataset, mixed_precision: str) -> dict[str, Any]:
    """Says of which encoder and images the features are, and what they are."""
    num_patches, hidden_size = encoder.token_shape
    label = images.examples.features.get("label")
    return {
        "model": encoder.name,
        "digest": encoder.digest(),
        "data": options.data,
        "split": options.split,
        "fingerprint": images.version(),
        "num_images": len(images),
        "image_size": list(encoder.image_hw),
        "num_channels": encoder.num_channels,
        "num_patches": num_patches,
        "hidden_size": hidden_size,
        "features": ["pooled", "patches"] if options.features == "both" else [options.features],
        "labels": label is not None,
        "classes": getattr(label, "names", None),
        "dtype": options.dtype,
        "mixed_precision": mixed_precision,
    }
