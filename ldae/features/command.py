"""Writes the features of images to parquet or safetensors files.

`ldae-features --model FOLDER --data DATA --output_dir OUT`, or `accelerate launch -m ldae.features …` for several
processes. `--help` lists the options.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ldae import launch
from ldae.data.images import ImageDataset
from ldae.data.sources import label_fault, load_examples, validate_output
from ldae.features.encoders import Encoder, load_encoder
from ldae.features.extraction import extract_features, progress_bar
from ldae.features.shards import ABOUT, claim, missing, read_header, write_shard
from ldae.files import write_json
from ldae.mistakes import run_command
from ldae.options import option, option_parser


@dataclass
class FeatureArguments:
    model: str = option(MISSING, "An l-DAE folder or Hub id, or any other vision encoder that AutoModel loads.")
    data: str = option(
        MISSING,
        "A folder of images with or without labels, a folder of parquet files, or a Hub data set (NAME:CONFIGURATION "
        "where it has several); or 'photos'.",
    )
    output_dir: str = option(
        MISSING, "Folder of the shards and _features.json. A run that was stopped goes on where it was."
    )
    overwrite: bool = option(False, "Replace the features of another run in output_dir.")
    split: str = option("train", "Split whose images are taken; 'train' is all of a folder without splits.")
    image_column: str | None = option(None, "Column of the images; by default the first that holds images.")
    label_column: str | None = option(None, "Column of the labels; by default 'label' or the first that holds classes.")
    features: Literal["pooled", "patches", "both"] = option(
        "pooled", "pooled: the mean of the patches, (E); patches: a feature for each, (N, E); or both."
    )
    format: Literal["parquet", "safetensors"] = option("parquet", "Format of the shards.")
    dtype: Literal["float32", "float16"] = option("float32", "Type of the numbers in the shards.")
    shard_size: int = option(
        10_000, "Images a shard is made from; a process holds the features of two in memory.", minimum=1
    )
    batch_size: int = option(256, "Images in a forward pass of one process.", minimum=1)
    num_workers: int = option(0, "Processes that read images, for each process of accelerate.", minimum=0)
    on_bad_image: Literal["skip", "error"] = option("skip", "Unreadable images are named and skipped, or stop the run.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None,
        "Precision, as accelerate's; by default bf16 where it is faster, unless accelerate's configuration says another.",
    )
    trust_remote_code: bool = option(False, "Run the code that comes with the model. Only for a model that you trust.")

    @property
    def folder(self) -> Path:
        """The folder of the shards."""
        return Path(self.output_dir).expanduser()


def parse_arguments(argv: list[str] | None = None) -> FeatureArguments:
    """Reads the options of a command line.

    Raises:
        SystemExit: for an unknown option or value, named on stderr.
        ValueError: for an output_dir inside the data's folder.
    """
    parser = option_parser(FeatureArguments, description="Writes the features of images to files.")
    (options,) = parser.parse_args_into_dataclasses(argv)
    validate_output(options.folder, options.data)
    return options


def main(argv: list[str] | None = None) -> None:
    """Writes `features-00000-of-00012.parquet` and so on, and `_features.json`, which says what they are.

    A shard depends on its images alone, and is there whole or not at all. So a run can be stopped, and can go on with any
    number of processes. A shard that was damaged since is written again.

    Raises:
        FileExistsError: if output_dir holds features of another model, other images or other options.
        FileNotFoundError, ValueError: as `load_encoder` and `load_examples` do; a `ValueError` also if no image can be read.
    """
    options, start = parse_arguments(argv), time.perf_counter()
    accelerator = launch.start(options.mixed_precision)
    encoder, images = _load(options, accelerator)
    identity = _identity(options, encoder, images, accelerator.mixed_precision)
    ranges = [range(i, min(i + options.shard_size, len(images))) for i in range(0, len(images), options.shard_size)]
    names = (f"features-{i:05d}-of-{len(ranges):05d}.{options.format}" for i in range(len(ranges)))
    shards = dict(zip((options.folder / name for name in names), ranges, strict=True))

    found: list[list[Path]] = [[]]
    if accelerator.is_main_process:
        claim(options.folder, identity, options.overwrite)
        found = [missing(shards)]
    new = broadcast_object_list(found)[0]
    mine = new[accelerator.process_index :: accelerator.num_processes]
    _write({path: shards[path] for path in mine}, options, encoder, images, identity, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        done = sum(len(shards[path]) for path in new)
        _finish(options.folder, identity, list(shards), len(new), done / (time.perf_counter() - start))
    accelerator.end_training()


def _load(options: FeatureArguments, accelerator: Accelerator) -> tuple[Encoder, ImageDataset]:
    with accelerator.main_process_first():  # one process downloads and prepares
        examples = load_examples(
            options.data, options.split, image_column=options.image_column, label_column=options.label_column
        )
        encoder = load_encoder(options.model, options.trust_remote_code).to(accelerator.device)
    if examples is None:
        raise ValueError(f"--split: data {options.data!r} has no validation split")
    if (fault := label_fault(examples)) is not None:
        raise ValueError(f"--data {options.data!r}: {fault}; choose another --label_column")
    return encoder, ImageDataset(examples, encoder.image_hw, encoder.num_channels)


def _identity(
    options: FeatureArguments, encoder: Encoder, images: ImageDataset, mixed_precision: str
) -> dict[str, Any]:
    """Returns what _features.json says from the start, which must be the same for a run to go on."""
    num_patches, hidden_size = encoder.token_shape
    label = images.examples.features.get("label")
    return {
        "model": encoder.name,
        "digest": encoder.digest(),
        "data": options.data,
        "split": options.split,
        "fingerprint": images.fingerprint(),
        "num_images": len(images),
        "image_size": list(encoder.image_hw),
        "num_channels": encoder.num_channels,
        "num_patches": num_patches,
        "hidden_size": hidden_size,
        "features": ["pooled", "patches"] if options.features == "both" else [options.features],
        "labels": label is not None,
        "classes": getattr(label, "names", None),
        "format": options.format,
        "dtype": options.dtype,
        "mixed_precision": mixed_precision,
        "shard_size": options.shard_size,
    }


def _write(
    shards: dict[Path, range],
    options: FeatureArguments,
    encoder: Encoder,
    images: ImageDataset,
    identity: dict[str, Any],
    accelerator: Accelerator,
):
    """Writes one process's shards, each while the next one is computed."""
    prefix = f"{Path(options.data).expanduser()}{os.sep}"  # names are relative to the data's folder
    bar = progress_bar(sum(map(len, shards.values())), accelerator.is_main_process)
    with bar, accelerator.autocast(), ThreadPoolExecutor(1) as writer:
        writing = None
        for path, indices in shards.items():
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
            names, bad = ([name.removeprefix(prefix) for name in part] for part in (features.names, features.bad))
            if writing is not None:
                writing.result()  # no more than one shard waits in memory
            writing = writer.submit(write_shard, path, replace(features, names=names, bad=bad), identity)
        if writing is not None:
            writing.result()


def _finish(folder: Path, identity: dict[str, Any], shards: list[Path], num_new: int, speed: float):
    """Counts what the shards hold, in _features.json and on the screen.

    Raises:
        ValueError: if that is nothing, since no image can be read.
    """
    read, bad = zip(*map(read_header, shards), strict=True)
    unreadable = [name for part in bad for name in part]
    write_json(folder / ABOUT, {**identity, "num_readable": sum(read), "unreadable": unreadable})
    for name in unreadable:
        print(f"left out, unreadable: {name}")
    if not sum(read):
        raise ValueError(
            f"--data: none of the {identity['num_images']} images can be read, the first is {unreadable[0]}"
        )
    kept = f", {len(shards) - num_new} of which were there" if num_new < len(shards) else ""
    rate = f", {speed:.0f} images/s" if num_new else ""
    print(f"Features of {sum(read)} images in {len(shards)} shards{kept}: {folder}{rate}")


def command() -> None:
    """The command `ldae-features`."""
    run_command(main)
