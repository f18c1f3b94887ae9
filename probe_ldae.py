"""Measures a frozen encoder on labelled pictures: `accelerate launch probe_ldae.py --model FOLDER --data DATA`.

k-NN and a linear probe on average-pooled features, each beside its floor: the same network with fresh weights. Any
vision encoder of transformers can stand in for an l-DAE. `--help` lists the options.
"""

import hashlib
import json
import sys
from dataclasses import MISSING, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, HfArgumentParser, PreTrainedModel

import ldae  # noqa: F401 - registers l-DAE with the Auto classes
from ldae.data import Pictures, load_examples
from ldae.evaluation import PROTOCOLS, Features, extract_features, format_probe, probe, untrained
from ldae.results import save_result, short_name


def _option(default: Any, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class ProbeArguments:
    model: str = _option(
        MISSING, "An l-DAE folder or Hub id, or any other vision encoder that transformers' AutoModel loads."
    )
    data: str = _option(
        "photos", "'photos' (embedded), a folder of pictures in classes, a folder of parquet files, or a Hub data set."
    )
    train_split: str = _option("train", "Split whose pictures and labels the probes learn from.")
    validation_split: str = _option("validation", "Split that is measured; val, valid and test are found too.")
    image_column: str | None = _option(None, "Column of the pictures; by default the first that holds pictures.")
    label_column: str | None = _option(
        None, "Column of the labels; by default 'label' or the first that holds classes."
    )
    protocols: list[str] = field(
        default_factory=lambda: list(PROTOCOLS), metadata={"help": f"What to measure: {', '.join(PROTOCOLS)}."}
    )
    k: int = _option(20, "Neighbours of k-NN.")
    seed: int = _option(0, "Seed of the untrained floor and of the pictures that the linear probe holds out.")
    batch_size: int = _option(256, "Pictures in a forward pass of one process.")
    num_workers: int = _option(0, "Processes that read pictures, for each process of accelerate.")
    output_dir: str | None = _option(
        None,
        "Where probe-DATA.json goes; by default results/ in the model's folder, or runs/probes/MODEL for a Hub id.",
    )
    overwrite: bool = _option(False, "Replace the result of an earlier probe.")
    features_cache: str = _option(
        "~/.cache/ldae/features",
        "Folder that keeps features (4 bytes x pictures x hidden_size), so that they are computed once; 'none': none.",
    )
    trust_remote_code: bool = _option(False, "Run the code that comes with the model. Only for a model that you trust.")
    device: Literal["auto", "cpu"] = _option("auto", "auto: what accelerate chooses.")


# ------------------------------------------------------------------------------------------------------- model and data


def load_encoder(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder or Hub id, complete.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if weights are missing, which transformers would replace by random ones.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"--model: there is no folder {name!r}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--model: folder {name!r} holds no model, that is no config.json")
    try:
        model, loaded = AutoModel.from_pretrained(
            str(folder) if folder.is_dir() else name, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except OSError as error:
        raise FileNotFoundError(f"--model: {name!r} is neither a model's folder nor on the Hub ({error})") from error
    # a pooler on the class token is often missing; it is not used here
    if missing := sorted(key for key in loaded["missing_keys"] if not key.startswith("pooler.")):
        raise ValueError(
            f"--model: {name!r} lacks {len(missing)} of the weights of {type(model).__name__}, such as {missing[0]}"
        )
    return model


def input_format(model: PreTrainedModel, name: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """What pictures the model takes: "image_hw", "num_channels", "mean" and "std" (None: pictures in [-1, 1])."""
    config = model.config
    if config.model_type == "ldae":
        return {"image_hw": config.image_hw, "num_channels": config.num_channels, "mean": None, "std": None}
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code).to_dict()
    except (OSError, ValueError):  # a model without one
        print(f"{name} has no image processor: pictures are given in [-1, 1]", file=sys.stderr)
        processor = {}
    size = processor.get("crop_size") or processor.get("size") or {}
    height = size.get("height") or size.get("shortest_edge") or 224
    image_hw = getattr(config, "image_size", None) or (height, size.get("width") or height)
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor and not processor.get("do_normalize", True):
        mean, std = [0.0], [1.0]
    return {
        "image_hw": (image_hw, image_hw) if isinstance(image_hw, int) else tuple(image_hw),
        "num_channels": getattr(config, "num_channels", 3),
        "mean": mean,
        "std": std,
    }


def labelled_splits(options: ProbeArguments) -> tuple[Any, Any]:
    """Training and validation examples with the same classes.

    Raises:
        ValueError: if a split or its labels are missing, or the classes of the splits differ.
    """
    columns = {"image_column": options.image_column, "label_column": options.label_column}
    train = load_examples(options.data, options.train_split, **columns)
    validation = load_examples(options.data, options.validation_split, **columns)
    if validation is None:
        raise ValueError(
            f"--data {options.data!r} has no validation split; a probe needs one (name it with --validation_split)"
        )
    for split, examples in ((options.train_split, train), (options.validation_split, validation)):
        if "label" not in examples.features:
            raise ValueError(
                f"--data {options.data!r}: split {split!r} has no labels; a probe needs them (a folder per class, or "
                "--label_column)"
            )
        labels = np.asarray(examples["label"])
        if labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(f"--label_column: the labels of split {split!r} of {options.data!r} are not class numbers")
    names = [getattr(examples.features["label"], "names", None) for examples in (train, validation)]
    if None not in names and names[0] != names[1]:
        only = sorted(set(names[0]) ^ set(names[1]))
        raise ValueError(f"--data {options.data!r}: the splits have different classes; not in both: {', '.join(only)}")
    return train, validation


def result_path(options: ProbeArguments) -> Path:
    """Where the result goes."""
    folder = Path(options.model).expanduser()
    default = folder / "results" if folder.is_dir() else Path("runs/probes") / short_name(options.model)
    folder = Path(options.output_dir).expanduser() if options.output_dir else default
    return folder / f"probe-{short_name(options.data)}.json"


# ------------------------------------------------------------------------------------------------------------- features


def weights_digest(model: PreTrainedModel) -> str:
    """A digest of what a model computes: its class, configuration and every weight and buffer."""
    incidental = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")
    config = {key: value for key, value in model.config.to_dict().items() if key not in incidental}
    digest = hashlib.sha256(f"{type(model).__name__} {json.dumps(config, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def shared_features(
    model: PreTrainedModel, pictures: Pictures, accelerator: Accelerator, batch_size: int = 256, **kwargs
) -> Features | None:
    """`extract_features`, where every process of accelerate takes a share of the batches; None in all but the main one.

    Batches are those of one process, so features are the same for any number of processes.
    """
    batches = [range(i, min(i + batch_size, len(pictures))) for i in range(0, len(pictures), batch_size)]
    per_process = -(-len(batches) // accelerator.num_processes)
    mine = batches[accelerator.process_index * per_process :][:per_process]
    indices = range(mine[0].start, mine[-1].stop) if mine else range(0)
    part = extract_features(
        model, pictures, batch_size, indices=indices, progress=accelerator.is_main_process, **kwargs
    )
    parts = gather_object([part])
    if not accelerator.is_main_process:
        return None
    read = [part for part in parts if len(part)] or [part]
    return Features(
        torch.cat([part.features for part in read]),
        torch.cat([part.labels for part in read]),
        [name for part in parts for name in part.bad],
    )


def cached_features(
    model: PreTrainedModel,
    pictures: Pictures,
    takes: dict[str, Any],
    folder: Path | None,
    accelerator: Accelerator,
    **kwargs,
) -> Features | None:
    """`shared_features`, read from `folder` where the same model has seen the same pictures in the same way before.

    Args:
        takes: what `input_format` says of the model.
        folder: of safetensors files; None: none.
    """
    path, found = None, [False]
    if folder is not None and accelerator.is_main_process:
        key = hashlib.sha256(f"{weights_digest(model)} {pictures.fingerprint()} {takes}".encode())
        path = folder / f"{key.hexdigest()[:32]}.safetensors"
        found = [path.exists()]
    if broadcast_object_list(found)[0]:
        return None if path is None else _read_features(path)
    features = shared_features(model, pictures, accelerator, mean=takes["mean"], std=takes["std"], **kwargs)
    if path is not None:
        _write_features(features, path)
    return features


def _read_features(path: Path) -> Features:
    with safe_open(path, "pt") as file:
        return Features(file.get_tensor("features"), file.get_tensor("labels"), json.loads(file.metadata()["bad"]))


def _write_features(features: Features, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    tensors = {"features": features.features.contiguous(), "labels": features.labels.contiguous()}
    save_file(tensors, temporary, {"bad": json.dumps(features.bad)})
    temporary.replace(path)


# ----------------------------------------------------------------------------------------------------------------- main


def parse_arguments(argv: list[str] | None = None) -> ProbeArguments:
    """Options of a command line.

    Raises:
        SystemExit: for an unknown option.
        ValueError: for a value that cannot be.
    """
    parser = HfArgumentParser(ProbeArguments, description=__doc__.split("\n")[0], allow_abbrev=False)
    (options,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if unknown := [name for name in options.protocols if name not in PROTOCOLS]:
        raise ValueError(f"--protocols: {unknown[0]!r} is none of {', '.join(PROTOCOLS)}")
    for name in ("k", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def main(argv: list[str] | None = None) -> Path:
    """Probes a model; returns the result's file."""
    options = parse_arguments(argv)
    path = result_path(options)
    if path.exists() and not options.overwrite:
        raise FileExistsError(f"{path} holds another probe's result; choose another --output_dir or pass --overwrite")
    accelerator = Accelerator(cpu=options.device == "cpu")
    with accelerator.main_process_first():  # one process downloads and prepares
        train, validation = labelled_splits(options)
        model = load_encoder(options.model, options.trust_remote_code)
        takes = input_format(model, options.model, options.trust_remote_code)
    splits = [Pictures(split, takes["image_hw"], takes["num_channels"]) for split in (train, validation)]
    model = model.to(accelerator.device).eval()
    extract = partial(
        cached_features,
        takes=takes,
        folder=None if options.features_cache == "none" else Path(options.features_cache).expanduser(),
        accelerator=accelerator,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    result = probe(
        model,
        untrained(model, options.seed),
        *splits,
        k=options.k,
        seed=options.seed,
        protocols=options.protocols,
        model_name=options.model,
        data_name=short_name(options.data),
        extract=extract,
    )
    if result is not None:
        save_result(path, result, options.overwrite)
        print(format_probe(result))
        for name in result["data"]["unreadable"]:
            print(f"left out, unreadable: {name}")
        print(f"Result: {path}")
    accelerator.end_training()
    return path


if __name__ == "__main__":
    main()
