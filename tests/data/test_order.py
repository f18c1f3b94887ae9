"""The order of images depends on (seed, step) alone; loaders read them in any number of workers and processes."""

import itertools
import pickle

import datasets
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_files import encoded, examples, parquet
from PIL import Image

from ldae.data.images import ImageDataset
from ldae.data.order import StepSampler, evaluation_loader, to_pixel_values, training_loader
from ldae.data.sources import load_examples


class Numbers:
    """As much of `Images` as a sampler looks at."""

    streaming = False

    def __init__(self, n: int, seed: int = 0):
        self.n, self.seed = n, seed

    def __len__(self) -> int:
        return self.n


@example(n=7, share=1, accumulation=2, start=3)
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 40), share=st.integers(1, 5), accumulation=st.integers(1, 3), start=st.integers(0, 8))
def test_order_is_the_same_for_any_number_of_processes_and_after_a_resume(n, share, accumulation, start):
    def keys(world, start, batch_size, accumulation):
        ranks = [StepSampler(Numbers(n), start, 9, batch_size, accumulation, r, world) for r in range(world)]
        assert all(len(list(rank)) == len(rank) for rank in ranks)
        return [key for batches in zip(*ranks, strict=True) for batch in batches for key in batch]

    whole = keys(1, 0, 6 * share * accumulation, 1)
    for world in (1, 2, 3):
        batch_size = 6 * share // world
        assert keys(world, 0, batch_size, accumulation) == whole
        assert keys(world, start, batch_size, accumulation) == whole[start * 6 * share * accumulation :]
    for epoch, group in itertools.groupby(whole, key=lambda key: key[0]):
        indices = [index for _, index in group]
        assert len(set(indices)) == len(indices)
        assert set(indices) <= set(range(n))
        assert len(indices) == n or epoch == whole[-1][0]  # only the last epoch may be cut


def test_epochs_and_seeds_have_their_own_orders():
    def order(seed):
        return [index for batch in StepSampler(Numbers(50, seed), 0, 4, 25) for _, index in batch]

    assert order(0)[:50] != order(0)[50:]
    assert order(0) != order(1)
    assert order(0)[:50] != list(range(50))


@pytest.mark.parametrize("crop", ["center", "random", "random_resized"])
def test_workers_and_batches_do_not_change_images(crop):
    data = examples(7)

    def batches(num_workers, **sampling):
        images = ImageDataset(data, (16, 16), crop=crop, flip=True, seed=3)
        return list(training_loader(StepSampler(images, **sampling), num_workers))

    alone, shared = batches(0, start=0, stop=6, batch_size=4), batches(2, start=0, stop=6, batch_size=4)
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"])
    (second,) = batches(0, start=1, stop=2, batch_size=2, rank=1, world=2)
    assert torch.equal(second["pixel_values"], alone[1]["pixel_values"][2:])


@pytest.mark.parametrize("crop", ["center", "random", "random_resized"])
def test_loader_can_be_sent_to_spawned_workers(crop):
    loader = training_loader(StepSampler(ImageDataset(examples(2), (8, 8), crop=crop), 0, 1, 2), 1)
    dataset, collate_fn = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    assert collate_fn(dataset.__getitems__([(0, 0)]))["pixel_values"].shape == (1, 3, 8, 8)


def test_a_stream_resumes_and_is_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # else five seconds an epoch
    colours = [(i, 0, 0) for i in range(10)]
    rows = {"image": [encoded(Image.new("RGB", (8, 8), colour), "PNG") for colour in colours], "label": list(range(10))}
    data = parquet(tmp_path / "set", rows, image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))

    def batches(**sampling):
        images = ImageDataset(load_examples(data, "train", streaming=True), (8, 8), flip=True, seed=5)
        return list(training_loader(StepSampler(images, **sampling)))

    def labels(batches):
        return torch.cat([batch["label"] for batch in batches]).tolist()

    whole = batches(start=0, stop=6, batch_size=4)
    assert sorted(labels(whole)[:10]) == sorted(labels(whole)[10:20]) == list(range(10))
    stream = load_examples(data, "train", streaming=True).shuffle(seed=5, buffer_size=1000)
    assert labels(whole)[:10] == [example["label"] for example in stream]
    assert labels(whole)[:10] != labels(whole)[10:20]  # epochs differ
    assert [round(float(x[0, 0, 0])) for batch in whole for x in batch["pixel_values"]] == labels(whole)
    assert labels(batches(start=2, stop=6, batch_size=4)) == labels(whole)[8:]
    halves = [batches(start=0, stop=6, batch_size=2, rank=rank, world=2) for rank in (0, 1)]
    assert [x for pair in zip(*halves, strict=True) for x in labels(pair)] == labels(whole)

    loader = evaluation_loader(ImageDataset(load_examples(data, "train", streaming=True), (8, 8)), 4)
    for _ in range(2):  # a loader can be read again
        assert labels(loader) == list(range(10))


def test_pixel_values_span_minus_one_to_one():
    assert to_pixel_values(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
