"""Drawings of what a model does: its losses, denoised examples, principal components as patches (figure 4), their spectrum.

And of what a probe found: which classes it takes for which, the nearest neighbours of images, accuracy by block and by t.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ldae.report.drawing import (
    BLUE,
    GAP,
    GREEN,
    INK,
    LINE,
    ORANGE,
    RED,
    SIDE,
    check_channels,
    enlargement,
    image_columns,
    image_sheet,
    panels,
    save_figure,
    save_image,
    to_images,
)
from modeling_ldae import LDAEForPreTraining
from tokenizers_ldae import PatchTokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRAME = 5  # pixels of the coloured frame around a neighbour
LEVELS = 8  # of noise, under which one image is drawn
MOST_FILTERS = 64  # that are drawn of a tokenizer
MAX_NUMBERED = 50  # classes up to which a confusion matrix has its numbers written into it
MAX_NAMED = 100  # and up to which its classes are named


@torch.no_grad()
def save_denoising(
    model: LDAEForPreTraining,
    pixel_values: torch.Tensor,
    path: str | Path,
    heading: str = "",
) -> Path:
    """Writes a PNG with the columns clean, noisy and denoised, a row for each image, each noisier than the one before.

    Noise levels are spread evenly from the weakest to the strongest. The noise is the same every time. The model is left in the
    mode (training or evaluation) that it was in.

    Args:
        pixel_values: clean images (B, C, H, W) in [-1, 1], with C = 1, 3 or 4 (RGBA, shown on white).
        heading: stands above all, such as "step 1,000".

    Raises:
        ValueError: for other channels.
    """
    pixel_values = pixel_values.to(model.device)
    timesteps = _spread(model, len(pixel_values)).to(model.device)
    noisy, denoised = model.denoise(pixel_values, timesteps, torch.Generator(model.device).manual_seed(0))
    labels = [f"σ = {sigma:.2f}" for sigma in model.noise_schedule.sigma[timesteps].tolist()]
    columns = {"clean": pixel_values, "noisy": noisy, "denoised": denoised}
    return save_image(image_columns(columns, labels, heading), path)


@torch.no_grad()
def noise_levels(model: LDAEForPreTraining, image: torch.Tensor, path: str | Path, heading: str = "") -> Path:
    """Writes one image under the same noise at levels from the weakest to the strongest: a column for each, noisy and denoised.

    Args:
        image: clean (C, H, W) in [-1, 1].
        heading: stands above all, such as "step 1,000".
    """
    image, (height, width) = image.to(model.device), image.shape[-2:]
    timesteps = _spread(model, LEVELS).to(model.device)
    generator = torch.Generator(model.device).manual_seed(0)
    noise = model.sample_noise(1, (height, width), generator)["noise"]
    rows = model.denoise(image.expand(LEVELS, -1, -1, -1), timesteps, generator, noise)
    factor = enlargement(height, width, SIDE / 2)
    firsts = image, torch.ones_like(image)  # of the clean image nothing is denoised
    drawn = [to_images(torch.cat([first[None], row]), factor) for first, row in zip(firsts, rows, strict=True)]
    titles = ["clean", *(f"σ {sigma:.2f}" for sigma in model.noise_schedule.sigma[timesteps].tolist())]
    return save_image(image_sheet(drawn, GAP, titles, ["noisy", "denoised"], heading), path)


def _spread(model: LDAEForPreTraining, count: int) -> torch.Tensor:
    """So many timesteps (count,), spread evenly, the last the noisiest."""
    return (torch.arange(1, count + 1) * model.config.num_train_timesteps // max(count, 1) - 1).clamp(min=0)


def filters(tokenizer: PatchTokenizer, patch_hw: tuple[int, int], num_channels: int, path: str | Path) -> Path:
    """Writes the first 64 rows of V as images of patches, row by row, each stretched symmetrically about grey.

    Below each stand its number and the weight that white is, its largest.

    Raises:
        ValueError: if `num_channels` is not 1, 3 or 4 (of which the colours are shown).
    """
    return save_image(filter_sheet(tokenizer, patch_hw, num_channels, MOST_FILTERS), path)


def filter_sheet(tokenizer: PatchTokenizer, patch_hw: tuple[int, int], num_channels: int, count: int) -> Image.Image:
    """The image that `filters` writes, of the first `count` rows."""
    images, largest = filter_images(tokenizer, patch_hw, num_channels, count)
    captions = [f"{i}  ±{scale:.2f}" for i, scale in enumerate(largest, 1)]
    width = max(1, round(len(images) ** 0.5))
    in_rows = [slice(i, i + width) for i in range(0, len(images), width)]
    heading = "grey 0, white and black ± the largest weight"
    return image_sheet(
        [images[row] for row in in_rows], GAP // 2, (), None, heading, [captions[row] for row in in_rows]
    )


def filter_images(
    tokenizer: PatchTokenizer, patch_hw: tuple[int, int], num_channels: int, count: int
) -> tuple[list[Image.Image], list[float]]:
    """The first `count` rows of V as images of patches, each stretched symmetrically about grey, and the weight that white is.

    Raises:
        ValueError: if `num_channels` is not 1, 3 or 4 (of which the colours are shown).
    """
    check_channels(num_channels)
    V = tokenizer.V[:count].float()
    patches = V.reshape(len(V), num_channels, *patch_hw)[:, :3]
    largest = patches.abs().amax(dim=(1, 2, 3))
    images = to_images(patches / largest[:, None, None, None].clamp(min=1e-12), enlargement(*patch_hw, SIDE / 3))
    return images, largest.tolist()


def spectrum(tokenizer: PatchTokenizer, path: str | Path) -> Path:
    """Writes a plot of the variance along every principal component and of its running sum, the latent space marked.

    Raises:
        ValueError: if the tokenizer is not fitted.
    """
    variance = tokenizer.spectrum.double().cpu().numpy()
    if not variance.any():
        raise ValueError("the tokenizer is not fitted: call ldae.tokenizers.fitting.fit_to_images first")
    explained, d = variance.cumsum() / variance.sum(), len(tokenizer.V)
    index = np.arange(1, len(variance) + 1)
    figure, (each, total) = panels(2, 9, 3.4)
    drawn = variance > variance[0] * 1e-12  # what is below is rounding, and would stretch the axis
    each.semilogy(index[drawn], variance[drawn], color=BLUE, linewidth=1.8)
    each.set_ylabel("variance along the component")
    total.plot(index, 100 * explained, color=BLUE, linewidth=1.8)
    total.set_ylabel("explained variance (%)")
    total.set_ylim(min(50, 100 * explained[0]) - 2, 101.5)
    total.plot(d, 100 * explained[d - 1], "o", color=RED)
    total.annotate(
        f"d = {d}: {100 * explained[d - 1]:.1f} %",
        (d, 100 * explained[d - 1]),
        (10 if d <= len(variance) / 2 else -10, -14),
        textcoords="offset points",
        color=RED,
        ha="left" if d <= len(variance) / 2 else "right",
    )
    for axes in (each, total):
        axes.axvline(d, color=RED, linewidth=1, linestyle="--", label=f"the latent space: the first {d} components")
        axes.axvspan(1, d, color=RED, alpha=0.06, linewidth=0)
        axes.set_xlabel("component")
        axes.set_xlim(1, max(len(variance), 2))
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return save_figure(figure, path)


def learning_curve(
    trained: list[dict[str, Any]], held_out: list[dict[str, Any]], references: dict[str, float], path: str | Path
) -> Path:
    """Writes a plot of a run's losses, on training images and on held-out ones, and of the effective rank of its features.

    Args:
        trained: the entries of losses.jsonl, with "step" and "loss"; the line is their mean over up to 500 parts of the run.
        held_out: the entries of held_out.jsonl, with "step", "loss", "effective_rank" and "largest_rank".
        references: the losses of the "mean" and of the best "linear" denoiser, dashed.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure, (losses, rank) = panels(2, 9, 3.6)
    parts = np.array_split(np.array([(entry["step"], entry["loss"]) for entry in trained]).reshape(-1, 2), 500)
    line = np.array([part.mean(axis=0) for part in parts if len(part)]).reshape(-1, 2)
    losses.plot(*line.T, color=BLUE, linewidth=1, alpha=0.5, label="training images, weights of the step")
    steps = [point["step"] for point in held_out]
    losses.plot(steps, [p["loss"] for p in held_out], color=BLUE, **LINE, label="held-out images, averaged weights")
    for name, title, colour in (("mean", "the mean patch", "grey"), ("linear", "best linear, patch by patch", ORANGE)):
        losses.axhline(references[name], color=colour, linewidth=1.4, linestyle="--", label=title)
    losses.set_yscale("log")
    low, high = losses.get_ylim()  # a few plain numbers, also within one decade or a small part of it
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 4, 6)) if high > 4 * low else MaxNLocator(5))
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter(NullFormatter())
    losses.set_ylabel("loss")
    rank.plot(steps, [p["effective_rank"] for p in held_out], color=GREEN, **LINE, label="features of held-out images")
    rank.set_ylabel(f"effective rank, of {held_out[-1]['largest_rank']} at most")
    rank.set_ylim(0, 1.1 * max(1, *(p["effective_rank"] for p in held_out)))
    for axes in (losses, rank):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # also of a run of one step
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    return save_figure(figure, path)


