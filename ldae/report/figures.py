"""Images of what a model does: denoised examples, the principal components as patches (figure 4), their spectrum.

And of what a probe found: which classes it takes for which, and the nearest neighbours of images.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.metrics import confusion_matrix as count_confusions

from configuration_ldae import LDAEConfig
from ldae.generation.pipeline import denoise
from modeling_ldae import LDAEForPreTraining, NoiseSchedule
from tokenizers_ldae import PatchTokenizer

SIDE = 192  # pixels to which small images are enlarged, by a whole factor
GAP = 8  # pixels between images, and half of the margin around them
FRAME = 5  # pixels of the coloured frame around a neighbour
MAX_NUMBERED = 50  # classes up to which a confusion matrix has its numbers written into it
MAX_NAMED = 100  # and up to which its classes are named
INK, BLUE, RED, GREEN, ORANGE = "#333333", "#3b6ea5", "#c44e52", "#3f9b56", "#d18b2c"
SCHEDULES = {
    "ddpm": "DDPM: β linear",
    "linear_gamma2": "γ² linear",
    "linear_sigma": "γ = 1, σ linear to √2",
    "single_sigma": "γ = 1, σ = √(1/3)",
}
LARGEST_RATIO = 4.0  # of noise to signal that is drawn


def denoising_grid(
    clean: torch.Tensor,
    noisy: torch.Tensor,
    denoised: torch.Tensor,
    path: str | Path,
    sigmas: Iterable[float] | None = None,
) -> Path:
    """Writes a PNG with the columns clean, noisy and denoised, a row for each image.

    Args:
        clean, noisy, denoised: images (B, C, H, W) with C = 1, 3 or 4 (RGBA, shown on white), clamped to [-1, 1].
        sigmas: noise level of each row, written beside it.

    Raises:
        ValueError: for other channels, shapes that differ, or a number of sigmas that is not B.
    """
    if not clean.shape == noisy.shape == denoised.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (clean, noisy, denoised))
        raise ValueError(f"clean, noisy and denoised must have the same shape, got {shapes}")
    labels = None if sigmas is None else [f"σ = {float(sigma):.2f}" for sigma in sigmas]
    if labels is not None and len(labels) != len(clean):
        raise ValueError(f"sigmas must hold one number for each of the {len(clean)} images, got {len(labels)}")
    columns = [_images(x) for x in (clean, noisy, denoised)]
    factor = max(1, round(SIDE / max(clean.shape[-2:])))
    rows = [[_enlarge(image, factor) for image in row] for row in zip(*columns, strict=True)]
    return _save(_grid(rows, GAP, ("clean", "noisy", "denoised"), labels), path)


@torch.no_grad()
def save_denoising(
    model: LDAEForPreTraining,
    pixel_values: torch.Tensor,
    path: str | Path,
    timesteps: torch.Tensor | None = None,
    seed: int = 0,
) -> Path:
    """Writes the `denoising_grid` of a model, which is left in the mode (training or evaluation) it was in.

    Args:
        pixel_values: clean images (B, C, H, W) in [-1, 1].
        timesteps: noise level of each (B,), in [0, T); by default spread evenly, the last row the noisiest.
        seed: of the noise; the same seed gives the same image.
    """
    pixel_values = pixel_values.to(model.device)
    if timesteps is None:
        num_rows = len(pixel_values)
        timesteps = torch.arange(1, num_rows + 1) * model.config.num_train_timesteps // max(num_rows, 1) - 1
    timesteps = timesteps.to(model.device).clamp(min=0)
    noisy, denoised = denoise(model, pixel_values, timesteps, torch.Generator(model.device).manual_seed(seed))
    return denoising_grid(pixel_values, noisy, denoised, path, model.noise_schedule.sigma[timesteps].tolist())


def filters(
    tokenizer: PatchTokenizer, patch_hw: tuple[int, int], num_channels: int, path: str | Path, count: int = 64
) -> Path:
    """Writes the first `count` rows of V as images of patches, row by row, each stretched symmetrically about grey.

    Raises:
        ValueError: if `num_channels` is not 1, 3 or 4 (of which the colours are shown).
    """
    return _save(_filter_sheet(tokenizer, patch_hw, num_channels, count), path)


def compared_filters(
    tokenizers: Mapping[str, PatchTokenizer],
    patch_hw: tuple[int, int],
    num_channels: int,
    path: str | Path,
    count: int = 16,
) -> Path:
    """Writes the `filters` of several tokenizers side by side, each below its name (paper, figure 4).

    Raises:
        ValueError: as `filters`.
    """
    count = min(count, *(len(tokenizer.V) for tokenizer in tokenizers.values()))
    sheets = [_filter_sheet(tokenizer, patch_hw, num_channels, count) for tokenizer in tokenizers.values()]
    return _save(_grid([sheets], GAP, tokenizers), path)


def _filter_sheet(tokenizer: PatchTokenizer, patch_hw: tuple[int, int], num_channels: int, count: int) -> Image.Image:
    V = tokenizer.V[:count].float()
    patches = _drawable(V.reshape(len(V), num_channels, *patch_hw))[:, :3]
    patches = patches / patches.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    factor = max(1, round(SIDE / 3 / max(patch_hw)))
    images = [_enlarge(image, factor) for image in _images(patches)]
    width = max(1, round(len(images) ** 0.5))
    return _grid([images[i : i + width] for i in range(0, len(images), width)], GAP // 2)


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
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    each, total = figure.subplots(1, 2)
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
        axes.axvline(d, color=RED, linewidth=1, linestyle="--")
        axes.axvspan(1, d, color=RED, alpha=0.06, linewidth=0)
        axes.set_xlabel("component")
        axes.set_xlim(1, max(len(variance), 2))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    path = _made(path)
    figure.savefig(path, dpi=150)
    return path


def confusion_matrix(
    predictions: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str], path: str | Path
) -> Path:
    """Writes how many percent of each class's images (a row) are taken for each class (a column).

    Numbers stand in the cells of up to 50 classes, those that round to 0 left out; a class without images is a row of 0.

    Args:
        predictions, labels: class numbers (n,) in [0, len(class_names)).

    Raises:
        ValueError: for shapes that differ, or a class number without a name.
    """
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions and labels must be as many, got {len(predictions)} and {len(labels)}")
    count = len(class_names)
    for name, numbers in (("predictions", predictions), ("labels", labels)):
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
            got = f"{int(numbers.min())} to {int(numbers.max())}"
            raise ValueError(f"{name} must be in [0, {count}), the classes that have a name, got {got}")
    percent = 100 * count_confusions(labels.cpu(), predictions.cpu(), labels=range(count), normalize="true")
    side = max(3.0, 0.4 * count) if count <= MAX_NUMBERED else 13.0  # inches
    size = min(9.0, 0.8 * 72 * side / count)  # points
    figure = Figure(figsize=(side + 2.5, side + 2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    if count <= MAX_NUMBERED:
        for i, j in np.argwhere(percent >= 0.5):
            colour = "white" if percent[i, j] > 50 else INK
            axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=size)
    ticks = list(range(count)) if count <= MAX_NAMED else []
    names = [class_names[i] for i in ticks]
    axes.set_xticks(ticks, names, fontsize=size, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label="% of the class's images")
    bar.outline.set_visible(False)
    path = _made(path)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def neighbours(queries: torch.Tensor, nearest: torch.Tensor, same_class: torch.Tensor, path: str | Path) -> Path:
    """Writes a PNG with a row for each query: the query, then its nearest images, framed green where of its class, else red.

    Args:
        queries: images (B, C, H, W) with C = 1, 3 or 4 (RGBA, shown on white), clamped to [-1, 1].
        nearest: (B, k, C, H, W), the nearest first.
        same_class: bool (B, k).

    Raises:
        ValueError: for other channels, or shapes that do not fit.
    """
    fits = queries.ndim == 4 and nearest.ndim == 5
    fits = fits and queries.shape == nearest[:, 0].shape and same_class.shape == nearest.shape[:2]
    if not fits:
        shapes = ", ".join(str(tuple(x.shape)) for x in (queries, nearest, same_class))
        raise ValueError(
            f"queries, nearest and same_class must have shapes (B, C, H, W), (B, k, C, H, W), (B, k), got {shapes}"
        )
    factor = max(1, round(SIDE / 2 / max(queries.shape[-2:])))
    rows = []
    for query, images, right in zip(queries, nearest, same_class.tolist(), strict=True):
        colours = ["white"] + [GREEN if x else RED for x in right]
        drawn = [_enlarge(x, factor) for x in _images(torch.cat([query[None], images]))]
        rows.append([ImageOps.expand(x, FRAME, colour) for x, colour in zip(drawn, colours, strict=True)])
    titles = ["query"] + [str(i) for i in range(1, nearest.shape[1] + 1)]
    return _save(_grid(rows, GAP, titles), path)


def sweep(result: dict[str, Any], path: str | Path) -> Path:
    """Writes a sweep's accuracy by block and, where it has them, by t with clean and noisy images; the floor is dashed.

    Args:
        result: what `ldae.probes.sweep.sweep` returns. Bars are one standard error.

    Raises:
        ValueError: if it has no blocks.
    """
    depth, timesteps = result["depth"], result["timesteps"]
    if not depth:
        raise ValueError("a sweep without blocks cannot be drawn")
    figure = Figure(figsize=(9 if timesteps else 5.2, 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, 2 if timesteps else 1, sharey=True))
    places = np.arange(1, len(depth) + 1)
    num_encoder = sum(row["part"] == "encoder" for row in depth)
    for number, name in enumerate(depth[0]["protocols"]):
        colour = (BLUE, RED, GREEN)[number % 3]
        _measured(panels[0], places, [row["protocols"][name] for row in depth], color=colour, label=name)
        for noisy in (False, True) if timesteps else ():
            rows = [row for row in timesteps if row["noisy"] == noisy]
            style = {"linestyle": (0, (1, 1.5)), "markerfacecolor": "white"} if noisy else {}
            label = f"{name}, {'noisy' if noisy else 'clean'}"
            figures = [row["protocols"][name] for row in rows]
            _measured(panels[1], [row["t"] for row in rows], figures, color=colour, label=label, **style)
        for axes in panels:
            axes.axhline(result["floor"][name]["accuracy"], color=colour, linewidth=1, linestyle="--", alpha=0.7)
    for axes in panels:  # what the dashed lines are
        axes.plot([], [], color="grey", linewidth=1, linestyle="--", label="untrained")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    panels[0].set_ylabel("accuracy (%)")
    panels[0].set_xlabel("block")
    shown = places[:: -(-len(places) // 16)]
    panels[0].set_xticks(shown, [str(depth[i - 1]["block"]) for i in shown])
    panels[0].set_xlim(0.5, len(depth) + 0.5)
    if num_encoder < len(depth):
        panels[0].axvspan(num_encoder + 0.5, len(depth) + 0.5, color=INK, alpha=0.06, linewidth=0)
        for x, text in (((1 + num_encoder) / 2, "encoder"), ((num_encoder + 1 + len(depth)) / 2, "decoder")):
            panels[0].annotate(text, (x, 1), (0, 3), ("data", "axes fraction"), "offset points", ha="center", color=INK)
    if timesteps:
        panels[1].set_xlabel("timestep t")
        panels[1].set_xticks(sorted({row["t"] for row in timesteps}))
    for axes in panels:
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    path = _made(path)
    figure.savefig(path, dpi=150)
    return path


def road(steps: Sequence[tuple[str, float | None, tuple[float, float], float | None]], path: str | Path) -> Path:
    """Writes the paper's figure 6 in bars: each rung's linear accuracy in the paper and here, the floor across ours.

    Args:
        steps: (name, the paper's accuracy or None, (ours, its standard error), the untrained network's or None), in %.

    Raises:
        ValueError: if there is none.
    """
    if not steps:
        raise ValueError("a road without rungs cannot be drawn")
    names, papers, ours, floors = zip(*steps, strict=True)
    places = np.arange(len(steps))
    figure = Figure(figsize=(max(4.0, 0.9 * len(steps) + 1.5), 3.8), layout="constrained")
    axes = figure.subplots()
    known = [i for i, paper in enumerate(papers) if paper is not None]
    axes.bar(places[known] - 0.2, [papers[i] for i in known], 0.38, color="#c9d3de", label="paper (ImageNet)")
    values, errors = zip(*ours, strict=True)
    axes.bar(places + 0.2, values, 0.38, yerr=errors, color=BLUE, ecolor=INK, capsize=2, label="here")
    measured = [i for i, floor in enumerate(floors) if floor is not None]
    sides = [places[measured] + 0.01, places[measured] + 0.39]
    axes.hlines([floors[i] for i in measured], *sides, color=ORANGE, linestyle=(0, (2, 1.5)), label="untrained")
    axes.set_xticks(places, names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_ylabel("linear accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    path = _made(path)
    figure.savefig(path, dpi=150)
    return path


def dimensions(
    paper: Mapping[str, Mapping[int, float]], here: Mapping[str, Mapping[int, tuple[float, float]]], path: str | Path
) -> Path:
    """Writes accuracy by latent dimension, a line for each tokenizer: the paper's (table 2) beside ours (with figure 5).

    Args:
        paper: tokenizer -> {latent dimension: accuracy}, in %.
        here: tokenizer -> {latent dimension: (accuracy, its standard error)}.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    colours = dict(zip(dict.fromkeys([*paper, *here]), (BLUE, GREEN, ORANGE, RED, INK), strict=False))
    style = {"marker": "o", "markersize": 4.5, "linewidth": 1.8}
    for name, row in paper.items():
        panels[0].plot(list(row), list(row.values()), color=colours[name], label=name, **style)
    for name, row in here.items():
        if row:
            values, errors = zip(*row.values(), strict=True)
            panels[1].errorbar(list(row), values, errors, color=colours[name], label=name, capsize=2.5, **style)
    shown = sorted({d for row in (*paper.values(), *here.values()) for d in row})
    for axes, title in zip(panels, ("paper (ImageNet)", "here"), strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(shown, [str(d) for d in shown], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("latent dimension d of a token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("linear accuracy (%)")
    path = _made(path)
    figure.savefig(path, dpi=150)
    return path


def schedules(path: str | Path) -> Path:
    """Writes how much of the latent is kept and how strong the noise beside it is, by t, for every noise schedule (figure 3)."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    kept, ratio = figure.subplots(1, 2)
    for (schedule, label), colour in zip(SCHEDULES.items(), (INK, BLUE, RED, GREEN), strict=True):
        gamma, sigma, _ = NoiseSchedule(LDAEConfig(noise_schedule=schedule)).tables()
        style = {
            "color": colour,
            "linewidth": 1.8,
            "linestyle": "--" if schedule == "single_sigma" else "-",
            "label": label,
        }
        kept.plot(gamma.square(), **style)
        ratio.plot(sigma / gamma, **style)
    kept.set_ylabel("signal kept, γ²")
    ratio.set_ylabel("noise to signal, σ / γ")
    ratio.set_ylim(0, LARGEST_RATIO)
    for axes in (kept, ratio):
        axes.set_xlabel("timestep t")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    kept.legend(frameon=False, fontsize=8)
    path = _made(path)
    figure.savefig(path, dpi=150)
    return path


@torch.no_grad()
def noise_spaces(
    models: Mapping[str, LDAEForPreTraining],
    pixel_values: torch.Tensor,
    path: str | Path,
    timestep: int | None = None,
    seed: int = 0,
) -> Path:
    """Writes images beside what models see of them: noise added where each adds it (paper, figure 7).

    Args:
        models: by the title of their column; they see images, of one size.
        pixel_values: clean images (B, C, H, W) in [-1, 1].
        timestep: of the noise; by default the middle.
    """
    columns = {"clean": pixel_values}
    for name, model in models.items():
        t = model.config.num_train_timesteps // 2 if timestep is None else timestep
        generator = torch.Generator(model.device).manual_seed(seed)
        columns[name] = denoise(model, pixel_values.to(model.device), t, generator)[0].cpu()
    factor = max(1, round(SIDE / max(pixel_values.shape[-2:])))
    drawn = [[_enlarge(image, factor) for image in _images(column)] for column in columns.values()]
    return _save(_grid([list(row) for row in zip(*drawn, strict=True)], GAP, columns), path)


# ------------------------------------------------------------------------------------------------------------ drawing


def _measured(axes, places: Sequence[float], figures: list[dict[str, Any]], **style):
    """A line through accuracies, with their standard errors."""
    errors = [figure["standard_error"] for figure in figures]
    style = {"marker": "o", "markersize": 4.5, "linewidth": 1.8, "capsize": 2.5, "elinewidth": 1, **style}
    axes.errorbar(places, [figure["accuracy"] for figure in figures], errors, **style)


def _drawable(images: torch.Tensor) -> torch.Tensor:
    if images.shape[1] not in (1, 3, 4):
        raise ValueError(f"only images of 1, 3 or 4 channels can be drawn, got {images.shape[1]}")
    return images


def _images(pixel_values: torch.Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1] -> B RGB images; RGBA on white."""
    levels = ((_drawable(pixel_values).detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if levels.shape[1] == 1:
        levels = levels.expand(-1, 3, -1, -1)
    images = [Image.fromarray(x) for x in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
    if pixel_values.shape[1] == 4:
        images = [Image.alpha_composite(Image.new("RGBA", x.size, "white"), x).convert("RGB") for x in images]
    return images


def _enlarge(image: Image.Image, factor: int) -> Image.Image:
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _grid(
    rows: list[list[Image.Image]], gap: int, titles: Iterable[str] = (), labels: list[str] | None = None
) -> Image.Image:
    """Images of one size on white, with a title above each column and a label beside each row."""
    width, height = rows[0][0].size if rows else (SIDE, 0)
    font = ImageFont.truetype(_font(), 18)
    left = 2 * gap + (round(max(map(font.getlength, labels), default=0)) + 2 * gap if labels else 0)
    titles = list(titles)
    top = 2 * gap + (26 if titles else 0)
    num_columns = max(len(rows[0]) if rows else 0, len(titles))
    size = (left + num_columns * (width + gap) + gap, top + len(rows) * (height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for j, title in enumerate(titles):
        draw.text((left + j * (width + gap) + width / 2, top / 2 + 2), title, INK, font, anchor="mm")
    for i, row in enumerate(rows):
        y = top + i * (height + gap)
        if labels:
            draw.text((left - 2 * gap, y + height / 2), labels[i], INK, font, anchor="rm")
        for j, image in enumerate(row):
            sheet.paste(image, (left + j * (width + gap), y))
    return sheet


@cache
def _font() -> str:
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def _made(path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _save(image: Image.Image, path: str | Path) -> Path:
    path = _made(path)
    image.save(path, "PNG")
    return path
