"""Fine-tunes a segmentation of cell nuclei, with l-DAE as UperNet's backbone, and measures it on tiles that it did not see.

pip install --no-deps stardist    # for its image of nuclei with masks; nothing of its code is run
python -m experiments.segmentation model_cards/ldae-vit-small-tiny-imagenet64 --seeds 0 1 2 --write docs/dense.md

docs/dense.md shows what comes out, beside the same network from random weights and a threshold on brightness.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.filters import threshold_otsu
from tqdm import trange
from transformers import AutoConfig, UperNetConfig, UperNetForSemanticSegmentation

from ldae import LDAEBackbone
from ldae.files import validate_writable
from ldae.mistakes import run_command
from ldae.options import option, option_parser
from ldae.report.drawing import image_columns, save_image
from ldae.report.results import environment
from ldae.report.tables import fill, markdown

ENLARGED = 2  # a nucleus is then some five patches of 8 pixels wide
COLUMN = 640  # the image's columns before it are trained on, those from it on are measured
BATCH, LEARNING_RATE, WIDTH = 8, 3e-4, 64
RESULTS = Path(__file__).parent / "results" / "segmentation.jsonl"


@dataclass
class SegmentationArguments:
    model: str | None = option(
        None, "An l-DAE's folder or Hub id; without it only the table is made anew.", positional=True
    )
    seeds: list[int] = option([0], "Seeds of the networks and of what they see.")
    steps: int = option(100, "Steps of each training.", minimum=1)
    results: str = option(str(RESULTS), "A .jsonl, written anew.")
    write: str | None = option(None, "Document whose table is filled.")
    figure: str | None = option(None, "PNG of what the first seed finds.")


def nuclei() -> tuple[torch.Tensor, torch.Tensor]:
    """The image (3, 1024, 1024) in [-1, 1], and the mask (1024, 1024): 1 in a nucleus, 0 elsewhere. People drew the mask.

    Raises:
        ImportError: without the package stardist.
    """
    package = importlib.util.find_spec("stardist")
    if package is None or not package.submodule_search_locations:
        raise ImportError("the image of nuclei is in a package: pip install --no-deps stardist")
    folder = Path(package.submodule_search_locations[0]) / "data" / "images"
    image = np.asarray(Image.open(folder / "img2d.tif"), dtype=np.float32)
    mask = np.asarray(Image.open(folder / "mask2d.tif")) > 0
    grey = torch.from_numpy((image / np.percentile(image, 99.8)).clip(0, 1)) * 2 - 1
    grey = F.interpolate(grey[None, None], scale_factor=ENLARGED, mode="bilinear")[0]
    enlarged = mask.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)
    return grey.expand(3, -1, -1), torch.from_numpy(enlarged.astype(np.int64))


def segmenter(folder: str | Path, pretrained: bool) -> UperNetForSemanticSegmentation:
    """UperNet on four layers of an l-DAE encoder, with the encoder's weights from `folder` or random ones.

    Raises:
        ValueError: for an encoder of fewer than four layers.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    layers = config.num_hidden_layers
    if layers < 4:
        raise ValueError(f"UperNet takes the maps of four layers, and {str(folder)!r} has {layers}")
    stages = [f"stage{layers * quarter // 4}" for quarter in (1, 2, 3, 4)]
    nested = AutoConfig.from_pretrained(folder, out_features=stages, dtype=torch.float32, trust_remote_code=False)
    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=nested, hidden_size=WIDTH, num_labels=2, use_auxiliary_head=False)
    )
    trained = LDAEBackbone.from_pretrained(folder, config=nested, dtype=torch.float32)
    if pretrained:
        model.backbone = trained
    else:  # the tokenizer's numbers are no learned weights: both networks see the same projection of the image
        model.backbone.ldae.tokenizer.load_state_dict(trained.ldae.tokenizer.state_dict())
    return model


