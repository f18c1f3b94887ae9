"""Where images come from: the embedded set, a folder, parquet files or the Hub, as undecoded examples with labels."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from PIL import Image

from image_processing_ldae import FORMATS
from ldae.data.photos import load_photos
from ldae.mistakes import reading
from ldae.names import is_path
from ldae.retries import retried

if TYPE_CHECKING:
    import datasets  # takes a second to import, so that functions import it when they need it

EXTENSIONS = frozenset(extension for extension, name in Image.registered_extensions().items() if name in FORMATS)
HEIC = {".heic", ".heif"}  # read where pillow-heif is installed
UNREAD = (HEIC | {".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}) - EXTENSIONS
MOST_CLASSES = 1_000_000  # larger numbers are no classes, but identifiers
logger = logging.getLogger(__name__)
VALIDATION_NAMES = ("validation", "val", "valid", "test")


class MissingSplitError(ValueError):
    """A data set has no split of that name."""


def load_examples(
    data: str,
    split: str,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_split: str = "validation",
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads undecoded examples.

    They have the column `image` ({"bytes", "path"}) and, if the data set has labels, the column `label`. Where a data set, and
    not this function, says what the paths are, the `id` of the feature `image` holds the folders that they may lead to.

    Args:
        data: "photos" (the embedded set), a folder of images in any nesting, a folder of parquet files, or the name of a
            Hub data set, written NAME:CONFIGURATION if it has several configurations.
        split: "train", "validation", or any other name that the data set uses. "validation" also finds a split or folder
            that is called val, valid or test.
        streaming: Whether a Hub data set or parquet files are read as they come instead of being prepared on disk.
        image_column: The column of the images; by default the first of type Image.
        label_column: The column of the labels; by default "label", or else the first of type ClassLabel.
        validation_split: The name of the validation split. A folder of that name beside "train" holds no training images.

    Raises:
        FileNotFoundError: if there is no such data.
        MissingSplitError: if there is no such split.
        ValueError: if a column or the configuration is missing, or files of the split name different classes.
    """
    import datasets

    if data == "photos":
        if Path(data).is_dir():
            raise ValueError("data: 'photos' is the name of the embedded images; './photos' is the folder that is here")
        return load_photos(split)
    if not data:
        raise ValueError("data is empty; a folder of images in the working directory is '.'")
    folder = Path(os.path.expanduser(data))
    if folder.is_dir() and not any(path.suffix == ".parquet" for path in _files(folder)):
        if streaming:
            raise ValueError(
                "streaming reads Hub data sets and parquet files; a folder of images needs none, leave it out"
            )
        return _load_folder(folder, split, validation_split)
    if not folder.is_dir() and (folder.exists() or is_path(data)):
        raise FileNotFoundError(f"data: there is no folder {data!r}")
    splits = _load_splits(data, folder, streaming)
    names = VALIDATION_NAMES if split == "validation" else (split,)
    found = next((name for name in names if name in splits), None)
    if found is None:
        raise MissingSplitError(f"split: data {data!r} has the splits {', '.join(splits)}, got {split!r}")
    # where the files of a Hub data set are
    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    within = os.pathsep.join(map(str, [folder] if folder.is_dir() else caches))
    examples = _name_columns(splits, found, data, image_column, label_column, within)
    return _with_own_names(examples, folder, found) if folder.is_dir() else examples


