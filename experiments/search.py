"""What features are worth for search, near-duplicates and clusters of images, beside a thumbnail of 8 x 8 pixels.

python -m experiments.search --data photos --output docs/search/photos.json --draw
python -m experiments.search --write docs/search.md    # puts the figures of docs/search/*.json into it
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score
from torch import nn

from ldae import launch
from ldae.data.images import ImageDataset, decode, spread, to_pixel_values
from ldae.data.sources import count_classes, load_examples, load_validation, why_not_probed
from ldae.features.encoders import load_encoder
from ldae.features.extraction import Features, extract_features
from ldae.features.neighbours import as_they_are, centred, nearest, standardised, whitened
from ldae.files import read_json, validate_writable
from ldae.mistakes import run_command
from ldae.names import short_name
from ldae.options import option, option_parser
from ldae.probes.baselines import thumbnail_features
from ldae.probes.knn import knn_predictions
from ldae.report import figures
from ldae.report.drawing import GAP, SIDE, enlargement, image_sheet, save_image, to_images
from ldae.report.results import save_result
from ldae.report.tables import fill, markdown

KINDS: dict[str, Callable[..., Sequence[torch.Tensor]]] = {
    "raw": as_they_are,
    "centred": centred,
    "standardised": standardised,
    "whitened": whitened,
}
RARE = 1e-4  # the share of pairs of different images that may be taken for copies
PAIRS = 2_000_000  # of different images, at most, whose cosines are looked at


def as_jpeg(image: Image.Image) -> Image.Image:
    """The image after JPEG at quality 20."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=20)
    return Image.open(file).convert("RGB")


def cropped(image: Image.Image) -> Image.Image:
    """The image without a twentieth at each side."""
    return ImageOps.crop(image, round(min(image.size) / 20))


ALTERATIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 20": as_jpeg,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "brighter by 30 %": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "in grey": lambda image: image.convert("L").convert("RGB"),
    "a tenth cut off": cropped,
    "mirrored": ImageOps.mirror,
}


@dataclass
class SearchArguments:
    """Measure search, near-duplicates and clusters of images by their features."""

    model: str = option("model_cards/ldae-vit-small-tiny-imagenet64", "An l-DAE folder or Hub id, or another encoder.")
    data: str = option("photos", "Images with labels and a validation split, as of ldae-probe.")
    gallery: int = option(2000, "Training images that are searched, spread evenly.", minimum=10)
    queries: int = option(500, "Validation images that are searched for.", minimum=1)
    copies: int = option(100, "Images of the gallery that are altered and searched for.", minimum=1)
    seed: int = option(0, "Seed of k-means and of the pairs of images.")
    output: str | None = option(None, "JSON file to write.")
    draw: bool = option(False, "Also draw examples beside the JSON file.")
    write: str | None = option(None, "Only put the figures of all JSON files of its folder into this Markdown file.")


def normalised(kind: str, gallery: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Features (n, E) of length 1, after what `KINDS` says is made of them."""
    return [nn.functional.normalize(features) for features in KINDS[kind](gallery, *others)]


def cosines(features: torch.Tensor, seed: int) -> torch.Tensor:
    """The cosines of random pairs of different images, of features (n, E) of length 1, in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(features), (PAIRS,), generator=generator)
    second = (first + torch.randint(1, len(features), (PAIRS,), generator=generator)) % len(features)
    pairs = zip(first.split(50_000), second.split(50_000), strict=True)
    return torch.cat([(features[i] * features[j]).sum(1) for i, j in pairs]).sort().values


def measure(
    gallery: Features,
    queries: Features,
    copies: dict[str, torch.Tensor],
    originals: torch.Tensor,
    kind: str,
    seed: int,
) -> dict[str, Any]:
    """The figures of one kind of features, in percent but for cosines.

    Args:
        copies: by alteration, the features (m, E) of altered images, whose originals the gallery holds at `originals` (m,).
        kind: of `KINDS`.
    """
    keys, asked, *altered = normalised(kind, gallery.features, queries.features, *copies.values())
    labels, number = gallery.labels, int(gallery.labels.max()) + 1
    _, near = nearest(asked, keys, 10)
    voted = knn_predictions(Features(keys, labels), asked, number)
    clusters = KMeans(number, n_init=5, random_state=seed).fit_predict(keys.numpy())
    between = cosines(keys, seed)
    limit = between[-round(RARE * len(between))]
    found = {}
    for name, features in zip(copies, altered, strict=True):
        similarity = features @ keys.T
        above = similarity[torch.arange(len(originals)), originals] > limit
        found[name] = {"nearest": percent(similarity.argmax(dim=1) == originals), "above_limit": percent(above)}
    return {
        "mean_cosine": between.mean().item(),
        "limit": limit.item(),
        "precision_at_10": percent(labels[near] == queries.labels[:, None]),
        "knn": percent(voted == queries.labels),
        "clusters": 100 * float(adjusted_mutual_info_score(labels.numpy(), clusters)),
        "copies": found,
    }


def percent(hits: torch.Tensor) -> float:
    """The share of what is true."""
    return 100 * hits.float().mean().item()


def altered_pixels(
    images: ImageDataset, indices: list[int], alter: Callable[[Image.Image], Image.Image]
) -> torch.Tensor:
    """Altered images as pixel values (n, C, H, W) in [-1, 1], resized and cropped as the others are."""
    made = []
    for example in images.examples.select(indices):
        image = alter(decode(example["image"], images.num_channels, images.within))
        made.append(np.asarray(images.crop.prepare(image)))
    return to_pixel_values(torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2))


