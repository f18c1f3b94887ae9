"""The ablation's drawings show the figures that they are given."""

import copy

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from experiments.ablation import figures as plots
from ldae.report.figures import filters


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture
def model(tiny_model):
    return tiny_model(image_size=16)


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are written instead of files."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    return drawn


def test_tokenizers_filters_stand_side_by_side(tmp_path, model):
    fewer = copy.deepcopy(model.ldae.tokenizer)
    fewer.V = fewer.V[:4]
    tokenizers = {"all": model.ldae.tokenizer, "fewer": fewer}
    sheet = read(plots.compared_filters(tokenizers, (4, 4), 3, tmp_path / "both.png"))
    alone = read(filters(fewer, (4, 4), 3, tmp_path / "alone.png"))
    height, width = alone.shape[:2]  # both show as many as the one with fewer has
    assert sheet.shape == (16 + 26 + height + 16, 16 + 2 * (width + 8) + 8, 3)
    for column in range(2):
        x = 16 + column * (width + 8)
        np.testing.assert_array_equal(sheet[42 : 42 + height, x : x + width], alone)


def test_noise_spaces_are_what_each_model_sees(tmp_path, model):
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    sheet = read(plots.noise_spaces({"latent": model}, pixel_values, tmp_path / "noise.png"))
    generator = torch.Generator().manual_seed(0)
    noisy = model(
        pixel_values, timesteps=torch.tensor([500, 500]), generator=generator, return_reconstruction=True
    ).noisy_pixel_values
    for column, images in enumerate((pixel_values, noisy)):
        for row in range(2):
            y, x = 42 + row * 200, 16 + column * 200
            shown = sheet[y : y + 192 : 12, x : x + 192 : 12] / 127.5 - 1
            expected = images[row].detach().clamp(-1, 1).permute(1, 2, 0)
            np.testing.assert_allclose(shown, expected, atol=0.51 / 127.5)


def test_schedules_are_drawn_by_their_formulas(tmp_path, figures):
    plots.schedules(tmp_path / "schedules.png")
    kept, ratio = ({line.get_label(): line.get_ydata() for line in axes.lines} for axes in figures[0].axes)
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(kept["DDPM: β linear"], np.cumprod(1 - betas), rtol=1e-4)
    np.testing.assert_allclose(kept["γ² linear"], np.arange(999, -1, -1) / 1000, atol=1e-12)
    np.testing.assert_allclose(ratio["γ = 1, σ linear to √2"], np.linspace(0, 2**0.5, 1000))
    np.testing.assert_allclose(ratio["γ = 1, σ = √(1/3)"], 3**-0.5)


def test_dimensions_and_rungs_show_their_figures(tmp_path, figures):
    here = {"PCA": {8: (41.0, 1.0), 32: (43.0, 0.5)}, "pixels": {12: (40.0, 1.0)}, "not run": {}}
    plots.dimensions({"PCA": {8: 56.0, 32: 65.1}}, here, tmp_path / "dimensions.png")
    paper, ours = figures[0].axes
    (line,) = paper.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([8, 32], [56.0, 65.1])
    labels = [text.get_text() for text in ours.get_legend().get_texts()]
    assert labels == ["PCA", "pixels"]
    assert ours.containers[0].lines[0].get_color() == line.get_color()  # a tokenizer has one colour in both
    plots.rungs([("a", 60.0, (50.0, 1.0), 30.0), ("b", None, (55.0, 1.0), None)], tmp_path / "rungs.png")
    heights = [
        [bar.get_height() for bar in bars]
        for bars in figures[1].axes[0].containers
        if len(bars) and hasattr(bars[0], "get_height")
    ]
    assert heights == [[60.0], [50.0, 55.0]]
    (floor,) = [lines for lines in figures[1].axes[0].collections if lines.get_label() == "baseline"]
    assert [segment[:, 1].tolist() for segment in floor.get_segments()] == [[30.0, 30.0]]
    with pytest.raises(ValueError, match="there is no rung to draw"):
        plots.rungs([], tmp_path / "rungs.png")
