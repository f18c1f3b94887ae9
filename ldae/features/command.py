"""Writes the features of images to parquet or safetensors files.

`ldae-features --model FOLDER --data DATA --output_dir OUT`, or `accelerate launch -m ldae.features …` for several
processes. `--help` lists the options.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ldae import launch
from ldae.data.images import ImageDataset
from ldae.data.sources import validate_output
from ldae.features.embedding import EmbedArguments, describe, embedded, load
from ldae.features.encoders import Encoder
from ldae.features.extraction import features_bar
from ldae.features.shards import ABOUT, claim, missing, read_header, write_shard
from ldae.files import validate_writable, write_json
from ldae.mistakes import run_command
from ldae.options import option, option_parser


@dataclass(kw_only=True)
class FeatureArguments(EmbedArguments):
    output_dir: str = option(
        MISSING, "Folder of the shards and _features.json. A run that was stopped goes on where it was."
    )
    overwrite: bool = option(False, "Replace the features of another run in output_dir.")
    format: Literal["parquet", "safetensors"] = option("parquet", "Format of the shards.")
    shard_size: int = option(
        1_000, "Images a shard is made from; a process holds the features of two in memory.", minimum=1
    )

    @property
    def folder(self) -> Path:
        """The folder of the shards."""
        return Path(self.output_dir).expanduser()


def parse_arguments(argv: list[str] | None = None) -> FeatureArguments:
    """Reads the options of a command line.

    Raises:
        SystemExit: for an unknown option or value, named on stderr.
        ValueError: for an output_dir inside the data's folder, or one that cannot be written to.
    """
    parser = option_parser(FeatureArguments, description="Writes the features of images to files.")
    (options,) = parser.parse_args_into_dataclasses(argv)
    validate_output(options.folder, options.data)
    validate_writable(options.folder)
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
    encoder, images = load(options, accelerator)
    identity = {
        **describe(options, encoder, images, accelerator.mixed_precision),
        "format": options.format,
        "shard_size": options.shard_size,
    }
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


def _write(
    shards: dict[Path, range],
    options: FeatureArguments,
    encoder: Encoder,
    images: ImageDataset,
    identity: dict[str, Any],
    accelerator: Accelerator,
):
    """Writes one process's shards, each while the next one is computed."""
    bar = features_bar(sum(map(len, shards.values())), accelerator.is_main_process)
    with bar, accelerator.autocast(), ThreadPoolExecutor(1) as writer:
        writing = None
        for path, indices in shards.items():
            features = embedded(options, encoder, images, indices, bar)
            if writing is not None:
                writing.result()  # no more than one shard waits in memory
            writing = writer.submit(write_shard, path, features, identity)
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
    files = f"{len(shards)} file{'s' * (len(shards) != 1)}"
    kept = f", {len(shards) - num_new} of which were there" if num_new < len(shards) else ""
    rate = f", {speed:.0f} images/s" if num_new else ""
    print(f"Features of {sum(read)} images in {files}{kept}: {folder}{rate}")


def command() -> None:
    """The command `ldae-features`."""
    run_command(main)