def confusion_matrix(
    predictions: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str], path: str | Path
) -> Path:
    """Writes how many percent of each class's images (a row) are taken for each class (a column).

    Numbers stand in the cells of up to 50 classes, those that round to 0 left out; a class without images is a row of 0.

    Args:
        predictions, labels: class numbers (n,) in [0, len(class_names)).
    """
    from sklearn.metrics import confusion_matrix as count_confusions

    count = len(class_names)
    percent = 100 * count_confusions(labels.cpu(), predictions.cpu(), labels=range(count), normalize="true")
    side = max(3.0, 0.4 * count) if count <= MAX_NUMBERED else 13.0  # inches
    size = min(9.0, 0.8 * 72 * side / count)  # points
    figure, (axes,) = panels(1, side + 2.5, side + 2, grid=False)
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    if count <= MAX_NUMBERED:
        for i, j in np.argwhere(percent >= 0.5):
            colour = "white" if percent[i, j] > 50 else INK
            axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=size)
    ticks = list(range(count)) if count <= MAX_NAMED else []
    names = [" ".join(class_names[i].split()).replace("$", r"\$") for i in ticks]  # one line, and no formula
    axes.set_xticks(ticks, names, fontsize=size, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label="% of the class's images")
    bar.outline.set_visible(False)
    return save_figure(figure, path, bbox_inches="tight")


