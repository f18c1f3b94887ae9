"""Features in files: shards of parquet or safetensors, and _features.json, which says what they are."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ldae.features.extraction import Features
from ldae.files import atomic_write, damage, digests_of, read_json, remove, write_json

ABOUT = "_features.json"  # arrow and pandas, which read a whole folder, pass over names that begin with _ or .


def claim(folder: Path, identity: dict[str, Any], overwrite: bool):
    """Writes _features.json, or finds that the one that is there belongs to the same run.

    Args:
        identity: what _features.json says, and what must be the same for a run to go on.
        overwrite: deletes the shards of another run.

    Raises:
        FileExistsError: if the folder holds features of another run and `overwrite` is false.
        ValueError: if its _features.json is damaged, and `overwrite` is false.
    """
    shards, path = [*folder.glob("features-*-of-*.*")], folder / ABOUT
    if overwrite:
        for old in shards:
            remove(old)
            remove(digests_of(old))
    elif path.exists() or shards:
        there = read_json(path) if path.exists() else {}
        other = [key for key in identity if key not in ("model", "data") and there.get(key) != identity[key]]
        if other:
            raise FileExistsError(
                f"{folder} holds features of another run ({_difference(other[0], there, identity)}); choose another "
                "--output_dir or pass --overwrite"
            )
        return
    write_json(path, identity)


def _difference(key: str, there: dict[str, Any], here: dict[str, Any]) -> str:
    """How two runs differ, in words; a model and images by their names, unless these are the same."""
    name = {"digest": "model", "fingerprint": "data"}.get(key, key)
    if name in there and there[name] == here[name]:
        return f"{name} {here[name]} has changed since"
    return f"{name}: {there.get(name)} there, {here[name]} here"


def missing(shards: Iterable[Path]) -> list[Path]:
    """Those shards that are still to be written: they are not there, or were damaged since, which is said."""
    found = []
    for path in shards:
        reason = damage(path) if path.exists() else None
        if reason is not None:
            print(f"{path} is damaged ({reason}): it is written again.")
        if reason is not None or not path.exists():
            found.append(path)
    return found


def write_shard(path: Path, features: Features, identity: dict[str, Any]):
    """Writes the features, labels and names of some images as one file, whole or not at all."""
    unreadable = json.dumps(features.bad)
    with atomic_write(path, sealed=True) as temporary:
        if identity["format"] == "safetensors":
            metadata = {"names": json.dumps(features.names), "unreadable": unreadable}
            save_file(_tensors(features, identity), temporary, metadata)
            return
        table = to_table(features, identity)
        table = table.replace_schema_metadata({**table.schema.metadata, "unreadable": unreadable})
        # numbers of a network neither repeat nor compress
        with pq.ParquetWriter(temporary, table.schema, compression="none", use_dictionary=False) as writer:
            if len(table):  # `datasets` cannot read an empty row group
                writer.write_table(table, row_group_size=1000)


def to_table(features: Features, identity: dict[str, Any]) -> pa.Table:
    """The columns `name`, `label` where there are labels, `pooled` (E) and `patches` (N, E), or one of these.

    Their types, class names too, `datasets` reads from the schema.

    Args:
        identity: as `ldae.features.embedding.describe` makes it.
    """
    import datasets

    columns: dict[str, pa.Array] = {"name": pa.array(features.names, pa.string())}
    types: dict[str, Any] = {"name": datasets.Value("string")}
    for name, tensor in _tensors(features, identity).items():
        if name == "label":
            classes = identity["classes"]
            columns[name] = pa.array(tensor.numpy(), mask=(tensor < 0).numpy())
            types[name] = datasets.ClassLabel(names=classes) if classes else datasets.Value("int64")
            continue
        columns[name] = pa.array(tensor.reshape(-1).numpy())
        types[name] = datasets.Value(str(tensor.dtype).removeprefix("torch."))
        for size in reversed(tensor.shape[1:]):
            columns[name] = pa.FixedSizeListArray.from_arrays(columns[name], size)
            types[name] = datasets.List(types[name], length=size)
    return pa.table(columns, schema=datasets.Features(types).arrow_schema)


def _tensors(features: Features, identity: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The labels, where there are any, and the features, in the type that is asked for."""
    shapes = {"pooled": (identity["hidden_size"],), "patches": (identity["num_patches"], identity["hidden_size"])}
    dtype = getattr(torch, identity["dtype"])
    patches = cast(torch.Tensor, features.tokens)  # None only where there is none to write
    labels = {"label": features.labels} if identity["labels"] else {}
    return labels | {
        name: tensor.to(dtype).contiguous() if len(features) else torch.empty(0, *shapes[name], dtype=dtype)
        for name, tensor in (("pooled", features.features), ("patches", patches))
        if name in identity["features"]
    }


def read_header(path: Path) -> tuple[int, list[str]]:
    """The number of images in a shard, and the names of the images of its range that cannot be read."""
    if path.suffix == ".parquet":
        header = pq.read_metadata(path)
        return header.num_rows, json.loads(header.metadata[b"unreadable"])
    with safe_open(path, "pt") as file:
        return len(json.loads(file.metadata()["names"])), json.loads(file.metadata()["unreadable"])


def read_pooled(folder: Path) -> tuple[list[str], torch.Tensor]:
    """Reads the names and the pooled features, float32 (n, E), of all images that a folder's shards hold, in their order.

    Raises:
        ValueError: if a shard was damaged since it was written.
    """
    names: list[str] = []
    features: list[torch.Tensor] = []
    for path in sorted(folder.glob("features-*-of-*.parquet")) + sorted(folder.glob("features-*-of-*.safetensors")):
        if (reason := damage(path)) is not None:
            raise ValueError(f"{path} is damaged ({reason}); run ldae-features again, which writes it anew")
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names += json.loads(file.metadata()["names"])
                features.append(file.get_tensor("pooled").float())
            continue
        table = pq.read_table(path, columns=["name", "pooled"])
        names += table["name"].to_pylist()
        column = table["pooled"].combine_chunks()
        features.append(torch.tensor(column.flatten().to_numpy(), dtype=torch.float32).reshape(len(table), -1))
    return names, torch.cat([part for part in features if len(part)]) if names else torch.empty(0, 0)
