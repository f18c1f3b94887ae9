"""The order of images depends on (seed, step) alone; loaders read them in any number of workers and processes."""

import gc
import itertools
import multiprocessing
import os
import pickle
import signal

import datasets
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_files import encoded, examples, noise, parquet, save
from PIL import Image
from torchvision.transforms import v2

from ldae.data.images import ImageDataset, to_pixel_values
from ldae.data.order import (
    DeviceLoader,
    Loader,
    StepSampler,
    fill_cache,
    training_loader,
)
from ldae.data.sources import load_examples
from ldae.seeds import mix_seed


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


def test_a_run_resumes_without_walking_through_its_past(monkeypatch):
    drawn, real = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: drawn.append(1) or real(*args, **kwargs))
    start = 10**12
    (batch,) = StepSampler(Numbers(50), start, start + 1, 10)
    epoch, offset = divmod(start * 10, 50)
    assert [key[0] for key in batch] == [epoch] * 10
    order = real(50, generator=torch.Generator().manual_seed(mix_seed(0, epoch))).tolist()
    assert [key[1] for key in batch] == order[offset : offset + 10]
    assert len(drawn) == 1


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_resumed_run_reads_no_image_of_its_past(tmp_path, monkeypatch, kind):
    for i in range(12):
        save(tmp_path / f"folder/{i:02d}.png")
    rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in (tmp_path / "folder").iterdir()]}
    parquet(tmp_path / "parquet", rows, image=datasets.Image())
    images = ImageDataset(load_examples(str(tmp_path / kind), "train"), (8, 8))
    read, real = [], datasets.Dataset.__getitem__

    def getitem(self, key):
        if "image" in self.column_names:
            read.extend(key)
        return real(self, key)

    monkeypatch.setattr(datasets.Dataset, "__getitem__", getitem)
    list(training_loader(StepSampler(images, 3, 6, 2)))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(mix_seed(0, 0))).tolist()
    assert read == order[6:]


@pytest.fixture
def damaged() -> datasets.Dataset:
    """Nine images of one size, two of which cannot be read."""
    broken = {"bytes": b"x", "path": "broken.png"}
    return examples(9).map(lambda row, i: {"image": broken if i in (2, 7) else row["image"]}, with_indices=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cache_is_filled_ahead(damaged, monkeypatch, num_workers):
    images = ImageDataset(damaged, (16, 16), crop="random_resized", flip=True)
    expected = ImageDataset(damaged, (16, 16), crop="random_resized", flip=True)[0, 3]
    unreadable = fill_cache(images, num_workers)
    assert list(unreadable) == [2, 7]
    assert set(unreadable.values()) == {"broken.png: UnidentifiedImageError: cannot identify image file"}
    monkeypatch.setattr("ldae.data.images.decode", lambda *args: pytest.fail("an image was decoded again"))
    assert torch.equal(images[0, 3]["pixel_values"], expected["pixel_values"])
    monkeypatch.undo()
    assert list(fill_cache(images)) == [2, 7]  # only these are tried again


@pytest.mark.parametrize("crop", ["center", "random", "random_resized"])
def test_batches_cut_on_a_device_are_those_of_the_loader(damaged, crop):
    def sampler() -> StepSampler:
        return StepSampler(ImageDataset(damaged, (16, 12), crop=crop, flip=True, seed=3), 1, 7, 4)

    on_device = sampler()
    loader = DeviceLoader(on_device, torch.device("cpu"), fill_cache(on_device.images))
    assert len(loader) == 6
    for ours, expected in zip(loader, training_loader(sampler()), strict=True):
        assert torch.equal(ours["pixel_values"], expected["pixel_values"])
        assert ours["pixel_values"].is_contiguous()
        assert torch.equal(ours["label"], expected["label"])
        assert torch.equal(ours["index"], expected["index"])
        assert (ours["name"], ours["bad"]) == (expected["name"], expected["bad"])


def test_a_batch_on_a_device_without_a_readable_image():
    data = datasets.Dataset.from_dict({"image": [{"bytes": b"x", "path": "broken.png"}] * 2})
    sampler = StepSampler(ImageDataset(data, (16, 16)), 0, 1, 2)
    with pytest.raises(ValueError, match=r"none of a batch's 2 images can be read, the first is broken.png"):
        list(DeviceLoader(sampler, torch.device("cpu"), fill_cache(sampler.images)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "DeviceLoader"),
        ({"device": "cpu"}, "Loader"),
        ({"num_channels": 4}, "Loader"),  # Pillow resizes transparent images by rules of its own
        ({"num_channels": 4, "crop": "random"}, "DeviceLoader"),
        ({"augment": True}, "Loader"),
        ({"free": 10_000}, "Loader"),
        ({"sizes": [(20, 30), (30, 20)]}, "Loader"),
    ],
)
def test_images_are_kept_on_a_gpu_where_they_fit(monkeypatch, change, expected):
    given = {"device": "cuda", "num_channels": 3, "crop": "random_resized", "augment": False, "free": 1 << 30} | change
    sizes = given.get("sizes", [(20, 30), (20, 30)])
    data = datasets.Dataset.from_dict({"image": [encoded(Image.fromarray(noise(*size)), "PNG") for size in sizes]})
    images = ImageDataset(data, (16, 16), given["num_channels"], given["crop"])
    images.augment = v2.Identity() if given["augment"] else None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (given["free"], 1 << 30))
    monkeypatch.setattr("ldae.data.order.BatchCutter", lambda crop, pixels: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args: self)
    loader = training_loader(StepSampler(images, 0, 1, 2), device=torch.device(given["device"]))
    assert type(loader).__name__ == expected


