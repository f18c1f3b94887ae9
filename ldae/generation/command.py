"""Writes generated images, and how far they are from real ones.

python -m ldae.generation --model FOLDER --output_dir OUT                                   # images
python -m ldae.generation --model FOLDER --output_dir OUT --data DATA --num_images 50000    # and their FID
python -m ldae.generation --model FOLDER --output_dir OUT --data DATA --encoder ENCODER     # on an encoder's features
"""

import time
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torchvision.utils import save_image

from ldae.data.images import ImageDataset
from ldae.data.sources import load_examples
from ldae.features.encoders import load_encoder
from ldae.files import validate_writable
from ldae.generation.frechet import frechet_distance
from ldae.generation.pipeline import LDAEPipeline
from ldae.generation.schedulers import respace
from ldae.loading import load_model
from ldae.options import option, option_parser
from ldae.progress import progress_bar
from ldae.report.results import save_result

SHOWN = 64  # images in samples.png
RECORDED = ("model", "data", "num_images", "batch_size", "sampler", "num_inference_steps", "guidance_scale", "seed")


@dataclass
class GenerationArguments:
    model: str = option(MISSING, "Folder or Hub id of an l-DAE that generates.")
    output_dir: str = option(MISSING, "Folder of samples.png and results/generation.json.")
    data: str | None = option(None, "Real images, to measure the Fréchet distance to; by default it is not measured.")
    split: str = option("train", "Split of the real images.")
    num_images: int = option(
        64, "Images to generate, at least 2 for a distance; the paper's FID is of 50,000.", minimum=1
    )
    sampler: Literal["ddim", "ddpm", "dpm"] = option("ddim", "DDIM, DDPM's ancestral sampling, or DPM-Solver++.")
    num_inference_steps: int = option(50, "Noise levels that are visited.", minimum=1)
    guidance_scale: float = option(1.0, "Classifier-free guidance, of a model with classes; 1 is none.")
    encoder: str | None = option(
        None,
        "Encoder on whose features the distance is measured; by default Inception's, from torch-fidelity (the fid extra).",
    )
    seed: int = option(0, "Seed of the noise.")
    batch_size: int = option(64, "Images in a forward pass.", minimum=1)
    num_workers: int = option(0, "Processes that read images.", minimum=0)
    overwrite: bool = option(False, "Replace another run's result in output_dir.")


def parse_arguments(argv: list[str] | None = None) -> GenerationArguments:
    """The options of a command line.

    Raises:
        SystemExit: for an unknown option or value, named on stderr.
        ValueError: for options that contradict each other.
    """
    parser = option_parser(GenerationArguments, description=__doc__.split("\n")[0])
    (options,) = parser.parse_args_into_dataclasses(argv)
    if options.data is not None and options.num_images < 2:
        raise ValueError(f"--num_images must be at least 2 for a distance to --data, got {options.num_images}")
    if options.encoder is not None and options.data is None:
        raise ValueError("--encoder measures a distance to real images: name them by --data")
    return options


def load_pipeline(options: GenerationArguments) -> LDAEPipeline:
    """The pipeline of --model on this process's device.

    Raises:
        ValueError: for a model that does not generate, or that the other options do not fit.
    """
    pipe = LDAEPipeline.from_model(load_model(options.model), options.sampler).to(PartialState().device)
    pipe.set_progress_bar_config(disable=True)
    respace(pipe.scheduler, options.num_inference_steps)  # raises before any work
    if options.guidance_scale != 1 and not pipe.model.config.num_classes:
        raise ValueError(
            f"--guidance_scale needs a model that is told classes (num_classes > 0), which {options.model!r} is not; "
            "leave it at 1"
        )
    return pipe


def generated(pipe: LDAEPipeline, options: GenerationArguments, samples: Path) -> Iterator[torch.Tensor]:
    """Batches (B, C, H, W) in [-1, 1]; classes take turns, if the model has any. At the end the first images are drawn."""
    generator, shown = torch.Generator().manual_seed(options.seed), []
    num_classes = pipe.model.config.num_classes
    with progress_bar(total=options.num_images, desc="generated", unit=" images") as bar:
        for first in range(0, options.num_images, options.batch_size):
            numbers = range(first, min(first + options.batch_size, options.num_images))
            images = pipe(
                None if num_classes else len(numbers),
                [i % num_classes for i in numbers] if num_classes else None,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
                generator=generator,
                output_type="pt",
            ).images
            shown.append(images[: max(0, SHOWN - first)].cpu())
            bar.update(len(images))
            yield 2 * images - 1
    samples.parent.mkdir(parents=True, exist_ok=True)
    drawn = torch.cat(shown)
    save_image(drawn, samples, nrow=max(1, round(len(drawn) ** 0.5)))


def measure(batches: Iterator[torch.Tensor], pipe: LDAEPipeline, options: GenerationArguments) -> dict[str, Any]:
    """The Fréchet distance of generated batches to the real images of --data, and what it was measured on.

    Raises:
        ValueError: if the data has no such split.
    """
    config, device = pipe.model.config, pipe.device
    examples = load_examples(str(options.data), options.split)
    real = ImageDataset(examples, config.image_hw, config.num_channels, keep_in_memory=False)
    encoder = None
    if options.encoder is not None:
        encoder = load_encoder(options.encoder, name_of_option="--encoder").to(device)
    measured = frechet_distance(real, batches, encoder, options.batch_size, options.num_workers, device)
    return {"split": options.split, "data_fingerprint": real.fingerprint(), **measured}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Writes samples.png and results/generation.json.

    Returns:
        The result, as in results/generation.json without the environment.

    Raises:
        FileExistsError: if output_dir holds another run's result.
        ValueError: for a model that does not generate, options that contradict it or each other, or an output_dir that cannot
            be written to.
    """
    options, start = parse_arguments(argv), time.perf_counter()
    output_dir = Path(options.output_dir).expanduser()
    path, samples = output_dir / "results" / "generation.json", output_dir / "samples.png"
    if path.exists() and not options.overwrite:
        raise FileExistsError(f"{path} holds another run's result; choose another --output_dir or pass --overwrite")
    validate_writable(output_dir)
    pipe = load_pipeline(options)
    result = {"kind": "generation", **{name: getattr(options, name) for name in RECORDED}}
    batches = generated(pipe, options, samples)
    if options.data is None:
        for _ in batches:
            pass
    else:
        measured = measure(batches, pipe, options)
        result |= measured
        print(f"{measured['metric']}: {measured['value']:.2f}")
    result["seconds"] = time.perf_counter() - start
    save_result(path, result, options.overwrite, options.data or "")
    print(f"{options.num_images} images, {min(SHOWN, options.num_images)} of them drawn: {samples}")
    return result
