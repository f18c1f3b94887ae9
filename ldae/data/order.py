"""The order of images, which depends on (seed, step) alone, and the loaders that read them in batches."""

import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import joblib
import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset, Sampler

from ldae.data.crops import BatchCutter
from ldae.data.images import ImageDataset
from ldae.data.streams import LANES, first_places, read_lane
from ldae.progress import progress_bar
from ldae.seeds import mix_seed


class StepSampler(Sampler):
    """Yields the keys of one process's batches, from optimizer step `start` to `stop`.

    Every epoch is a permutation that is drawn from (seed, epoch). Epochs follow each other without a gap, and the
    processes share each global batch. The order of the images is therefore the same for any number of workers and
    processes, and a resumed run starts at its step without walking through the steps before it.

    A stream has no such permutation. It is read in lanes (see `ldae.data.streams`), of which each step takes equally many
    images. A process opens the lanes in which its part of a step lies, so that the images of a step are the same for any
    number of processes that leaves the number of lanes the same.

    Args:
        images: The images, whose seed is also the seed of the order.
        start: The first optimizer step.
        stop: The optimizer step before which the run ends.
        batch_size: The number of images in a batch of one process.
        accumulation: The number of batches in a step.
        rank: The number of this process.
        world: The number of processes.
        places: Where the lanes of a stream stand before the first step; empty: at its beginning.

    Attributes:
        passed: For each batch of a stream that was yielded, where the lanes that this process has opened stand after the
            batch's step. A loader runs ahead, so whoever takes a batch from it also takes the first of these.
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
        places: Sequence[dict[str, Any]] = (),
    ):
        self.images, self.start, self.stop = images, start, stop
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world
        self.places, self.passed = places, deque[list[dict[str, Any]]]()

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple]]:
        if self.images.streaming:
            yield from self._streamed()
            return
        keys = self._keys(self.start * self.accumulation * self.batch_size * self.world)
        for _ in range(len(self)):
            batch = [next(keys) for _ in range(self.batch_size * self.world)]
            yield batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def _keys(self, position: int) -> Iterator[tuple]:
        n = len(self.images)
        epoch, offset = divmod(position, n)
        while True:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(mix_seed(self.images.seed, epoch)))
            for index in order[offset:].tolist():
                yield epoch, index
            epoch, offset = epoch + 1, 0

    def _streamed(self) -> Iterator[list[tuple]]:
        examples = self.images.examples
        if examples.num_shards < LANES:
            examples = examples.reshard()
        size = self.batch_size * self.accumulation  # this process's images in a step
        self.places = places = self.places or first_places(examples.num_shards, size * self.world, self.world)
        lanes = len(places)
        if lanes % self.world and self.rank == 0:
            print(
                f"The stream is read in {lanes} lanes, so that {self.world} processes read parts of it more than once."
            )
        length = size * self.world // lanes  # a lane's images in a step
        opened = slice(self.rank * size // length, -(-(self.rank + 1) * size // length))
        readers = [read_lane(examples, self.images.seed, lanes, place) for place in places[opened]]
        others = self.rank * size - opened.start * length  # other processes' images at the beginning of the first lane
        for step in range(self.start, self.stop):
            images = [next(reader) for reader in readers for _ in range(length)]
            places = [place for _, _, place in images[length - 1 :: length]]
            first = step * size * self.world + self.rank * size
            keys = [(epoch, first + i, example) for i, (epoch, example, _) in enumerate(images[others : others + size])]
            for i in range(0, size, self.batch_size):
                self.passed.append(places)
                yield keys[i : i + self.batch_size]


def refill(batch: dict[str, Any]) -> dict[str, Any]:
    """Repeats readable images of a batch in the place of its unreadable ones, so that it has the size that was asked for.

    Raises:
        ValueError: if no image of the batch can be read.
    """
    if not batch["bad"]:
        return batch
    rows = _repeated(len(batch["index"]), batch["bad"])
    return {
        **batch,
        **{name: batch[name][rows] for name in ("pixel_values", "label", "index")},
        "name": [batch["name"][row] for row in rows],
    }


def _repeated(readable: int, bad: list[str]) -> torch.Tensor:
    """Rows (B,) of a batch's readable images, as often as it takes to stand for the bad ones too."""
    if not readable:
        raise ValueError(f"none of a batch's {len(bad)} images can be read, the first is {bad[0]}")
    return torch.arange(readable + len(bad)) % readable


