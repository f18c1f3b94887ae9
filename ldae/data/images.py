"""From a name to batches of pixel_values: sources, decoding, crops, and an order that depends on (seed, step) alone."""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ldae.data.photos import load_photos

# Files that Pillow reads by itself: not those it only writes (PDF), or hands to a plug-in or program (PostScript's).
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
EXTENSIONS = frozenset(
    extension
    for extension, name in Image.registered_extensions().items()
    if name in Image.OPEN and name not in _NOT_READ
)
VALIDATION_NAMES = ("validation", "val", "valid", "test")
CACHE_BYTES = 2 << 30  # centre crops of a data set up to this size are decoded once and kept in memory
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# ----------------------------------------------------------------------------------------------------------------- sources


def load_examples(
    data: str,
    split: str,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset | None:
    """Undecoded examples with the columns `image` ({"bytes", "path"}) and, where there are labels, `label`.

    Args:
        data: "photos" (embedded), a folder of images in any nesting, a folder of parquet files, or a Hub data set's name,
            NAME:CONFIGURATION where it has several.
        split: "train", or "validation", which also stands for a split or folder called val, valid or test; or any name
            the data set uses.
        streaming: reads a Hub data set or parquet files as they come instead of preparing them on disk.
        image_column, label_column: which columns to use; by default the first of type Image, and "label" or the first of
            type ClassLabel.

    Returns:
        The examples, or None where a validation split is asked for and there is none.

    Raises:
        FileNotFoundError: if there is no such data.
        ValueError: if the split, a column or the configuration is missing.
    """
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
        return _load_folder(folder, split)
    looks_local = folder.exists() or folder.is_absolute() or data.startswith((".", "~"))
    if not folder.is_dir() and (looks_local or "\\" in data or data.count("/") > 1):
        raise FileNotFoundError(f"data: there is no folder {data!r}")
    name, _, config = (str(folder), "", "") if folder.is_dir() else data.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None, streaming=streaming)
    except (FileNotFoundError, ConnectionError, HFValidationError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"data: {data!r} is neither 'photos', nor a local folder, nor a data set that the Hub gives ({error})"
        ) from error
    except ValueError as error:  # of a configuration that is missing, or not there
        how = "" if folder.is_dir() else f"; a configuration is given as {name}:CONFIGURATION"
        raise ValueError(f"data: {data!r} cannot be loaded{how} ({error})") from error
    names = VALIDATION_NAMES if split == "validation" else (split,)
    name = next((name for name in names if name in splits), None)
    if name is None:
        if split == "validation":
            return None
        raise ValueError(f"data {data!r} has the splits {', '.join(splits)}, got {split!r}")
    return _name_columns(splits, name, data, image_column, label_column)


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder. Symbolic links are followed, into no folder twice; hidden files and folders are left out."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def hub_id(data: str) -> str | None:
    """The name without its configuration, if `load_examples` takes it for a Hub data set's."""
    return None if data == "photos" or Path(data).expanduser().is_dir() else data.partition(":")[0]