@pytest.mark.parametrize("crop", ["center", "random", "random_resized"])
def test_loader_can_be_sent_to_spawned_workers(crop):
    loader = training_loader(StepSampler(ImageDataset(examples(2), (8, 8), crop=crop), 0, 1, 2), 1)
    dataset, collate_fn = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    assert collate_fn(dataset.__getitems__([(0, 0)]))["pixel_values"].shape == (1, 3, 8, 8)


def test_pixel_values_span_minus_one_to_one():
    assert to_pixel_values(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


class Mortal(torch.utils.data.Dataset):
    """Gives each list of keys back; a worker ends in its own way over one that holds a 13."""

    def __init__(self, end):
        self.end = end

    def __getitems__(self, keys):
        if 13 in keys and torch.utils.data.get_worker_info() is not None:
            self.end()
        return keys


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def broken():
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("end", "place", "sentence"),
    [
        (killed, 0, "A process that reads images was ended by a signal: Killed."),
        (killed, 39, "A process that reads images was ended by a signal: Killed."),
        (lambda: os._exit(7), 12, "A process that reads images has ended with the status 7."),
        (broken, 12, "Processes that read images have failed: Caught RuntimeError in DataLoader worker process 0."),
    ],
)
def test_a_worker_that_fails_costs_no_batch(capfd, end, place, sentence):
    batches = [[i] for i in range(100, 140)]
    batches[place].append(13)
    loader = Loader(Mortal(end), (batch for batch in batches), num_workers=2)  # an order that can be drawn once
    assert list(loader) == batches
    assert loader.death == sentence
    assert f"{sentence} This process reads its images." in capfd.readouterr().err
    gc.collect()  # an error that a worker sends holds its readers in a circle
    for worker in multiprocessing.active_children():
        worker.join(timeout=10)
    assert not multiprocessing.active_children()  # the other worker has ended too


def test_what_is_not_the_workers_fault_is_raised():
    class Broken(Mortal):
        def __getitems__(self, keys):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match=r"^broken$"):
        list(Loader(Broken(None), [[1], [2]], num_workers=1))