class Loader:
    """Batches in their order, which worker processes read ahead. Where a worker dies, this process reads the others by itself.

    It can so take part in what other processes of a training wait for. It says on stderr of what the worker died.

    Args:
        dataset: Gives a batch for a list of keys.
        batches: The keys of each batch.
        collate_fn: Is given what the data set gives.
        num_workers: The number of worker processes; 0: this process reads.

    Attributes:
        death: What a worker has died of, a sentence; None: none has died.
    """

    def __init__(
        self, dataset: Dataset, batches: Iterable[list], collate_fn: Callable | None = None, num_workers: int = 0
    ):
        self.dataset, self.batches, self.collate_fn = dataset, batches, collate_fn or _as_it_is
        self.num_workers = num_workers
        self.death: str | None = None

    def __len__(self) -> int:
        return len(cast(Sequence, self.batches))

    def __iter__(self) -> Iterator[Any]:
        if not self.num_workers:
            yield from self._read(self.batches)
            return
        self.death = None
        keys, ahead = iter(self.batches), deque[list]()  # what workers were asked for and have not given yet

        def asked() -> Iterator[list]:
            for batch in keys:
                ahead.append(batch)
                yield batch

        for batch in self._by_workers(asked()):
            ahead.popleft()
            yield batch
        if self.death is not None:
            print(
                f"\n{self.death} This process reads its images. Fewer --num_workers need less memory.", file=sys.stderr
            )
            yield from self._read(chain(ahead, keys))

    def _by_workers(self, batches: Iterable[list]) -> Iterator[Any]:
        """The batches that workers read, up to the first that is lost."""
        workers: list[BaseProcess] = []
        try:
            read = iter(self._read(batches, self.num_workers))
            workers = cast(Any, read)._workers  # `active_children` forgets one that died at once
            _leave_deaths_to_loaders()
            yield from read
        except (RuntimeError, OSError, EOFError) as error:  # what is not a worker's own fault will be raised again
            self.death = _death(workers, error)

    def _read(self, batches: Iterable[list], num_workers: int = 0) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=cast(Any, batches),
            collate_fn=self.collate_fn,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_finish_the_batch,
        )


def _leave_deaths_to_loaders():
    """Takes away torch's handler, which would raise a worker's death anywhere, in the middle of a step too.

    Whoever waits for a batch of a dead worker notices within seconds.
    """
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    is_torchs = getattr(handler, "__module__", "").startswith("torch.")
    if is_torchs and threading.current_thread() is threading.main_thread():  # Python allows it there only
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _death(workers: Sequence[BaseProcess], error: Exception) -> str:
    """A sentence on what ended the workers: their own end, or the error that came of it."""
    if isinstance(error, OSError | EOFError):  # a worker's connections break just before it has ended
        broken = wait([worker.sentinel for worker in workers], timeout=10)
        for worker in workers:
            if worker.sentinel in broken:
                worker.join(timeout=10)
    for worker in workers:
        if (code := worker.exitcode or 0) < 0:
            return f"A process that reads images was ended by a signal: {signal.strsignal(-code)}."
        if code:
            return f"A process that reads images has ended with the status {code}."
    return f"Processes that read images have failed: {str(error).partition(chr(10))[0].rstrip('.')}."


