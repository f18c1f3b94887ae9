"""The order of images, which depends on (seed, step) alone, and the loaders that read them in batches."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from ldae.data.images import ImageDataset


class StepSampler(Sampler):
    """Yields the keys of one process's batches, from optimizer step `start` to `stop`.

    Every epoch is a permutation that is drawn from (seed, epoch). Epochs follow each other without a gap, and the
    processes share each global batch. The order of the images is therefore the same for any number of workers and
    processes, and a resumed run starts at its step without walking through the steps before it.

    Args:
        images: The images, whose seed is also the seed of the order.
        start: The first optimizer step.
        stop: The optimizer step before which the run ends.
        batch_size: The number of images in a batch of one process.
        accumulation: The number of batches in a step.
        rank: The number of this process.
        world: The number of processes.
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
        # a stream has no length: a resumed run reads past the examples that it has seen, without decoding them
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
    """Mixes several numbers into one seed in [0, 2^63). Zeros at the end of the numbers change nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def collate(items: list[dict[str, Any]], refill: bool = False) -> dict[str, Any]:
    """Makes a batch of an `ImageDataset`'s items.

    Unreadable images are left out. With `refill`, readable images of the same batch are repeated in their place.

    Returns:
        {"pixel_values": uint8 (B, C, H, W), or None if no image can be read, "label": int64 (B,), "name": list of B names,
        "index": int64 (B,), "bad": list of "name: error", one for each unreadable image}.

    Raises:
        ValueError: if `refill` is asked for and no image of the batch can be read.
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
    """Loads the batches of a run in the sampler's order, as `collate` makes them with `refill`."""
    return _loader(sampler.images, sampler, partial(collate, refill=True), num_workers)


def evaluation_loader(
    images: ImageDataset, batch_size: int, num_workers: int = 0, indices: Sequence[int] | None = None, view: int = 0
) -> DataLoader:
    """Loads every image once and in order. Unreadable images are left out.

    Args:
        indices: The images to load instead of all. For a stream this must be a range.
        view: A number that takes the place of the epoch where an image's crop and flip are drawn.
    """
    if images.streaming:
        return _loader(images, _Chunks(images.examples, batch_size, indices), collate, num_workers)
    indices = range(len(images)) if indices is None else indices
    batches = [[(view, int(i)) for i in indices[b : b + batch_size]] for b in range(0, len(indices), batch_size)]
    return _loader(images, batches, collate, num_workers)


class _Chunks:
    """Yields lists of `size` keys of a stream, or of a range of it."""

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
    """Scales uint8 images (B, C, H, W) to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
