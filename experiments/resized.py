"""Writes the centre crops of a data set at one size, losslessly, so that many short runs need not decode it anew.

python -m experiments.resized frgfm/imagenette:320px runs/imagenette-64 --size 64
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

import datasets
from torchvision.transforms.v2.functional import to_pil_image

from ldae.data.images import ImageDataset
from ldae.data.sources import load_examples, load_validation
from ldae.files import atomic_write, validate_writable
from ldae.mistakes import run_command
from ldae.options import option, option_parser
from ldae.progress import progress_bar


@dataclass
class ResizeArguments:
    source: str = option(MISSING, "Folder or Hub id, as train_ldae.py's --data.", positional=True)
    target: str = option(MISSING, "Folder of the new data set.", positional=True)
    size: int = option(MISSING, "Side of the images in pixels.", minimum=1)


def resize(source: str, target: Path, size: int):
    """Writes `target`/data/SPLIT.parquet with square images of `size` pixels as PNG, and names the unreadable ones it leaves out.

    The splits are "train" and, where there is one, "validation". Labels are kept, where there are any.

    Raises:
        FileExistsError: if `target` holds something.
        ValueError: without training images, or if `target` cannot be written to.
    """
    if any(target.glob("*")):
        raise FileExistsError(f"{str(target)!r} is not empty; give another folder")
    validate_writable(target, "target")
    found = {"train": load_examples(source, "train"), "validation": load_validation(source)}
    with atomic_write(target) as partial:
        (partial / "data").mkdir(parents=True)
        for split, examples in found.items():
            if examples is None:
                continue
            images = ImageDataset(examples, (size, size))
            items = [images[0, i] for i in progress_bar(range(len(images)), desc=split, unit=" images")]
            good = [item for item in items if "error" not in item]
            for item in items:
                if "error" in item:
                    print(f"Skipping {item['name']}: {item['error']}")
            columns = {"image": [to_pil_image(item["pixel_values"]) for item in good]}
            features = datasets.Features(image=datasets.Image())
            if "label" in examples.features:
                columns["label"], features["label"] = [item["label"] for item in good], examples.features["label"]
            datasets.Dataset.from_dict(columns, features).to_parquet(partial / "data" / f"{split}.parquet")


def main():
    (options,) = option_parser(ResizeArguments, description=__doc__.split("\n")[0]).parse_args_into_dataclasses()
    datasets.disable_progress_bars()  # of the writing, which takes a moment
    resize(options.source, Path(options.target), options.size)
    print(f"Square images of {options.size} px: {options.target}")


if __name__ == "__main__":
    run_command(main)