def training_loader(
    sampler: StepSampler, num_workers: int = 0, device: torch.device | None = None
) -> "Loader | DeviceLoader":
    """Loads the batches of a run in the sampler's order, as `ImageDataset` makes them, with `refill`.

    Args:
        num_workers: The number of processes that decode, crop and flip; 0 means this process.
        device: If this is a GPU and the images fit there, they are first decoded, on all cores if `num_workers` is 0, and
            a `DeviceLoader` then cuts the batches on the GPU. The images are the same, bit for bit.
    """
    images = sampler.images
    if device is not None and device.type == "cuda" and _fits(images, device):
        unreadable = fill_cache(images, num_workers or joblib.cpu_count() // PartialState().num_processes)
        if int(images.cached.sum()) + len(unreadable) == len(images):
            return DeviceLoader(sampler, device, unreadable)
    return Loader(images, sampler, refill, num_workers)


def _fits(images: ImageDataset, device: torch.device) -> bool:
    """Whether a `DeviceLoader` can give these images, with a quarter of the device's free memory at most."""
    if images.cache is None or images.augment is not None:
        return False
    transparent = images.num_channels == 4 and images.crop.kind == "random_resized"
    return not transparent and images.cache.numel() <= torch.cuda.mem_get_info(device)[0] // 4


def fill_cache(images: ImageDataset, num_workers: int = 0) -> dict[int, str]:
    """Decodes all images that are not in the cache yet and shows a progress bar.

    Args:
        images: Images that have a cache.
        num_workers: The number of processes that decode; 0 means this process.

    Returns:
        The "name: error" of each image that cannot be read, by its index.
    """
    missing = torch.nonzero(~images.cached).flatten().tolist()
    chunks = [missing[i : i + 256] for i in range(0, len(missing), 256)]
    num_workers = min(num_workers, len(chunks))
    loader = Loader(_Filler(images), chunks, num_workers=num_workers)
    unreadable: dict[int, str] = {}
    shown = bool(missing) and PartialState().is_main_process
    with progress_bar(shown=shown, total=len(missing), desc="decoding", unit=" images") as bar:
        for chunk, bad in zip(chunks, loader, strict=True):
            unreadable |= bad
            bar.update(len(chunk))
    return unreadable


class _Filler(Dataset):
    """Decodes the images of a list of indices; see `ImageDataset.fill`."""

    def __init__(self, images: ImageDataset):
        self.images = images

    def __getitems__(self, indices: list[int]) -> dict[int, str]:
        return self.images.fill(indices)


class DeviceLoader:
    """Batches that are cut on a device from a copy of the images there: the batches of a `Loader`, bit for bit.

    Args:
        sampler: The order. Its images' cache holds all images that can be read.
        unreadable: The "name: error" of the others, by their index.
    """

    death = None  # it has no workers

    def __init__(self, sampler: StepSampler, device: torch.device, unreadable: dict[int, str]):
        self.sampler, self.unreadable = sampler, unreadable
        cache = cast(torch.Tensor, sampler.images.cache)  # there are images on the device only if they are cached
        self.cutter = BatchCutter(sampler.images.crop, cache.to(device))

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for keys in self.sampler:
            yield self._batch(keys)

    def _batch(self, keys: list[tuple]) -> dict[str, Any]:
        images = self.sampler.images
        good = [key for key in keys if key[1] not in self.unreadable]
        bad = [self.unreadable[index] for _, index in keys if index in self.unreadable]
        epochs, indices = np.array([good[row] for row in _repeated(len(good), bad)], np.int64).T
        uniforms, flips = images.crop.draw(epochs, indices)
        boxes = images.crop.boxes(uniforms, *self.cutter.images.shape[1:3])
        names, labels = images.names_and_labels(indices)
        return {
            "pixel_values": self.cutter(indices, boxes, flips),
            "label": torch.from_numpy(labels),
            "name": names,
            "index": torch.from_numpy(indices),
            "bad": bad,
        }


def evaluation_loader(
    images: ImageDataset, batch_size: int, num_workers: int = 0, indices: Sequence[int] | None = None, view: int = 0
) -> Loader:
    """Loads every image once and in order. Unreadable images are left out.

    Args:
        indices: The images to load instead of all. For a stream this must be a range.
        view: A number that takes the place of the epoch where an image's crop and flip are drawn.
    """
    if images.streaming:
        part = cast(range | None, indices)
        return Loader(images, _Chunks(images.examples, batch_size, part), num_workers=num_workers)
    indices = range(len(images)) if indices is None else indices
    batches = [[(view, int(i)) for i in indices[b : b + batch_size]] for b in range(0, len(indices), batch_size)]
    return Loader(images, batches, num_workers=num_workers)


class _Chunks:
    """Yields lists of `size` keys of a stream, or of a range of it."""

    def __init__(self, examples: Iterable[dict[str, Any]], size: int, part: range | None = None):
        self.examples, self.size = examples, size
        self.part = (None,) if part is None else (part.start, part.stop, part.step)

    def __iter__(self) -> Iterator[list[tuple]]:
        keys = ((0, i, example) for i, example in islice(enumerate(self.examples), *self.part))
        while chunk := list(islice(keys, self.size)):
            yield chunk


def _as_it_is(batch: dict) -> dict:
    return batch


def _finish_the_batch(worker: int):
    """Leaves Ctrl-C, which a terminal sends to workers too, to the process that waits for their batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
