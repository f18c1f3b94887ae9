"""A stream in lanes: shares of its shards, which processes divide among them and from which a resumed run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from ldae.seeds import mix_seed

if TYPE_CHECKING:
    import datasets

LANES = 8  # that a stream is read in, side by side, if the processes are not more
BLOCK = 1024  # images that so many lanes shuffle at a time


def first_places(num_shards: int, images_per_step: int, world: int) -> list[dict[str, Any]]:
    """Returns the places of a stream's lanes at its beginning.

    A step takes equally many images of each lane. If there are enough shards, each of the `world` processes has as many
    lanes.

    Returns:
        For each lane, in JSON's types: its number "lane", its "epoch", the number of its "block" in that epoch, datasets'
        "state" where the block begins, None at the epoch's beginning, and how many images of the block were "seen".
    """
    most = min(num_shards, max(LANES, world))
    possible = [lanes for lanes in range(1, most + 1) if images_per_step % lanes == 0]
    lanes = max([lanes for lanes in possible if lanes % world == 0] or possible, default=1)
    return [{"lane": lane, "epoch": 0, "block": 0, "state": None, "seen": 0} for lane in range(lanes)]


def read_lane(
    examples: datasets.IterableDataset, seed: int, lanes: int, place: dict[str, Any]
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Reads one of a stream's lanes from a place on, epoch after epoch, in an order that depends on the seed alone.

    In every epoch the shards are shuffled and dealt to the lanes. A lane reads its shards one after the other, and shuffles
    a block of their images at a time.

    Yields:
        The epoch, the example, and the place after it.

    Raises:
        ValueError: if the stream gives no images.
    """
    passed = place["seen"]
    for at, block in _ahead(_blocks(examples, seed, lanes, place)):
        shuffled = torch.Generator().manual_seed(mix_seed(seed, at["epoch"], at["lane"], at["block"]))
        order = torch.randperm(len(block), generator=shuffled).tolist()
        for seen in range(passed, len(block)):
            yield at["epoch"], block[order[seen]], {**at, "seen": seen + 1}
        passed = 0


def _blocks(
    examples: datasets.IterableDataset, seed: int, lanes: int, place: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yields the blocks of a lane and their places.

    datasets resumes a stream exactly, but for what its shuffle buffer held. A block is read again instead.
    """
    from datasets.distributed import split_dataset_by_node

    while True:
        share = (place["lane"] + place["epoch"]) % lanes  # the first shares may have a shard more
        reader = split_dataset_by_node(examples, share, lanes, strategy="shards")
        reader.set_epoch(mix_seed(seed, place["epoch"]))  # this shuffles the shards
        if place["state"] is not None:
            reader.load_state_dict(place["state"])
        images = iter(reader)
        while block := list(islice(images, BLOCK // min(lanes, LANES))):
            yield place, block
            place = {**place, "block": place["block"] + 1, "state": reader.state_dict()}
        if not place["block"] and next(iter(examples), None) is None:  # the share alone may hold no images
            raise ValueError("data: the stream gives no images")
        place = {**place, "epoch": place["epoch"] + 1, "block": 0, "state": None}


def _ahead(endless: Iterator) -> Iterator:
    """Yields what an endless iterator does. A thread waits for the next meanwhile, which may come from the network."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, endless)
        while True:
            item = following.result()
            following = thread.submit(next, endless)
            yield item