def _load_folder(folder: Path, split: str) -> datasets.Dataset | None:
    """Images of a folder. Its classes are its sub-folders, if every image lies in one; otherwise there are no labels."""
    children = {child.name.lower(): child for child in folder.iterdir() if child.is_dir() and child.name[0] != "."}
    validation = next((children[name] for name in VALIDATION_NAMES if name in children), None)
    # "train" and "test" are splits only beside each other, or "train" alone: there are classes of these names
    has_splits = "train" in children and (validation is not None or len(children) == 1)
    if split == "validation":
        root = validation if has_splits else None
        if root is None:
            return None
    else:
        root = folder if split == "train" and not has_splits else children.get(split.lower())
        if root is None:
            raise ValueError(f"split: data {str(folder)!r} has no folder {split!r}")
    paths = sorted(path for path in _files(root) if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not paths:
        raise FileNotFoundError(f"data: there are no images in {str(root)!r}")
    columns: dict[str, list] = {"image": [{"bytes": None, "path": str(path)} for path in paths]}
    features = {"image": datasets.Image(decode=False)}
    parts = [path.relative_to(root).parts for path in paths]
    classes = {part[0] for part in parts}
    if root != folder and root != children["train"]:  # a class may be missing here: training decides on the numbers
        classes |= {child.name for child in children["train"].iterdir() if child.is_dir() and child.name[0] != "."}
    if all(len(part) > 1 for part in parts) and len(classes) > 1:
        names = sorted(classes)
        number = {name: i for i, name in enumerate(names)}
        columns["label"] = [number[part[0]] for part in parts]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _name_columns(splits, split: str, data: str, image_column: str | None, label_column: str | None):
    """One of `splits` with its columns of images and labels, called `image` and `label`."""
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
    examples = examples.rename_columns(
        {old: new for old, new in ((image, "image"), (label, "label")) if old not in (None, new)}
    )
    return examples.cast_column("image", datasets.Image(decode=False))


def count_classes(examples) -> int:
    """Number of classes of the examples' labels.

    Raises:
        ValueError: if there are none, or a stream's are numbers without names.
    """
    feature = (examples.features or {}).get("label")
    if feature is None:
        raise ValueError("class_conditional needs labels: give --label_column or a folder for each class")
    if isinstance(feature, datasets.ClassLabel):
        return feature.num_classes
    if isinstance(examples, datasets.IterableDataset):
        raise ValueError("class_conditional cannot count the classes of a stream: give --num_classes instead")
    return 1 + max(label for label in examples["label"] if label is not None)


def why_not_probed(train: datasets.Dataset, validation: datasets.Dataset | None) -> str | None:
    """What probes miss in a data set's splits, in words; None: they have classes, the same in both."""
    if validation is None:
        return "there is no validation split; name it with --validation_split"
    for split, examples in (("training", train), ("validation", validation)):
        if "label" not in examples.features:
            return f"the {split} split has no labels; give --label_column or a folder for each class"
        labels = np.asarray(examples["label"])
        if labels.dtype.kind not in "iub" or labels.min(initial=0) < 0:
            return f"the labels of the {split} split are not all class numbers; choose another --label_column"
    names = [getattr(examples.features["label"], "names", None) for examples in (train, validation)]
    if None not in names and names[0] != names[1]:
        return f"the splits have different classes; not in both: {', '.join(sorted(set(names[0]) ^ set(names[1])))}"
    return None


def _is_label(feature) -> bool:
    dtype = feature.dtype if isinstance(feature, (datasets.ClassLabel, datasets.Value)) else ""
    return dtype.startswith(("int", "uint", "bool")) or dtype in ("string", "large_string")


# ---------------------------------------------------------------------------------------------------------------- decoding


def decode(encoded: dict[str, Any], num_channels: int) -> Image.Image:
    """One image as it should look: upright by EXIF, first frame, 8 bits, transparency on white, in 1, 3 or 4 channels.

    Args:
        encoded: {"bytes": encoded file or None, "path": its name}.
    """
    with Image.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else encoded["path"]) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip it at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("images of floating-point numbers have no known range")
        if num_channels != 4 and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(PIL_MODES[num_channels])


