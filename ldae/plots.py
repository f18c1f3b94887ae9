"""Pictures of what a model does: denoised examples, the principal components as patches (figure 4), their spectrum."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from modeling_ldae import LDAEForPreTraining, PatchTokenizer

SIDE = 192  # pixels to which small pictures are enlarged, by a whole factor
GAP = 8  # pixels between pictures, and half of the margin around them
INK, BLUE, RED = "#333333", "#3b6ea5", "#c44e52"


def denoising_grid(
    clean: torch.Tensor,
    noisy: torch.Tensor,
    denoised: torch.Tensor,
    path: str | Path,
    sigmas: Iterable[float] | None = None,
) -> Path:
    """Writes a PNG with the columns clean, noisy and denoised, a row for each picture.

    Args:
        clean, noisy, denoised: pictures (B, C, H, W) with C = 1, 3 or 4 (RGBA, shown on white), clamped to [-1, 1].
        sigmas: noise level of each row, written beside it.

    Raises:
        ValueError: for other channels, shapes that differ, or a number of sigmas that is not B.
    """
    if not clean.shape == noisy.shape == denoised.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (clean, noisy, denoised))
        raise ValueError(f"clean, noisy and denoised must have the same shape, got {shapes}")
    labels = None if sigmas is None else [f"σ = {float(sigma):.2f}" for sigma in sigmas]
    if labels is not None and len(labels) != len(clean):
        raise ValueError(f"sigmas must hold one number for each of the {len(clean)} pictures, got {len(labels)}")
    columns = [_pictures(x) for x in (clean, noisy, denoised)]
    factor = max(1, round(SIDE / max(clean.shape[-2:])))
    rows = [[_enlarge(picture, factor) for picture in row] for row in zip(*columns, strict=True)]
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
        pixel_values: clean pictures (B, C, H, W) in [-1, 1].
        timesteps: noise level of each (B,), in [0, T); by default spread evenly, the last row the noisiest.
        seed: of the noise; the same seed gives the same picture.
    """
    pixel_values = pixel_values.to(model.device)
    if timesteps is None:
        num_rows = len(pixel_values)
        timesteps = torch.arange(1, num_rows + 1) * model.config.num_train_timesteps // max(num_rows, 1) - 1
    timesteps = timesteps.to(model.device).clamp(min=0)
    training = model.training
    model.eval()
    try:
        generator = torch.Generator(model.device).manual_seed(seed)
        outputs = model(pixel_values, timesteps=timesteps, generator=generator)
    finally:
        model.train(training)
    sigmas = model.noise_schedule.sigma[timesteps].tolist()
    return denoising_grid(pixel_values, outputs.noisy_pixel_values, outputs.reconstruction, path, sigmas)


def filters(
    tokenizer: PatchTokenizer, patch_hw: tuple[int, int], num_channels: int, path: str | Path, count: int = 64
) -> Path:
    """Writes the first `count` rows of V as pictures of patches, row by row, each stretched symmetrically about grey.

    Raises:
        ValueError: if `num_channels` is not 1, 3 or 4 (of which the colours are shown).
    """
    V = tokenizer.V[:count].float()
    patches = _drawable(V.reshape(len(V), num_channels, *patch_hw))[:, :3]
    patches = patches / patches.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    factor = max(1, round(SIDE / 3 / max(patch_hw)))
    pictures = [_enlarge(picture, factor) for picture in _pictures(patches)]
    width = max(1, round(len(pictures) ** 0.5))
    return _save(_grid([pictures[i : i + width] for i in range(0, len(pictures), width)], GAP // 2), path)


def spectrum(tokenizer: PatchTokenizer, path: str | Path) -> Path:
    """Writes a plot of the variance along every principal component and of its running sum, the latent space marked.

    Raises:
        ValueError: if the tokenizer is not fitted.
    """
    variance = tokenizer.spectrum.double().cpu().numpy()
    if not variance.any():
        raise ValueError("the tokenizer is not fitted: call ldae.pca.fit_to_pictures first")
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


# ------------------------------------------------------------------------------------------------------------ drawing


def _drawable(pictures: torch.Tensor) -> torch.Tensor:
    if pictures.shape[1] not in (1, 3, 4):
        raise ValueError(f"only pictures of 1, 3 or 4 channels can be drawn, got {pictures.shape[1]}")
    return pictures


def _pictures(pixel_values: torch.Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1] -> B RGB pictures; RGBA on white."""
    levels = ((_drawable(pixel_values).detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if levels.shape[1] == 1:
        levels = levels.expand(-1, 3, -1, -1)
    pictures = [Image.fromarray(x) for x in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
    if pixel_values.shape[1] == 4:
        pictures = [Image.alpha_composite(Image.new("RGBA", x.size, "white"), x).convert("RGB") for x in pictures]
    return pictures


def _enlarge(picture: Image.Image, factor: int) -> Image.Image:
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _grid(
    rows: list[list[Image.Image]], gap: int, titles: Iterable[str] = (), labels: list[str] | None = None
) -> Image.Image:
    """Pictures of one size on white, with a title above each column and a label beside each row."""
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
        for j, picture in enumerate(row):
            sheet.paste(picture, (left + j * (width + gap), y))
    return sheet


@cache
def _font() -> str:
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def _made(path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _save(picture: Image.Image, path: str | Path) -> Path:
    path = _made(path)
    picture.save(path, "PNG")
    return path
