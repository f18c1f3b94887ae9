"""Batches that are cut on a GPU."""

import pytest
import torch

from ldae.data.images import ImageDataset
from ldae.data.order import DeviceLoader, StepSampler, fill_cache, training_loader
from ldae.data.sources import load_examples


@pytest.mark.usefixtures("few_photos")
@pytest.mark.parametrize("crop", ["center", "random", "random_resized"])
def test_batches_cut_on_the_device_are_those_of_the_processor(device, crop):
    def sampler() -> StepSampler:
        images = ImageDataset(load_examples("photos", "train"), (32, 32), crop=crop, flip=True)
        return StepSampler(images, 0, 3, batch_size=16)

    there = sampler()
    found = DeviceLoader(there, device, fill_cache(there.images))
    for batch, expected in zip(found, training_loader(sampler()), strict=True):
        assert batch["pixel_values"].device.type == device.type
        assert torch.equal(batch["pixel_values"].cpu(), expected["pixel_values"])
        assert torch.equal(batch["index"], expected["index"])