def load_train(options: Any, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """Loads the training examples of a command, as `load_examples` does.

    Args:
        options: has `data`, `train_split`, `validation_split` and `columns`, as those of training and probes have.
    """
    return load_examples(
        options.data, options.train_split, streaming, **options.columns, validation_split=options.validation_split
    )


def load_validation(
    data: str, split: str = "validation", image_column: str | None = None, label_column: str | None = None
) -> datasets.Dataset | None:
    """Loads the examples of a validation split, as `load_examples` does; None if "validation" is asked for and there is none.

    Raises:
        FileNotFoundError, ValueError: as `load_examples` does, for any other `split` that is missing, too.
    """
    try:
        return load_examples(data, split, False, image_column, label_column, validation_split=split)
    except MissingSplitError:
        if split != "validation":
            raise
        return None


def _load_splits(data: str, folder: Path, streaming: bool) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """All splits of a folder of parquet files or of a Hub data set, NAME or NAME:CONFIGURATION."""
    import datasets

    name, _, config = (str(folder), "", "") if folder.is_dir() else data.partition(":")
    with reading("data", data):
        try:
            return retried(lambda: datasets.load_dataset(name, config or None, streaming=streaming))
        except (
            FileNotFoundError,
            ConnectionError,
            HFValidationError,
            datasets.exceptions.DatasetNotFoundError,
        ) as error:
            raise FileNotFoundError(
                f"data: {data!r} is neither 'photos', nor a local folder, nor a data set that the Hub gives ({error})"
            ) from error
        except ValueError as error:  # no configuration is given, or an unknown one
            how = "" if folder.is_dir() else f"; a configuration is given as {name}:CONFIGURATION"
            raise ValueError(f"data: {data!r} cannot be loaded{how} ({error})") from error


def _files(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder.

    Symbolic links are followed, but no folder is entered twice. Hidden files and folders are left out.
    """
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def _as_text(path: Path) -> str:
    """The path, or its file URL if its bytes are no UTF-8, which texts of arrow must be."""
    try:
        return str(path).encode().decode()
    except UnicodeEncodeError:
        return path.absolute().as_uri()


def validate_output(output_dir: str | Path, data: str):
    """Validates that what a command writes is not taken for its data.

    Raises:
        ValueError: if output_dir lies in the folder of the data.
    """
    folder = Path(data).expanduser()
    if folder.is_dir() and Path(output_dir).expanduser().resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"--output_dir {str(output_dir)!r} lies in the folder of --data, whose files it would be taken for; choose another"
        )


def hub_id(data: str) -> str | None:
    """Returns the name without its configuration if `load_examples` takes it for a Hub data set's, or else None."""
    return None if data == "photos" or Path(data).expanduser().is_dir() else data.partition(":")[0]


def _load_folder(folder: Path, split: str, validation_split: str) -> datasets.Dataset:
    """Lists the images of a folder. Its sub-folders are the classes if every image lies in one of them.

    If an image lies outside of them, or there is only one, the examples have no labels.
    """
    import datasets

    root = _root_of_split(folder, split, validation_split)
    files = [path for path in _files(root) if path.is_file()]
    paths = sorted(path for path in files if path.suffix.lower() in EXTENSIONS)
    unread = Counter(path.suffix.lower() for path in files if path.suffix.lower() in UNREAD)
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in unread.most_common())
    remedy = f"convert them to JPEG{', or pip install pillow-heif' if unread.keys() & HEIC else ''}"
    if not paths:
        beside = f", but {kinds} files, which are not read; {remedy}" if unread else ""
        raise FileNotFoundError(f"data: there are no images in {str(root)!r}{beside}")
    if unread:
        logger.warning(f"Left out of {str(root)!r}, since such files are not read: {kinds}; {remedy}.")
    columns: dict[str, list] = {"image": [{"bytes": None, "path": _as_text(path)} for path in paths]}
    features = {"image": datasets.Image(decode=False)}
    parts = [path.relative_to(root).parts for path in paths]
    classes = {part[0] for part in parts}
    train = _children(folder).get("train")
    if train is not None and root not in (folder, train):
        # a class may be missing here: training decides on the numbers
        classes |= {child.name for child in train.iterdir() if child.is_dir() and child.name[0] != "."}
    if all(len(part) > 1 for part in parts) and len(classes) > 1:
        number = {name: i for i, name in enumerate(sorted(classes))}
        names = [name.encode(errors="backslashreplace").decode() for name in number]
        columns["label"] = [number[part[0]] for part in parts]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _root_of_split(folder: Path, split: str, validation_split: str) -> Path:
    """The folder of the images of a split. A warning says what lies beside the splits.

    Raises:
        MissingSplitError: if there is none.
    """
    children = _children(folder)
    names = VALIDATION_NAMES if validation_split == "validation" else (validation_split.lower(),)
    validation = next((children[name] for name in names if name in children), None)
    beside = [file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in EXTENSIONS]
    # "train" and "test" are splits only beside each other, or "train" alone: there are classes of these names
    has_splits = "train" in children and (validation is not None or (len(children) == 1 and not beside))
    if split == validation_split:
        root = validation if has_splits else None
    else:
        root = folder if split == "train" and not has_splits else children.get(split.lower())
    if root is None:
        shown = "val" if validation_split == "validation" else validation_split
        what = (
            f"validation split, which is a folder {shown} beside train"
            if split == validation_split
            else f"folder {split!r}"
        )
        raise MissingSplitError(f"split: data {str(folder)!r} has no {what}")
    others = sorted(name for name in children if name not in ("train", *VALIDATION_NAMES, *names))
    if split == "train" and has_splits and (beside or others):
        left = [f"{len(beside):,} images"] * bool(beside) + [f"the folder {name!r}" for name in others[:5]]
        logger.warning(f"Left out of {str(folder)!r}, since they lie beside train: {', '.join(left)}.")
    return root


def _children(folder: Path) -> dict[str, Path]:
    """The folders in a folder, by their names in lower case."""
    return {child.name.lower(): child for child in folder.iterdir() if child.is_dir() and child.name[0] != "."}


def _name_columns(
    splits: datasets.DatasetDict | datasets.IterableDatasetDict,
    split: str,
    data: str,
    image_column: str | None,
    label_column: str | None,
    within: str,
) -> datasets.Dataset | datasets.IterableDataset:
    """Selects one of `splits`, calls its columns `image` and `label`, and notes the folders that paths may lead to."""
    import datasets

    examples = splits[split]
    features = examples.features or {}
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in features:
            raise ValueError(f"{option}: data {data!r} has the columns {', '.join(features)}, got {column!r}")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = image_column or next(iter(images), None)
    if image is None:
        raise ValueError(
            f"data {data!r} has no column of images among {', '.join(features)}; name it with image_column"
        )
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = ["label"] * ("label" in features and _is_label(features["label"])) + labels
    label = label_column or next(iter(labels), None)
    if label_column and not _is_label(features[label_column]):
        raise ValueError(f"label_column: {label_column!r} must hold one class of each image, got {features[label]}")
    examples = examples.select_columns([image] + ([label] if label else []))
    if label and getattr(features[label], "dtype", None) in ("string", "large_string"):
        if isinstance(examples, datasets.IterableDataset):
            raise ValueError(f"label_column: {label!r} holds text, which streaming cannot number; leave streaming out")
        names = sorted({name for part in splits.values() for name in part.unique(label) if name is not None})
        examples = examples.cast_column(label, datasets.ClassLabel(names=names))
    # undecoded first: renaming would decode the images of a stream, and encode them anew
    examples = examples.cast_column(image, datasets.Image(decode=False, id=within))
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old not in (None, new)}
    return examples.rename_columns(renamed) if renamed else examples


