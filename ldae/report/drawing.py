"""What drawings share: panels of plots in one style, and sheets of images. matplotlib is loaded when something is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 192  # pixels to which small images are enlarged, by a whole factor
GAP = 8  # pixels between images, and half of the margin around them
INK, BLUE, RED, GREEN, ORANGE = "#333333", "#3b6ea5", "#c44e52", "#3f9b56", "#d18b2c"
LINE: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linewidth": 1.8}  # of measured points


def panels(
    count: int, width: float, height: float, grid: bool = True, rows: int = 1, **options: Any
) -> tuple[Figure, Sequence[Axes]]:
    """A matplotlib figure of panels, `count` side by side in each row, without a frame above and on the right, on a light grid.

    Args:
        width, height: of the whole figure, in inches.
        options: of `Figure.subplots`, such as `sharey`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, count, squeeze=False, **options).ravel()
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        if grid:
            panel.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def save_figure(figure: Figure, path: str | Path, **options: Any) -> Path:
    """Writes a matplotlib figure at 150 dots per inch, and returns its path; the folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, **options)
    return path


def save_image(image: Image.Image, path: str | Path) -> Path:
    """Writes an image as PNG, and returns its path; the folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG")
    return path


def enlargement(height: int, width: int, side: float = SIDE) -> int:
    """The whole factor, at least 1, by which images of a size are enlarged so that their longer side is about `side`."""
    return max(1, round(side / max(height, width)))


def to_images(pixel_values: torch.Tensor, factor: int = 1) -> list[Image.Image]:
    """Images (B, C, H, W), clamped to [-1, 1], as B RGB images enlarged by a whole factor; RGBA is shown on white.

    Raises:
        ValueError: if C is not 1, 3 or 4.
    """
    check_channels(pixel_values.shape[1])
    levels = ((pixel_values.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if levels.shape[1] == 1:
        levels = levels.expand(-1, 3, -1, -1)
    images = [Image.fromarray(x) for x in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
    if levels.shape[1] == 4:
        images = [Image.alpha_composite(Image.new("RGBA", x.size, "white"), x).convert("RGB") for x in images]
    return [x.resize((x.width * factor, x.height * factor), Image.Resampling.NEAREST) for x in images]


def check_channels(count: int):
    """Raises a ValueError unless images of so many channels can be drawn."""
    if count not in (1, 3, 4):
        raise ValueError(f"only images of 1, 3 or 4 channels can be drawn, got {count}")


def image_columns(columns: dict[str, torch.Tensor], labels: list[str] | None = None, heading: str = "") -> Image.Image:
    """A sheet with a column of images (B, C, H, W), all of one size, below each title; images of a row stand side by side."""
    height, width = next(iter(columns.values())).shape[-2:]
    drawn = [to_images(column, enlargement(height, width)) for column in columns.values()]
    return image_sheet([list(row) for row in zip(*drawn, strict=True)], GAP, columns, labels, heading)


def image_sheet(
    rows: list[list[Image.Image]],
    gap: int,
    titles: Iterable[str] = (),
    labels: list[str] | None = None,
    heading: str = "",
    captions: list[list[str]] | None = None,
) -> Image.Image:
    """Images of one size on white, with a title above each column, a label beside each row and a caption below each image.

    Args:
        heading: stands above all; a sheet that is too narrow for it is widened.
        captions: as many as images, row by row.
    """
    width, height = rows[0][0].size if rows else (SIDE, 0)
    font, small = (ImageFont.truetype(_font(), size) for size in (18, 12))
    left = 2 * gap + (round(max(map(font.getlength, labels), default=0)) + 2 * gap if labels else 0)
    titles = list(titles)
    head = 22 if heading else 0
    top = 2 * gap + head + (26 if titles else 0)
    pitch = height + gap + (14 if captions else 0)
    num_columns = max(len(rows[0]) if rows else 0, len(titles))
    wide = left + num_columns * (width + gap) + gap
    wide = max(wide, round(small.getlength(heading)) + 4 * gap) if heading else wide
    sheet = Image.new("RGB", (wide, top + len(rows) * pitch + gap), "white")
    draw = ImageDraw.Draw(sheet)
    if heading:
        draw.text((2 * gap, gap + head / 2), heading, INK, small, anchor="lm")
    for j, title in enumerate(titles):
        draw.text((left + j * (width + gap) + width / 2, (top + head) / 2 + 2), title, INK, font, anchor="mm")
    for i, row in enumerate(rows):
        y = top + i * pitch
        if labels:
            draw.text((left - 2 * gap, y + height / 2), labels[i], INK, font, anchor="rm")
        for j, image in enumerate(row):
            x = left + j * (width + gap)
            sheet.paste(image, (x, y))
            if captions:
                draw.text((x + width / 2, y + height + 8), captions[i][j], INK, small, anchor="mm")
    return sheet


@cache
def _font() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
