"""Features of an encoder over a data set: one pass, in order, shared by the processes, kept in a cache or in files.

`python -m ldae.features.extraction --model FOLDER --data DATA --output_dir OUT`, or `accelerate launch -m …`, writes
them to parquet or safetensors files. `--help` lists the options.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ldae.data.images import ImageDataset
from ldae.data.order import evaluation_loader, to_pixel_values
from ldae.data.sources import load_examples
from ldae.features.encoders import Encoder, evaluating, load_encoder
from ldae.options import option, option_parser


@dataclass
class Features:
    """What a pass over n readable images gives, on the CPU, in order.

    features: float32 (n, E), the mean of the patch tokens, or (n, …) as `represent` gives them. labels: int64 (n,), -1:
    none. indices: int64 (n,), which images these are. tokens: (n, N, E), where asked for. names: of the images. bad:
    names of those that cannot be read, with the reason.
    """

    features: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    names: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)


def extract_features(
    encoder: Encoder,
    images: ImageDataset,
    batch_size: int = 256,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
    tokens: bool = False,
    view: int = 0,
    progress: bool = True,
    tokens_dtype: torch.dtype = torch.float16,
    represent: Callable[[torch.Tensor], torch.Tensor] | None = None,
    on_bad_image: Literal["skip", "error"] = "skip",
    bar: tqdm | None = None,
) -> Features:
    """Features of all images, or those of `indices`, in order.

    Args:
        tokens: also keep every patch's feature.
        view: which of the random crops is taken of each image, where `images` are cropped at random.
        represent: pixel values (B, C, H, W) in [-1, 1] -> features (B, …), instead of the mean of the encoder's tokens.
        bar: a progress bar that counts these images among others, instead of one of their own.

    Returns:
        The features of the readable images, which may be none: (0, 0).

    Raises:
        ValueError: for the first unreadable image, with on_bad_image="error".
    """
    features, labels, positions, patches, names, bad = [], [], [], [], [], []
    loader = evaluation_loader(images, batch_size, num_workers, indices, view)
    if bar is None:
        total = None if images.streaming else len(images) if indices is None else len(indices)
        shown = progress_bar(total, progress)
    else:
        shown = nullcontext(bar)
    with evaluating(encoder), shown as counter:
        for batch in loader:
            counter.update(len(batch["name"]) + len(batch["bad"]))
            bad += batch["bad"]
            if bad and on_bad_image == "error":
                raise ValueError(f"unreadable image (--on_bad_image error): {bad[0]}")
            if batch["pixel_values"] is None:
                continue
            with torch.inference_mode():
                pixel_values = to_pixel_values(batch["pixel_values"].to(encoder.device, non_blocking=True))
                if represent is None:
                    hidden = encoder(pixel_values)
                    features.append(hidden.float().mean(dim=1).cpu())
                    if tokens:
                        patches.append(hidden.to(tokens_dtype).cpu())
                else:
                    features.append(represent(pixel_values).float().cpu())
            labels.append(batch["label"])
            positions.append(batch["index"])
            names += batch["name"]
    if not features:
        return Features(torch.empty(0, 0), torch.empty(0, dtype=torch.long), bad=bad)
    return Features(
        torch.cat(features),
        torch.cat(labels),
        torch.cat(positions),
        torch.cat(patches) if tokens else None,
        names,
        bad,
    )


def progress_bar(total: int | None, shown: bool = True) -> tqdm:
    """A bar that counts images, on a terminal only."""
    return tqdm(desc="features", total=total, unit=" images", disable=None if shown else True, leave=False)


def shared_features(
    encoder: Encoder, images: ImageDataset, accelerator: Accelerator | None = None, batch_size: int = 256, **kwargs
) -> Features | None:
    """`extract_features`, where every process of accelerate takes a share of the batches; None in all but the main one.

    Batches are those of one process, so features are the same for any number of processes.

    Args:
        accelerator: None: this process alone.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return extract_features(encoder, images, batch_size, **kwargs)
    batches = [range(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size)]
    per_process = -(-len(batches) // accelerator.num_processes)
    mine = batches[accelerator.process_index * per_process :][:per_process]
    indices = range(mine[0].start, mine[-1].stop) if mine else range(0)
    part = extract_features(
        encoder, images, batch_size, indices=indices, progress=accelerator.is_main_process, **kwargs
    )
    parts = gather_object([part])
    if not accelerator.is_main_process:
        return None
    read = [part for part in parts if len(part)] or parts[:1]
    return Features(
        torch.cat([part.features for part in read]),
        torch.cat([part.labels for part in read]),
        torch.cat([part.indices for part in read]),
        None if read[0].tokens is None else torch.cat([part.tokens for part in read]),
        names=[name for part in parts for name in part.names],
        bad=[name for part in parts for name in part.bad],
    )


def cached_features(
    encoder: Encoder,
    images: ImageDataset,
    accelerator: Accelerator | None = None,
    folder: Path | None = None,
    view: int = 0,
    **kwargs,
) -> Features | None:
    """`shared_features`, read from `folder` where the same encoder has seen the same images in the same way before.

    Args:
        folder: of safetensors files, pooled features only (tokens are never kept on disk); None: none.
    """
    path, found = None, [False]
    alone = accelerator is None
    if folder is not None and not kwargs.get("tokens") and (alone or accelerator.is_main_process):
        key = hashlib.sha256(f"{encoder.digest()} {images.fingerprint()} {images.transform} {view}".encode())
        path = folder / f"{key.hexdigest()[:32]}.safetensors"
        found = [path.exists()]
    if (found if alone else broadcast_object_list(found))[0]:
        return None if path is None else _read(path)
    features = shared_features(encoder, images, accelerator, view=view, **kwargs)
    if path is not None:
        _write(features, path)
    return features


def _read(path: Path) -> Features:
    with safe_open(path, "pt") as file:
        texts = {name: json.loads(file.metadata()[name]) for name in ("names", "bad")}
        return Features(*(file.get_tensor(name) for name in ("features", "labels", "indices")), **texts)


def _write(features: Features, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    tensors = {name: getattr(features, name).contiguous() for name in ("features", "labels", "indices")}
    save_file(tensors, temporary, {name: json.dumps(getattr(features, name)) for name in ("names", "bad")})
    temporary.replace(path)


# -------------------------------------------------------------------------------------------------------------- in files


@dataclass
class FeatureArguments:
    model: str = option(MISSING, "An l-DAE folder or Hub id, or any other vision encoder that AutoModel loads.")
    data: str = option(
        MISSING,
        "A folder of images with or without labels, a folder of parquet files, or a Hub data set (NAME:CONFIGURATION "
        "where it has several); or 'photos'.",
    )
    output_dir: str = option(
        MISSING, "Folder of the shards and features.json. A run that was stopped goes on where it was."
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
    shard_size: int = option(10_000, "Images a shard is made from; a process holds the features of two in memory.")
    batch_size: int = option(256, "Images in a forward pass of one process.")
    num_workers: int = option(0, "Processes that read images, for each process of accelerate.")
    on_bad_image: Literal["skip", "error"] = option("skip", "Unreadable images are named and skipped, or stop the run.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None, "As accelerate's; by default what accelerate's configuration says."
    )
    trust_remote_code: bool = option(False, "Run the code that comes with the model. Only for a model that you trust.")


def parse_arguments(argv: list[str] | None = None) -> FeatureArguments:
    """Options of a command line.

    Raises:
        SystemExit: for an unknown option or value, named on stderr.
        ValueError: for a number that cannot be, or an output_dir inside the data's folder.
    """
    parser = option_parser(FeatureArguments, description="Writes the features of images to files.")
    (options,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for name, least in (("shard_size", 1), ("batch_size", 1), ("num_workers", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    folder, output = Path(options.data).expanduser(), Path(options.output_dir).expanduser()
    if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"--output_dir {str(output)!r} lies in the folder of --data, whose files it would be taken for"
        )
    return options


def main(argv: list[str] | None = None) -> None:
    """Writes `features-00000-of-00012.parquet` and so on, and `features.json`, which says what they are.

    A shard depends on its images alone, and is there whole or not at all; so a run can be stopped, and go on with any
    number of processes.

    Raises:
        FileExistsError: if output_dir holds features of another model, other images or other options.
        FileNotFoundError, ValueError: as `load_encoder` and `load_examples` do.
    """
    options, start = parse_arguments(argv), time.perf_counter()
    # a process that has written its last shard waits for the others, which may take longer than half an hour
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(mixed_precision=options.mixed_precision, kwargs_handlers=[patience])
    with accelerator.main_process_first():  # one process downloads and prepares
        examples = load_examples(
            options.data, options.split, image_column=options.image_column, label_column=options.label_column
        )
        encoder = load_encoder(options.model, options.trust_remote_code).to(accelerator.device)
    if examples is None:
        raise ValueError(f"--split: data {options.data!r} has no validation split")
    images = ImageDataset(examples, encoder.image_hw, encoder.num_channels)
    identity = _identity(options, encoder, images, accelerator.mixed_precision)

    shards = [range(i, min(i + options.shard_size, len(images))) for i in range(0, len(images), options.shard_size)]
    folder = Path(options.output_dir).expanduser()
    paths = [folder / f"features-{i:05d}-of-{len(shards):05d}.{options.format}" for i in range(len(shards))]
    missing = [[]]
    if accelerator.is_main_process:
        _claim(folder, identity, options.overwrite)
        missing = [[i for i, path in enumerate(paths) if not path.exists()]]
    missing = broadcast_object_list(missing)[0]
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    prefix = f"{Path(options.data).expanduser()}{os.sep}"  # names are relative to the data's folder

    bar = progress_bar(sum(len(shards[i]) for i in mine), accelerator.is_main_process)
    with bar, accelerator.autocast(), ThreadPoolExecutor(1) as writer:
        writing = None
        for i in mine:
            features = extract_features(
                encoder,
                images,
                options.batch_size,
                options.num_workers,
                shards[i],
                tokens=options.features != "pooled",
                tokens_dtype=getattr(torch, options.dtype),
                on_bad_image=options.on_bad_image,
                bar=bar,
            )
            names, bad = ([name.removeprefix(prefix) for name in part] for part in (features.names, features.bad))
            if writing is not None:
                writing.result()  # no more than one shard waits in memory
            writing = writer.submit(_write_shard, paths[i], replace(features, names=names, bad=bad), identity)
        if writing is not None:
            writing.result()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        read, bad = zip(*map(_read_header, paths), strict=True)
        unreadable = [name for part in bad for name in part]
        _write_json(folder / "features.json", {**identity, "num_readable": sum(read), "unreadable": unreadable})
        for name in unreadable:
            print(f"left out, unreadable: {name}")
        done, seconds = sum(len(shards[i]) for i in missing), time.perf_counter() - start
        kept = f", {len(shards) - len(missing)} of which were there" if len(missing) < len(shards) else ""
        speed = f", {done / seconds:.0f} images/s" if done else ""
        print(f"Features of {sum(read)} images in {len(shards)} shards{kept}: {folder}{speed}")
    accelerator.end_training()


def _identity(
    options: FeatureArguments, encoder: Encoder, images: ImageDataset, mixed_precision: str
) -> dict[str, Any]:
    """What features.json says from the start, and what must be the same for a run to go on."""
    with torch.inference_mode(), evaluating(encoder):
        image = torch.zeros(1, encoder.num_channels, *encoder.image_hw, device=encoder.device)
        num_patches, hidden_size = encoder(image).shape[1:]
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


def _claim(folder: Path, identity: dict[str, Any], overwrite: bool):
    """Makes features.json, or finds that the one that is there is of the same run."""
    shards, path = [*folder.glob("features-*-of-*.*")], folder / "features.json"
    if overwrite:
        for old in shards:
            old.unlink()
    elif path.exists() or shards:
        there = json.loads(path.read_text()) if path.exists() else {}
        other = [key for key in identity if key not in ("model", "data") and there.get(key) != identity[key]]
        if other:
            raise FileExistsError(
                f"{folder} holds features of another run ({other[0]}: {there.get(other[0])} there, {identity[other[0]]} "
                "here); choose another --output_dir or pass --overwrite"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(path, identity)


def _write_json(path: Path, content: dict[str, Any]):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def _write_shard(path: Path, features: Features, identity: dict[str, Any]):
    """One file, which comes into being whole."""
    shapes = {"pooled": (identity["hidden_size"],), "patches": (identity["num_patches"], identity["hidden_size"])}
    dtype = getattr(torch, identity["dtype"])
    tensors = {
        name: tensor.to(dtype).contiguous() if len(features) else torch.empty(0, *shapes[name], dtype=dtype)
        for name, tensor in (("pooled", features.features), ("patches", features.tokens))
        if name in identity["features"]
    }
    labels = {"label": features.labels} if identity["labels"] else {}
    unreadable = json.dumps(features.bad)
    temporary = path.with_suffix(".tmp")
    if identity["format"] == "safetensors":
        save_file({**tensors, **labels}, temporary, {"names": json.dumps(features.names), "unreadable": unreadable})
    else:
        table = _table(features.names, {**labels, **tensors}, identity["classes"])
        table = table.replace_schema_metadata({**table.schema.metadata, "unreadable": unreadable})
        # numbers of a network neither repeat nor compress
        with pq.ParquetWriter(temporary, table.schema, compression="none", use_dictionary=False) as writer:
            if len(table):  # `datasets` cannot read an empty row group
                writer.write_table(table, row_group_size=1000)
    temporary.replace(path)


def _table(names: list[str], tensors: dict[str, torch.Tensor], classes: list[str] | None) -> pa.Table:
    """The columns `name` and those of tensors (n, …), whose types, class names too, `datasets` reads from the schema."""
    columns: dict[str, pa.Array] = {"name": pa.array(names, pa.string())}
    types: dict[str, Any] = {"name": datasets.Value("string")}
    for name, tensor in tensors.items():
        if name == "label":
            columns[name] = pa.array(tensor.numpy(), mask=(tensor < 0).numpy())
            types[name] = datasets.ClassLabel(names=classes) if classes else datasets.Value("int64")
            continue
        columns[name] = pa.array(tensor.reshape(-1).numpy())
        types[name] = datasets.Value(str(tensor.dtype).removeprefix("torch."))
        for size in reversed(tensor.shape[1:]):
            columns[name] = pa.FixedSizeListArray.from_arrays(columns[name], size)
            types[name] = datasets.List(types[name], length=size)
    return pa.table(columns, schema=datasets.Features(types).arrow_schema)


def _read_header(path: Path) -> tuple[int, list[str]]:
    """The number of images in a shard, and the names of the unreadable ones."""
    if path.suffix == ".parquet":
        header = pq.read_metadata(path)
        return header.num_rows, json.loads(header.metadata[b"unreadable"])
    with safe_open(path, "pt") as file:
        return len(json.loads(file.metadata()["names"])), json.loads(file.metadata()["unreadable"])


if __name__ == "__main__":
    main()