@torch.inference_mode()
def run(options: SearchArguments):
    """Measures the encoder and the thumbnail, writes the figures, and draws what the encoder finds.

    Raises:
        ValueError: for data without labels or without a validation split.
    """
    accelerator = launch.start("no")
    encoder = load_encoder(options.model).to(accelerator.device)
    examples = load_examples(options.data, "train"), load_validation(options.data)
    if (reason := why_not_probed(*examples)) is not None:
        raise ValueError(f"--data {options.data!r} cannot be searched: {reason}")
    train, validation = (ImageDataset(part, encoder.image_hw, encoder.num_channels) for part in examples)
    kept, asked = spread(len(train), options.gallery), spread(len(validation), options.queries)
    originals = torch.tensor(spread(len(kept), options.copies))
    altered = {name: altered_pixels(train, [kept[i] for i in originals], alter) for name, alter in ALTERATIONS.items()}
    result: dict[str, Any] = {
        "kind": "search",
        "model": options.model,
        "data": {
            "name": short_name(options.data),
            "gallery": len(kept),
            "queries": len(asked),
            "copies": len(originals),
        },
        "classes": count_classes(train.examples),
        "representations": {},
    }
    for title, represent in (("l-DAE", encoder.pool), ("thumbnail", thumbnail_features)):
        gallery, queries = (
            extract_features(encoder, images, 64, indices=indices, represent=represent)
            for images, indices in ((train, kept), (validation, asked))
        )
        copies = {
            name: torch.cat([represent(some.to(encoder.device)).float().cpu() for some in x.split(64)])
            for name, x in altered.items()
        }
        result["representations"][title] = {
            kind: measure(gallery, queries, copies, originals, kind, options.seed) for kind in KINDS
        }
        if options.draw and options.output and title == "l-DAE":
            folder = Path(options.output).parent
            draw(train, validation, gallery, queries, copies, altered, originals, folder, options.seed)
    if options.output:
        save_result(options.output, result, overwrite=True)
    print(table([result]))


def draw(
    train: ImageDataset,
    validation: ImageDataset,
    gallery: Features,
    queries: Features,
    copies: dict[str, torch.Tensor],
    altered: dict[str, torch.Tensor],
    originals: torch.Tensor,
    folder: Path,
    seed: int,
):
    """Draws what is nearest to some queries and to some altered images, and the middle of some clusters, all centred.

    Args:
        gallery, queries: features of images of `train` and of `validation`.
        copies: by alteration, the features (m, E) of altered images, whose originals the gallery holds at `originals` (m,).
        altered: by alteration, the same images as pixel values (m, C, H, W) in [-1, 1].
    """
    keys, asked, *features = normalised("centred", gallery.features, queries.features, *copies.values())
    some = spread(len(asked), 8)
    _, near = nearest(asked[some], keys, 7)
    found = torch.stack([train.pixel_values(gallery.indices[row]) for row in near])
    same = gallery.labels[near] == queries.labels[some][:, None]
    figures.neighbours(validation.pixel_values(queries.indices[some]), found, same, folder / "neighbours.png")

    height, width = found.shape[-2:]
    factor = enlargement(height, width, SIDE / 2)
    rows, captions = [], []
    for i in spread(len(originals), 3):
        row, said = [train.pixel_values([gallery.indices[originals[i]]])], ["original"]
        for name, x in zip(altered, features, strict=True):
            row.append(altered[name][i][None])
            said.append(f"{name}: {(x[i] @ keys[originals[i]]).item():.2f}")
        rows.append(to_images(torch.cat(row), factor))
        captions.append(said)
    heading = "cosine of each altered image with its original"
    save_image(image_sheet(rows, 4 * GAP, heading=heading, captions=captions), folder / "copies.png")

    means = KMeans(int(gallery.labels.max()) + 1, n_init=5, random_state=seed).fit(keys.numpy())
    _, middle = nearest(torch.from_numpy(means.cluster_centers_), keys, 8)
    rows = [to_images(train.pixel_values(gallery.indices[row]), factor) for row in middle]
    save_image(
        image_sheet(rows, GAP, heading="the images nearest to the middle of each cluster"), folder / "clusters.png"
    )


def table(results: list[dict[str, Any]]) -> str:
    """The figures as two Markdown tables: search and clusters; copies."""
    first, second = [], []
    for result in results:
        for title, kinds in result["representations"].items():
            for kind, found in kinds.items():
                about = {"images": result["data"]["name"], "features": title, "made": kind}
                first.append({
                    **about,
                    "mean cosine": f"{found['mean_cosine']:.2f}",
                    "of ten nearest, same class": found["precision_at_10"],
                    "20-NN accuracy": found["knn"],
                    "clusters, AMI": found["clusters"],
                })  # fmt: skip
                second.append({
                    **about,
                    "limit": f"{found['limit']:.2f}",
                    **{name: f"{x['nearest']:.0f} / {x['above_limit']:.0f}" for name, x in found["copies"].items()},
                })  # fmt: skip
    left = ("images", "features", "made")
    return f"{markdown(first, left)}\n\n{markdown(second, left)}"


def main():
    """Measures, or writes the tables of what was measured."""
    (options,) = option_parser(SearchArguments, description=SearchArguments.__doc__ or "").parse_args_into_dataclasses()
    if options.draw and not options.output:
        raise ValueError("--draw needs --output, beside which it draws")
    if options.write is None:
        if options.output:
            validate_writable(Path(options.output).parent, "--output")
        run(options)
        return
    page = Path(options.write)
    files = sorted(page.with_suffix("").glob("*.json"))
    for name, text in zip(("search", "copies"), table([*map(read_json, files)]).split("\n\n"), strict=True):
        fill(page, name, text)


if __name__ == "__main__":
    run_command(main)