def neighbours(queries: torch.Tensor, nearest: torch.Tensor, same_class: torch.Tensor, path: str | Path) -> Path:
    """Writes a PNG with a row for each query: the query, then its nearest images, framed green where of its class, else red.

    Args:
        queries: images (B, C, H, W) with C = 1, 3 or 4 (RGBA, shown on white), clamped to [-1, 1].
        nearest: (B, k, C, H, W), the nearest first.
        same_class: bool (B, k).

    Raises:
        ValueError: for other channels.
    """
    height, width = queries.shape[-2:]
    factor = enlargement(height, width, SIDE / 2)
    rows = []
    for query, images, right in zip(queries, nearest, same_class.tolist(), strict=True):
        colours = ["white"] + [GREEN if x else RED for x in right]
        drawn = to_images(torch.cat([query[None], images]), factor)
        rows.append([ImageOps.expand(x, FRAME, colour) for x, colour in zip(drawn, colours, strict=True)])
    titles = ["query"] + [str(i) for i in range(1, nearest.shape[1] + 1)]
    heading = "the nearest images: green of the query's class, red of another"
    return save_image(image_sheet(rows, GAP, titles, heading=heading), path)


def sweep(result: dict[str, Any], path: str | Path) -> Path:
    """Writes a sweep's accuracy by block and, where it has them, by t with clean and noisy images.

    Bars are one standard error; the untrained network's accuracy is dashed.

    Args:
        result: what `ldae.probes.sweep.sweep` returns.
    """
    depth, timesteps = result["depth"], result["timesteps"]
    count = 2 if timesteps else 1
    figure, axes = panels(count, 9 if timesteps else 5.2, 3.6, sharey=True)
    for name, colour in zip(depth[0]["protocols"], (BLUE, RED, GREEN) * len(depth[0]["protocols"]), strict=False):
        _measured(axes[0], range(1, len(depth) + 1), depth, name, color=colour, label=name)
        for noisy in (False, True) if timesteps else ():
            rows = [row for row in timesteps if row["noisy"] == noisy]
            style = {"linestyle": (0, (1, 1.5)), "markerfacecolor": "white"} if noisy else {}
            label = f"{name}, {'noisy' if noisy else 'clean'}"
            _measured(axes[1], [row["t"] for row in rows], rows, name, color=colour, label=label, **style)
        for panel in axes:
            panel.axhline(result["floor"][name]["accuracy"], color=colour, linewidth=1, linestyle="--", alpha=0.7)
    for panel in axes:  # what the dashed lines are
        panel.plot([], [], color="grey", linewidth=1, linestyle="--", label="untrained")
    axes[0].set_ylabel("accuracy (%)")
    _name_blocks(axes[0], depth)
    if timesteps:
        axes[1].set_xlabel("timestep t")
        axes[1].set_xticks(sorted({row["t"] for row in timesteps}))
    for panel in axes:
        panel.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    return save_figure(figure, path)


def _name_blocks(axes: Axes, depth: list[dict[str, Any]]):
    """The numbers of the blocks below, at most sixteen, and which of them are the encoder's and which the decoder's."""
    shown = range(1, len(depth) + 1, -(-len(depth) // 16))
    axes.set_xlabel("block")
    axes.set_xticks(shown, [str(depth[i - 1]["block"]) for i in shown])
    axes.set_xlim(0.5, len(depth) + 0.5)
    num_encoder = sum(row["part"] == "encoder" for row in depth)
    if num_encoder < len(depth):
        axes.axvspan(num_encoder + 0.5, len(depth) + 0.5, color=INK, alpha=0.06, linewidth=0)
        for x, text in (((1 + num_encoder) / 2, "encoder"), ((num_encoder + 1 + len(depth)) / 2, "decoder")):
            axes.annotate(text, (x, 1), (0, 3), ("data", "axes fraction"), "offset points", ha="center", color=INK)


def _measured(axes: Axes, places: Sequence[float], rows: list[dict[str, Any]], protocol: str, **style):
    """A line through a protocol's accuracies, with their standard errors."""
    figures = [row["protocols"][protocol] for row in rows]
    accuracies, errors = ([figure[name] for figure in figures] for name in ("accuracy", "standard_error"))
    axes.errorbar(places, accuracies, errors, **{**LINE, "capsize": 2.5, "elinewidth": 1, **style})