def _with_own_names(
    examples: datasets.Dataset | datasets.IterableDataset, folder: Path, split: str
) -> datasets.Dataset | datasets.IterableDataset:
    """Gives the labels of a split of parquet files the class names that its own files say: datasets takes the first split's.

    Raises:
        ValueError: if the files of the split name different classes.
    """
    import datasets
    import pyarrow.parquet as pq

    if not isinstance((examples.features or {}).get("label"), datasets.ClassLabel):
        return examples
    named: dict[tuple[str, ...], str] = {}
    for file in datasets.load_dataset_builder(str(folder)).config.data_files[split]:
        features = datasets.Features.from_arrow_schema(pq.read_schema(file)).values()
        names = [tuple(feature.names) for feature in features if isinstance(feature, datasets.ClassLabel)]
        if len(names) == 1:
            named.setdefault(names[0], file)
    if len(named) > 1:
        first, second = list(named.values())[:2]
        raise ValueError(
            f"data: {first!r} and {second!r} name different classes; give them the same, or keep them apart"
        )
    own = list(next(iter(named), examples.features["label"].names))
    return (
        examples
        if own == examples.features["label"].names
        else examples.cast_column("label", datasets.ClassLabel(names=own))
    )


def count_classes(examples: datasets.Dataset | datasets.IterableDataset) -> int:
    """Counts the classes of the examples' labels.

    Raises:
        ValueError: if there are no labels, if one is no class number, or if the labels of a stream are numbers without names.
    """
    import datasets

    feature = (examples.features or {}).get("label")
    if feature is None:
        raise ValueError("class_conditional needs labels: give --label_column or a folder for each class")
    if not isinstance(examples, datasets.IterableDataset) and (fault := label_fault(examples)) is not None:
        raise ValueError(f"class_conditional: {fault}")
    if isinstance(feature, datasets.ClassLabel):
        return feature.num_classes
    if isinstance(examples, datasets.IterableDataset):
        raise ValueError("class_conditional cannot count the classes of a stream: give --num_classes instead")
    return 1 + int(_label_column(examples).max())