class ImageDataset(Dataset):
    """Decoded crops: key (epoch, index) -> {"pixel_values": uint8 (C, H, W), "label": int, "name": str, "index": int}.

    What a key gives depends on (seed, epoch, index) alone, not on workers or processes. A key may carry its example as a
    third part (streaming). An image that cannot be read gives {"name", "error"} instead.

    Args:
        examples: what `load_examples` returns.
        image_hw: height and width in pixels.
        num_channels: 1, 3 or 4: grey, RGB or RGBA, whatever the files hold.
        crop: "center" (short side resized, centre cut out: the paper's default), "random" (short side resized to 8/7 of
            the size, a random window cut out) or "random_resized" (a random part of the area, resized).
        flip: whether half of the images are mirrored.
        seed: of crops and flips.
        min_area: smallest part of the area that "random_resized" takes; MAE pre-trains with 0.2 and probes with 0.08.

    Raises:
        ValueError: for another crop or number of channels, or without an image.
    """

    def __init__(
        self,
        examples: datasets.Dataset | datasets.IterableDataset,
        image_hw: tuple[int, int],
        num_channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        seed: int = 0,
        min_area: float = 0.2,
    ):
        if num_channels not in PIL_MODES:
            raise ValueError(f"num_channels must be one of {list(PIL_MODES)} to read image files, got {num_channels}")
        self.examples, self.num_channels, self.seed = examples, num_channels, seed
        self.streaming = isinstance(examples, datasets.IterableDataset)
        if not self.streaming and not len(examples):
            raise ValueError("data holds no images")
        self.transform = (tuple(image_hw), num_channels, crop, flip, seed, min_area)  # what caches tell apart
        self.prepare, augment = _transforms(image_hw, crop, min_area)
        self.augment = v2.Compose([augment or v2.Identity()] + [v2.RandomHorizontalFlip()] * flip)
        self.random = augment is not None or flip
        self.cache = self.cached = None
        num_bytes = 0 if self.streaming else len(examples) * num_channels * image_hw[0] * image_hw[1]
        if crop == "center" and not self.streaming and num_bytes <= CACHE_BYTES:
            try:
                self.cache = torch.empty(len(examples), num_channels, *image_hw, dtype=torch.uint8).share_memory_()
                self.cached = torch.zeros(len(examples), dtype=torch.bool).share_memory_()
            except RuntimeError:  # a container's /dev/shm may be small: decode every time instead
                self.cache = self.cached = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> np.ndarray | None:
        """The labels (n,), -1 where an image has none, or None without any."""
        if "label" not in (self.examples.features or {}):
            return None
        return np.array([-1 if label is None else label for label in self.examples["label"]])

    def fingerprint(self) -> str:
        """A digest of the number of images, the labels and the bytes of up to 64 of them: what a result was made from."""
        digest = hashlib.sha256()
        if self.streaming:
            sample = list(self.examples.take(64))
        else:
            sample = [self.examples[int(i)] for i in np.linspace(0, len(self) - 1, min(64, len(self)))]
            digest.update(f"{len(self)} {None if self.labels is None else self.labels.tolist()}".encode())
        for example in sample:
            image = example["image"] or {"bytes": b""}
            digest.update(image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, key: tuple) -> dict[str, Any]:
        epoch, index, *given = key
        example = given[0] if given else self.examples[index]
        image, label = example["image"] or {"bytes": b"", "path": None}, example.get("label")
        item = {"label": -1 if label is None else int(label), "name": image["path"] or f"image {index}"}
        try:
            pixel_values = self._prepared(image, index)
        except Exception as error:  # hostile files make decoders fail in every way
            return {"name": item["name"], "error": f"{type(error).__name__}: {error}"}
        if self.random:
            generator = torch.default_generator  # fork_rng and manual_seed visit all devices: 0.2 ms an image
            state = generator.get_state()
            generator.manual_seed(int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0]))
            try:
                pixel_values = self.augment(pixel_values)
            finally:
                generator.set_state(state)
        return {**item, "index": index, "pixel_values": pixel_values}

    def _prepared(self, image: dict[str, Any], index: int) -> torch.Tensor:
        if self.cache is not None and self.cached[index]:
            return self.cache[index]
        pixel_values = F.pil_to_tensor(self.prepare(decode(image, self.num_channels)))
        if self.cache is not None:
            self.cache[index] = pixel_values
            self.cached[index] = True
        return pixel_values


def _transforms(image_hw: tuple[int, int], crop: str, min_area: float):
    """What is done to the decoded image, and what is drawn anew every time."""

    def resize(factor: float):
        return partial(_resize_short_side, *(round(factor * side) for side in image_hw))

    if crop == "center":
        return v2.Compose([resize(1), v2.CenterCrop(image_hw)]), None
    if crop == "random":
        return resize(8 / 7), v2.RandomCrop(image_hw)
    if crop == "random_resized":
        return v2.Identity(), v2.RandomResizedCrop(image_hw, (min_area, 1), interpolation=v2.InterpolationMode.BICUBIC)
    raise ValueError(f"crop must be 'center', 'random' or 'random_resized', got {crop!r}")


def _resize_short_side(height: int, width: int, image: Image.Image) -> Image.Image:
    """The image at the smallest size, of the same shape, that covers height and width."""
    scale = max(height / image.height, width / image.width)
    size = [max(height, round(image.height * scale)), max(width, round(image.width * scale))]
    if size[0] * size[1] > Image.MAX_IMAGE_PIXELS:  # a strip of 1 by 100,000 pixels, say
        raise ValueError(f"an image of {image.width}x{image.height} is too long to resize")
    return F.resize(image, size, v2.InterpolationMode.BICUBIC)


# ------------------------------------------------------------------------------------------------------------------- order


