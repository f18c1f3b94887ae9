"""Images a second that the loader gives one training process: decoding, then cached images with each crop.

    python -m benchmarks.loader --data FOLDER --output benchmarks/results/loader.json
    python -m benchmarks.loader --table benchmarks/results/loader.json    # puts the table into README.md

With --device cuda, the batches of a cached set are cut on the GPU, as in training there.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks import command
from benchmarks.device import in_rounds
from ldae.data.crops import KINDS
from ldae.data.images import ImageDataset
from ldae.data.order import DeviceLoader, StepSampler, fill_cache, training_loader
from ldae.data.sources import load_examples
from ldae.options import option
from ldae.report.tables import markdown

FIRST = "first pass: decoding, center crop and flip"


@dataclass(kw_only=True)
class LoaderSpeedArguments(command.FileArguments):
    """Time the loading of training batches."""

    data: str = option("photos", "'photos', a folder, parquet files or a Hub data set; its training split is read.")
    image_size: int = option(64, "Side of the crops in pixels.", minimum=1)
    num_images: int = option(4096, "Images in a round.", minimum=1)
    batch_size: int = option(64, "Images in a batch.", minimum=1)
    num_workers: int = option(0, "Processes that load images; with 0, this process does.", minimum=0)
    rounds: int = option(5, "Timed rounds.", minimum=1)
    device: Literal["cpu", "cuda"] = option("cpu", "Where batches of cached images are cut.")


def contenders(arguments: LoaderSpeedArguments) -> dict[str, Callable[[], Iterable]]:
    """What is timed: each makes a loader that gives `num_images` images once."""
    examples = load_examples(arguments.data, "train")
    examples = examples.select(range(min(arguments.num_images, len(examples))))
    hw, steps = (arguments.image_size, arguments.image_size), arguments.num_images // arguments.batch_size

    def sampler(images: ImageDataset) -> StepSampler:
        return StepSampler(images, 0, steps, arguments.batch_size)

    def first() -> Iterable:
        return training_loader(sampler(ImageDataset(examples, hw, flip=True)), arguments.num_workers)

    def cached(crop: str) -> Callable[[], Iterable]:
        images = ImageDataset(examples, hw, crop=crop, flip=True)
        unreadable = fill_cache(images, arguments.num_workers)
        if arguments.device == "cuda":
            loader = DeviceLoader(sampler(images), torch.device("cuda"), unreadable)
            return lambda: loader
        return lambda: training_loader(sampler(images), arguments.num_workers)

    return {FIRST: first, **{f"cached, {crop} crop and flip": cached(crop) for crop in KINDS}}


def measure(arguments: LoaderSpeedArguments) -> Iterator[dict]:
    """Times rounds of all contenders in turn, after one of each that is not counted.

    In one process on the CPU, its processor time is taken, which other work disturbs less than the clock's.
    """
    torch.set_num_threads(1)
    alone = arguments.num_workers == 0 and arguments.device == "cpu"
    clock = time.process_time if alone else time.perf_counter

    def seconds_of(make: Callable[[], Iterable]) -> float:
        start = clock()
        for _ in make():
            pass
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    yield {"benchmark": "loader", "seconds": in_rounds(contenders(arguments), arguments.rounds, 1, seconds_of)}


def table(result: dict) -> str:
    """Formats a result as markdown."""
    arguments = result["arguments"]
    images = arguments["num_images"] // arguments["batch_size"] * arguments["batch_size"]
    where = result["hardware"]["processor"]
    if arguments["device"] == "cuda":
        where = f"{', '.join(result['hardware']['gpus'])}; {where}"
    head = (
        f"{where}; {arguments['num_workers'] or 1} process(es), {arguments['image_size']} px, batches of "
        f"{arguments['batch_size']}, {arguments['rounds']} rounds of {images} images; {result['date'][:10]}."
    )
    speeds = {name: f"{images / statistics.median(times):,.0f}" for name, times in result["seconds"].items()}
    return f"{head}\n\n{markdown([{'': name, 'images a second': speed} for name, speed in speeds.items()])}"


if __name__ == "__main__":
    command.run(LoaderSpeedArguments, measure, table)
