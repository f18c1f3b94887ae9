"""A stream gives every image once an epoch, the same images a step for any processes, and goes on where it stood."""

import json
from collections import Counter, defaultdict
from itertools import pairwise

import datasets
import pytest
import torch
from datasets.packaged_modules.parquet.parquet import Parquet
from image_files import encoded, noise, parquet
from PIL import Image

from ldae.data import streams
from ldae.data.images import ImageDataset
from ldae.data.order import StepSampler, evaluation_loader, training_loader
from ldae.data.sources import load_examples

READ: list[tuple[int, int]] = []  # what `numbered` has read since `opened`, as (shard, number in it)


def numbered(shards: list[tuple[int, int]]):
    for shard, size in shards:
        for i in range(size):
            READ.append((shard, i))
            yield {"image": {"bytes": None, "path": f"{shard}/{i}"}}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Sixteen images are shuffled at a time, so that a shard has several blocks."""
    monkeypatch.setattr(streams, "BLOCK", 16)


def opened(sizes: list[int], seed: int = 0) -> ImageDataset:
    """A stream with a shard of each size."""
    READ.clear()
    features = datasets.Features(image=datasets.Image(decode=False))
    shards = {"shards": list(enumerate(sizes))}
    return ImageDataset(
        datasets.IterableDataset.from_generator(numbered, features, gen_kwargs=shards), (8, 8), seed=seed
    )


def names(batches: list[list[tuple]]) -> list[str]:
    return [example["image"]["path"] for batch in batches for _, _, example in batch]


def steps(sizes: list[int], stop: int, images_per_step: int, world: int = 1, accumulation: int = 1) -> list[list[str]]:
    """The images of each step, those of the first process first."""
    size = images_per_step // world // accumulation
    ranks = [list(StepSampler(opened(sizes), 0, stop, size, accumulation, rank, world)) for rank in range(world)]
    return [
        [name for batches in ranks for name in names(batches[step * accumulation : (step + 1) * accumulation])]
        for step in range(stop)
    ]


@pytest.mark.parametrize(
    ("sizes", "lanes"), [([10] * 8, 8), ([10] * 9, 8), ([7, 23, 1, 9, 40] * 4, 8), ([30], 1), ([5, 0, 5, 5, 9], 4)]
)
def test_every_epoch_gives_every_image_once_in_an_order_of_its_own(sizes, lanes):
    stop = 6 * sum(sizes) // 8
    sampler, epochs, indices = StepSampler(opened(sizes), 0, stop, 8), defaultdict(list), []
    for batch in sampler:
        for epoch, index, example in batch:
            epochs[epoch].append(example["image"]["path"])
            indices.append(index)
    assert indices == list(range(stop * 8))
    assert len(sampler.passed[-1]) == lanes
    everything = {f"{shard}/{i}" for shard, size in enumerate(sizes) for i in range(size)}
    whole = range(min(place["epoch"] for place in sampler.passed[-1]))
    assert len(whole) >= 3  # lanes of unequal shards are not all in the same epoch
    for epoch in whole:
        assert Counter(epochs[epoch]) == Counter(everything)
    assert all(epochs[a] != epochs[b] for a, b in pairwise(whole))
    assert epochs[0] != names(list(StepSampler(opened(sizes, seed=1), 0, stop, 8)))[: len(epochs[0])]


def test_shards_and_the_images_of_a_block_are_shuffled():
    images = names(list(StepSampler(opened([16] * 6), 0, 192, 1)))  # one lane, each shard one block
    shards = [[name.split("/")[0] for name in epoch[::16]] for epoch in (images[:96], images[96:])]
    assert sorted(shards[0]) == sorted(shards[1]) == [*"012345"]
    assert shards[0] != sorted(shards[0]) != shards[1] != shards[0]
    assert images[:16] != [f"{shards[0][0]}/{i}" for i in range(16)]


def test_lanes_stay_together_where_shards_do_not_divide_into_them():
    sampler = StepSampler(opened([10] * 9), 0, 20 * 90 // 8, 8)
    list(sampler)
    epochs = [place["epoch"] for place in sampler.passed[-1]]
    assert max(epochs) - min(epochs) <= 1


@pytest.mark.parametrize("sizes", [[10] * 8, [7, 23, 2, 9, 40, 3] * 3, [7, 20], [30]])
def test_the_images_of_a_step_are_the_same_for_any_number_of_processes(sizes):
    whole = steps(sizes, 20, 16)
    for world in (2, 4, 8):
        assert steps(sizes, 20, 16, world) == whole
        assert steps(sizes, 20, 16, world, accumulation=2) == whole
    assert steps(sizes, 20, 16, accumulation=4) == whole


def test_processes_share_the_shards(capsys):
    read = []
    for rank in (0, 1):
        sampler = StepSampler(opened([16] * 8), 0, 8, 4, rank=rank, world=2)
        taken = names(list(sampler))
        assert len(sampler.passed[0]) == 4  # of eight lanes
        read.append({shard for shard, _ in READ[: len(taken)]})
    assert not read[0] & read[1]
    assert not capsys.readouterr().out
    list(StepSampler(opened([16]), 0, 1, 4, world=2))
    assert capsys.readouterr().out.startswith("The stream is read in 1 lanes, so that 2 processes read")


@pytest.mark.parametrize(
    ("shards", "images_per_step", "world", "lanes"),
    [
        (294, 4096, 1, 8),
        (294, 4096, 8, 8),
        (294, 4096, 64, 64),  # more processes have a lane each
        (294, 384, 3, 6),  # two for each process
        (1, 4096, 8, 1),
        (5, 4096, 2, 4),
        (5, 4096, 8, 4),
        (300, 7, 1, 7),
        (0, 8, 2, 1),
    ],
)
def test_lanes_divide_a_step_and_where_they_can_processes(shards, images_per_step, world, lanes):
    places = streams.first_places(shards, images_per_step, world)
    assert [place["lane"] for place in places] == list(range(lanes))


def test_a_run_goes_on_where_the_stream_stood(tmp_path):
    """From what was written as JSON, by as many processes or others, though loaders are ahead of the steps."""
    for i in range(3):
        rows = {"image": [encoded(Image.fromarray(noise(8, 8)), "PNG") for _ in range(11 + i)]}
        folder = parquet(tmp_path / "set", rows, f"train-{i}", batch_size=4, image=datasets.Image())

    def run(world=1, accumulation=1, num_workers=0, start=0, places=()) -> list[tuple[torch.Tensor, list[dict]]]:
        """The pixels of each step, and where the lanes stand after it."""
        ranks = []
        for rank in range(world):
            images = ImageDataset(load_examples(folder, "train", streaming=True), (8, 8), flip=True, seed=5)
            size = 8 // world // accumulation
            sampler = StepSampler(images, start, 16, size, accumulation, rank, world, places)
            loader = training_loader(sampler, num_workers)
            ranks.append([(batch["pixel_values"], sampler.passed.popleft()) for batch in loader])
        steps = []
        for step in range(0, (16 - start) * accumulation, accumulation):
            pixels = [pixels for rank in ranks for pixels, _ in rank[step : step + accumulation]]
            places = [place for rank in ranks for place in rank[step][1]]
            steps.append((torch.cat(pixels), json.loads(json.dumps(places))))
        return steps

    ways = [(1, 1, 0), (1, 2, 2), (2, 2, 0), (4, 1, 0)]
    whole = run()
    for i, way in enumerate(ways):
        steps = run(*way)
        for stop in (1, 4, 11):
            rest = run(*ways[i - stop % 2], stop, steps[stop - 1][1])
            assert [len(places) for _, places in rest] == [8] * (16 - stop)
            assert torch.equal(torch.cat([pixels for pixels, _ in rest]), torch.cat([p for p, _ in whole[stop:]]))


def test_a_resumed_stream_opens_no_shard_that_it_has_passed():
    sampler = StepSampler(opened([20] * 24), 0, 25, 8)  # three shards for each lane, which is in its second then
    past, places = names(list(sampler)), sampler.passed[-1]
    remaining = names(list(StepSampler(opened([20] * 24), 25, 60, 8, places=places)))
    assert not set(past) & set(remaining)
    assert set(past) | set(remaining) == {f"{shard}/{i}" for shard in range(24) for i in range(20)}
    passed = {shard for shard in range(24) if {f"{shard}/{i}" for i in range(20)} <= set(past)}
    assert len(passed) == 8
    assert not passed & {shard for shard, _ in READ[: len(remaining)]}


def test_few_files_are_read_by_their_groups_of_rows(tmp_path, monkeypatch):
    """So that lanes share a file, and a resumed run opens the groups in which it stands and at most those before them."""
    rows = {"image": [encoded(Image.fromarray(noise(8, 8)), "PNG") for _ in range(240)]}
    folder = parquet(tmp_path / "set", rows, batch_size=10, image=datasets.Image())
    groups, real = [], Parquet._generate_tables

    def generate_tables(self, files, row_groups_list):
        groups.append(row_groups_list)
        return real(self, files, row_groups_list)

    monkeypatch.setattr(Parquet, "_generate_tables", generate_tables)
    images = ImageDataset(load_examples(folder, "train", streaming=True), (8, 8))
    sampler = StepSampler(images, 0, 25, 8)
    list(sampler)
    assert sorted(groups) == [[(i,)] for i in range(24)]  # three for each of eight lanes, which are in the third
    passed = groups[:8]
    groups.clear()
    list(StepSampler(images, 25, 28, 8, places=sampler.passed[-1]))
    assert len(groups) <= 16
    assert not any(group in passed for group in groups)


def test_a_stream_is_evaluated_in_its_order_any_number_of_times(tmp_path):
    rows = {"image": [encoded(Image.new("RGB", (8, 8)), "PNG")] * 10, "label": list(range(10))}
    data = parquet(tmp_path / "set", rows, image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    loader = evaluation_loader(ImageDataset(load_examples(data, "train", streaming=True), (8, 8)), 4)
    for _ in range(2):
        assert torch.cat([batch["label"] for batch in loader]).tolist() == list(range(10))


def test_a_stream_without_images():
    with pytest.raises(ValueError, match="data: the stream gives no images"):
        list(StepSampler(opened([0]), 0, 1, 2))