def label_array(examples: datasets.Dataset) -> np.ndarray | None:
    """Returns the labels, int64 (n,), -1 for an image without one, or None if there is no column of labels."""
    return _label_column(examples) if "label" in (examples.features or {}) else None


def _label_column(examples: datasets.Dataset) -> np.ndarray:
    column = examples.select_columns("label").with_format("arrow")[:]["label"]
    try:
        return column.cast("int64").fill_null(-1).to_numpy()
    except ValueError as error:  # of arrow, with the number
        raise ValueError(f"label_column: no class has such a number: {error}") from error


def label_fault(examples: datasets.Dataset, num_classes: int | None = None) -> str | None:
    """Says in words which label is beyond the classes; None if there is none.

    Args:
        num_classes: the number of the classes; by default that of their names, or `MOST_CLASSES` if they have none.
    """
    labels, names = label_array(examples), getattr((examples.features or {}).get("label"), "names", None)
    if labels is None or not len(labels):
        return None
    index = int(labels.argmax())
    limit = num_classes or (MOST_CLASSES if names is None else len(names))
    if labels[index] < limit:
        return None
    return f"the label of image {index} is {labels[index]:,}, and there are {'at most ' * (names is None)}{limit:,} classes"


def why_not_probed(train: datasets.Dataset, validation: datasets.Dataset | None) -> str | None:
    """Says in words why the splits of a data set cannot be probed.

    Probes need a training and a validation split with labels of the same classes. The answer is None if they have them.
    """
    if validation is None:
        return (
            "it has no validation split. A folder has one as val/CLASS/IMAGE beside train/CLASS/IMAGE; "
            "--validation_split names that of a data set"
        )
    for split, examples in (("training", train), ("validation", validation)):
        labels = label_array(examples)
        if labels is None:
            return f"the {split} split has no labels; give --label_column, or a folder for each class and no images beside them"
        if labels.min(initial=0) < 0:
            return f"the labels of the {split} split are not all class numbers; choose another --label_column"
        if (fault := label_fault(examples)) is not None:
            return f"of the {split} split, {fault}; choose another --label_column"
    ours, theirs = (getattr(examples.features["label"], "names", None) for examples in (train, validation))
    if ours is not None and theirs is not None and ours != theirs:
        return f"the splits have different classes; not in both: {', '.join(sorted(set(ours) ^ set(theirs)))}"
    return None


def _is_label(feature: Any) -> bool:
    """Whether a column of such a feature of datasets can hold one class of each image."""
    import datasets

    dtype = feature.dtype if isinstance(feature, (datasets.ClassLabel, datasets.Value)) else ""
    return dtype.startswith(("int", "uint", "bool")) or dtype in ("string", "large_string")