class StepSampler(Sampler):
    """Keys of one process's batches from optimizer step `start` to `stop`, `accumulation` batches a step.

    Every epoch is a permutation drawn from (seed, epoch), epochs follow each other without a gap, and the processes share
    each global batch: so the order of images is the same for any number of workers and processes, and a resumed run
    starts at its step without skipping through anything.

    Args:
        start, stop: in optimizer steps.
        batch_size: of one process, in images.
        accumulation: batches that make a step.
        rank, world: this process, and how many there are.
    """

    def __init__(
        self,
        images: ImageDataset,
        start: int,
        stop: int,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        self.images, self.start, self.stop = images, start, stop
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple]]:
        keys = self._keys(self.start * self.accumulation * self.batch_size * self.world)
        for _ in range(len(self)):
            batch = [next(keys) for _ in range(self.batch_size * self.world)]
            yield batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def _keys(self, position: int) -> Iterator[tuple]:
        if self.images.streaming:
            yield from self._streamed_keys(position)
        n = len(self.images)
        epoch, offset = divmod(position, n)
        while True:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(mix_seed(self.images.seed, epoch)))
            for index in order[offset:].tolist():
                yield epoch, index
            epoch, offset = epoch + 1, 0

    def _streamed_keys(self, position: int) -> Iterator[tuple]:
        # a stream has no length: what a resumed run has seen is read past, undecoded
        shuffled, epoch, seen = self.images.examples.shuffle(seed=self.images.seed, buffer_size=1000), 0, 0
        while True:
            shuffled.set_epoch(epoch)
            before = seen
            for example in shuffled:
                if seen >= position:
                    yield epoch, seen, example
                seen += 1
            if seen == before:
                raise ValueError("data: the stream gives no images")
            epoch += 1


def mix_seed(*numbers: int) -> int:
    """One well-mixed seed from several numbers; zeros at the end change nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def collate(items: list[dict[str, Any]], refill: bool = False) -> dict[str, Any]:
    """Items -> {"pixel_values": uint8 (B, C, H, W), "label": (B,), "name": [str], "index": (B,), "bad": ["name: error"]}.

    Unreadable images are left out; with `refill`, readable ones of the same batch are repeated in their place.

    Raises:
        ValueError: in a `refill` without a single readable image.
    """
    bad = [f"{item['name']}: {item['error']}" for item in items if "error" in item]
    good = [item for item in items if "error" not in item]
    if refill:
        if not good:
            raise ValueError(f"none of a batch's {len(items)} images can be read, the first is {bad[0]}")
        good = [good[i % len(good)] for i in range(len(items))]
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in good]) if good else None,
        "label": torch.tensor([item["label"] for item in good], dtype=torch.long),
        "name": [item["name"] for item in good],
        "index": torch.tensor([item["index"] for item in good], dtype=torch.long),
        "bad": bad,
    }


def training_loader(sampler: StepSampler, num_workers: int = 0) -> DataLoader:
    """Batches of a run, in the sampler's order."""
    return _loader(sampler.images, sampler, partial(collate, refill=True), num_workers)


def evaluation_loader(
    images: ImageDataset, batch_size: int, num_workers: int = 0, indices: Sequence[int] | None = None, view: int = 0
) -> DataLoader:
    """Every image once (or those of `indices`, for a stream a range), in order, unreadable ones left out.

    Args:
        view: stands in for the epoch in what is drawn for an image's crop and flip.
    """
    if images.streaming:
        return _loader(images, _Chunks(images.examples, batch_size, indices), collate, num_workers)
    indices = range(len(images)) if indices is None else indices
    batches = [[(view, int(i)) for i in indices[b : b + batch_size]] for b in range(0, len(indices), batch_size)]
    return _loader(images, batches, collate, num_workers)


class _Chunks:
    """Lists of `size` keys of a stream, or of a range of it."""

    def __init__(self, examples: Iterable[dict[str, Any]], size: int, part: range | None = None):
        self.examples, self.size = examples, size
        self.part = (None,) if part is None else (part.start, part.stop, part.step)

    def __iter__(self) -> Iterator[list[tuple]]:
        keys = ((0, i, example) for i, example in islice(enumerate(self.examples), *self.part))
        while chunk := list(islice(keys, self.size)):
            yield chunk


def _loader(images: ImageDataset, batch_sampler, collate_fn, num_workers: int) -> DataLoader:
    return DataLoader(
        images,
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def to_pixel_values(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, C, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