def crops(
    image: torch.Tensor, mask: torch.Tensor, size: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of random crops (B, 3, size, size) and their masks (B, size, size), turned and mirrored at random."""
    images: list[torch.Tensor] = []
    masks: list[torch.Tensor] = []
    for _ in range(BATCH):
        y, x = rng.integers(mask.shape[0] - size + 1), rng.integers(mask.shape[1] - size + 1)
        turns, mirrored = int(rng.integers(4)), rng.random() < 0.5
        for source, target in ((image, images), (mask, masks)):
            crop = torch.rot90(source[..., y : y + size, x : x + size], turns, (-2, -1))
            target.append(crop.flip(-1) if mirrored else crop)
    return torch.stack(images), torch.stack(masks)


def tiles(image: torch.Tensor, size: int) -> torch.Tensor:
    """The tiles of (…, H, W) without overlap, row by row: (n, …, size, size). What is left at the edges is not in any."""
    parts = image.unfold(-2, size, size).unfold(-2, size, size)
    return parts.movedim((-4, -3), (0, 1)).flatten(0, 1)


def joined(parts: torch.Tensor, columns: int) -> torch.Tensor:
    """The image (…, H, W) of tiles (n, …, size, size), `columns` of them in a row."""
    rows = parts.unflatten(0, (-1, columns)).movedim((0, 1), (-4, -2))
    return rows.flatten(-4, -3).flatten(-2, -1)


def overlaps(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """The intersection over the union of nuclei and of background, and their mean, in %."""
    iou = [100 * ((found == c) & (expected == c)).sum() / ((found == c) | (expected == c)).sum() for c in (1, 0)]
    return {"nuclei": iou[0].item(), "background": iou[1].item(), "mean": sum(iou).item() / 2}


def fine_tune(folder: str | Path, pretrained: bool, seed: int, steps: int) -> torch.Tensor:
    """Trains the whole network, and returns the classes of the pixels (n, size, size) in the tiles of the image's right part."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    image, mask = nuclei()
    model = segmenter(folder, pretrained)
    size = model.backbone.config.image_hw[0]
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in trange(steps, desc=f"seed {seed}, {'trained' if pretrained else 'random'}", mininterval=10):
        pixels, labels = crops(image[..., :COLUMN], mask[:, :COLUMN], size, rng)
        model(pixels, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        return model(tiles(image[..., COLUMN:], size)).logits.argmax(1)


def threshold(size: int) -> torch.Tensor:
    """The same classes (n, size, size) by Otsu's threshold on brightness, which is chosen on the image's left part."""
    image, _ = nuclei()
    level = threshold_otsu(image[0, :, :COLUMN].numpy())
    return (tiles(image[0, :, COLUMN:], size) > level).long()


def draw(found: dict[str, torch.Tensor], size: int, path: Path):
    """Draws the upper part of what was measured: the image, the mask and what was found, by name, in tiles."""
    image, mask = nuclei()
    columns = (image.shape[-1] - COLUMN) // size
    pictures = {"image": image[..., COLUMN:], "mask": mask[:, COLUMN:]}
    pictures |= {name: joined(parts, columns) for name, parts in found.items()}
    shown = columns * size
    sheet = {
        name: (part if name == "image" else (2.0 * part - 1).expand(3, -1, -1))[None, :, :shown, :shown]
        for name, part in pictures.items()
    }
    save_image(image_columns(sheet), path)


def table(results: Path) -> str:
    """A Markdown table of a file of results: the mean over the seeds, ± the standard deviation between them."""
    rows: dict[str, list[dict[str, float]]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        rows.setdefault(result["weights"], []).append(result["iou"])

    def cell(values: list[float]) -> str:
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        return f"{np.mean(values):.1f}{spread}"

    return markdown(
        [
            {"": name, "seeds": len(found), **{f"IoU, {part}": cell([iou[part] for iou in found]) for part in found[0]}}
            for name, found in rows.items()
        ]
    )


def run(model: str, seeds: list[int], steps: int, results: Path, figure: str | None):
    """Measures the threshold, and the network from random and from pre-trained weights with each seed, into `results`."""
    validate_writable(results.parent, "--results")
    size = AutoConfig.from_pretrained(model, trust_remote_code=False).image_hw[0]
    expected = tiles(nuclei()[1][:, COLUMN:], size)
    common = {"model": Path(model).name, "steps": steps, **environment()}
    drawn: dict[str, torch.Tensor] = {}
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("w", encoding="utf-8") as file:

        def note(weights: str, seed: int | None, found: torch.Tensor):
            iou = overlaps(found, expected)
            print(f"{weights}, seed {seed}: {iou}")
            file.write(json.dumps({"weights": weights, "seed": seed, "iou": iou, **common}) + "\n")
            file.flush()
            drawn.setdefault(weights, found)

        note("threshold", None, threshold(size))
        for seed in seeds:
            note("random weights", seed, fine_tune(model, False, seed, steps))
            note("pre-trained", seed, fine_tune(model, True, seed, steps))
    if figure is not None:
        draw(drawn, size, Path(figure))


def main():
    (options,) = option_parser(SegmentationArguments, description=__doc__.split("\n")[0]).parse_args_into_dataclasses()
    results = Path(options.results)
    if options.model is not None:
        run(options.model, options.seeds, options.steps, results, options.figure)
    text = table(results)
    if options.write is not None:
        fill(Path(options.write), "segmentation", text)
    print(text)


if __name__ == "__main__":
    run_command(main)
