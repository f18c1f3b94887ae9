"""Plots: files of the expected size, with the expected colours in the expected places."""

from itertools import chain

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from ldae import LDAEConfig, LDAEForPreTraining
from ldae.report import figures as plots
from ldae.report.drawing import image_columns


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def colours(*values, channels: int = 3, size: tuple[int, int] = (8, 6)) -> torch.Tensor:
    """One image of each value, constant."""
    return torch.stack([torch.full((channels, *size), float(value)) for value in values])


@pytest.fixture(scope="module")
def model() -> LDAEForPreTraining:
    torch.manual_seed(0)
    config = LDAEConfig(image_size=16, patch_size=4, latent_dim=8, hidden_size=16, num_hidden_layers=1,
                        num_attention_heads=2)  # fmt: skip
    model = LDAEForPreTraining(config)
    model.ldae.tokenizer.fit([torch.rand(20, 3, 16, 16).cumsum(3) / 8 - 1], config)
    return model


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_columns_show_every_image_in_its_place(channels):
    clean = colours(-1, 1, channels=channels)
    if channels == 4:
        clean[:, 3] = 1  # opaque
    noisy, denoised = clean * 0.5, clean * 2
    if channels == 4:
        noisy[:, 3] = 1
    grid = np.asarray(image_columns({"clean": clean, "noisy": noisy, "denoised": denoised})).astype(int)
    height, width = 8 * 24, 6 * 24  # enlarged to 192 pixels
    assert grid.shape == (16 + 26 + 2 * (height + 8) + 8, 16 + 3 * (width + 8) + 8, 3)
    top, left = 16 + 26, 16
    expected = [[0, 64, 0], [255, 191, 255]]  # clamped on the right
    for i, row in enumerate(expected):
        for j, value in enumerate(row):
            y, x = top + i * (height + 8), left + j * (width + 8)
            assert np.abs(grid[y : y + height, x : x + width] - value).max() <= 1
    assert (grid[top + height : top + height + 8] == 255).all()  # white between the rows
    assert (grid[:top] < 128).any()  # titles


def test_columns_repeat_pixels_exactly_and_have_labels():
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    plain, grid = (np.asarray(image_columns({"x": x}, labels)) for labels in (None, ["σ = 0.50"]))
    added = grid.shape[1] - plain.shape[1]
    assert added > 0
    assert (grid[42:, :added] < 128).any()  # the label
    levels = ((x[0].permute(1, 2, 0) + 1) * 127.5).round().numpy().repeat(3, 0).repeat(3, 1)
    assert (grid[42 : 42 + 192, 16 + added : 16 + added + 192] == levels).all()


def test_large_images_keep_their_size():
    assert image_columns({"x": colours(0, size=(400, 500))}).width == 16 + (500 + 8) + 8


def test_transparent_images_are_shown_on_white():
    sheet = image_columns({"x": colours(-1, channels=4)})  # black, wholly transparent
    assert (np.asarray(sheet)[42:] == 255).all()


def test_what_cannot_be_drawn_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r"1, 3 or 4 channels .*got 2"):
        image_columns({"x": colours(0, channels=2)})
    with pytest.raises(ValueError, match="not fitted"):
        plots.spectrum(LDAEForPreTraining(model.config).ldae.tokenizer, tmp_path / "spectrum.png")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def predicted(model, monkeypatch):
    """A list of the (noisy latents, timesteps, prediction) of what the model predicts from now on."""
    seen, predict = [], model.predict

    def record(latents, timesteps, **kwargs):
        prediction = predict(latents, timesteps, **kwargs)
        seen.append((latents, timesteps, prediction))
        return prediction

    monkeypatch.setattr(model, "predict", record)
    return seen


@pytest.mark.parametrize("training", [True, False])
def test_save_denoising_keeps_the_mode_and_repeats_itself(tmp_path, model, predicted, training):
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    model.train(training)
    state = torch.get_rng_state()
    first, again = (plots.save_denoising(model, x, tmp_path / f"{i}.png") for i in range(2))
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert [timesteps.tolist() for _, timesteps, _ in predicted] == [[332, 665, 999]] * 2
    assert not predicted[0][2].requires_grad
    assert first.read_bytes() == again.read_bytes()


def test_filters_are_symmetric_about_grey(tmp_path, model):
    tokenizer = model.ldae.tokenizer
    sheet = read(plots.filters(tokenizer, (4, 4), 3, tmp_path / "filters.png"))
    side = 4 * 16  # each enlarged to 64 pixels, 3 x 3 places for 8 components
    top, pitch = 8 + 22, side + 4 + 14  # below the heading; with captions
    assert sheet.shape[0] == top + 3 * pitch + 4
    assert (sheet[:22] < 128).any()
    for i in range(8):
        row, column = divmod(i, 3)
        y, x = top + row * pitch, 8 + column * (side + 4)
        assert (sheet[y + side : y + side + 16, x : x + side] < 128).any()  # its number and scale
        shown = sheet[y : y + side : 16, x : x + side : 16] - 127.5
        component = tokenizer.V[i].reshape(3, 4, 4).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(shown, 127.5 * component / np.abs(component).max(), atol=0.51)
    assert plots.filter_sheet(tokenizer, (4, 4), 3, 1).height == top + pitch + 4


def test_filters_are_numbered_with_the_weight_that_white_is(model, monkeypatch):
    said, V = [], model.ldae.tokenizer.V
    monkeypatch.setattr(plots, "image_sheet", lambda *sheet: said.extend(chain(*sheet[5])))
    plots.filter_sheet(model.ldae.tokenizer, (4, 4), 3, 8)
    assert said == [f"{i + 1}  ±{V[i].abs().max():.2f}" for i in range(8)]


def test_noise_levels_show_one_image_under_one_noise(tmp_path, model, predicted):
    image = torch.rand(3, 16, 16) * 2 - 1
    sheet = read(plots.noise_levels(model, image, tmp_path / "levels.png", heading="step 7"))
    ((latents, timesteps, _),) = predicted
    assert timesteps.tolist() == [124, 249, 374, 499, 624, 749, 874, 999]
    sigma = model.noise_schedule.sigma[timesteps]
    noise = (latents - model.ldae.tokenizer.encode(image[None])) / sigma[:, None, None]
    torch.testing.assert_close(noise, noise[:1].expand_as(noise), atol=1e-3, rtol=1e-3)
    side = 16 * 6
    assert sheet.shape[0] == 16 + 22 + 26 + 2 * (side + 8) + 8
    assert (sheet[8:30] < 128).any()  # the heading
    below_clean = sheet[-side - 8 : -8, -8 * (side + 8) - side - 8 : -8 * (side + 8) - 8]
    assert (below_clean == 255).all()  # of the clean image nothing is denoised


def test_learning_curve_shows_the_losses_and_the_references(tmp_path, figures):
    trained = [{"step": i, "loss": 1 / i} for i in range(1, 1201)]
    held_out = [{"step": s, "loss": 2 / (1 + s), "effective_rank": 3.0, "largest_rank": 7} for s in (0, 600, 1200)]
    plots.learning_curve(trained, held_out, {"mean": 2.0, "linear": 0.5}, tmp_path / "loss.png")
    losses, rank = figures[0].axes
    training, held, mean, linear = losses.lines
    assert len(training.get_xdata()) == 500
    assert np.mean(training.get_xdata()[:2]) == pytest.approx(3.5)  # of parts of three steps and of two
    assert (list(held.get_xdata()), list(held.get_ydata())) == ([0, 600, 1200], [2, 2 / 601, 2 / 1201])
    assert (mean.get_ydata()[0], linear.get_ydata()[0]) == (2.0, 0.5)
    assert len(losses.get_legend().get_texts()) == 4
    assert losses.yaxis.get_major_formatter()(0.06) == "0.06"  # and no power of ten
    assert rank.get_ylabel() == "effective rank, of 7 at most"


@pytest.mark.parametrize("fall", [0.97, 0.7, 0.3, 0.01])
def test_learning_curve_has_a_few_numbers_however_far_the_loss_has_fallen(fall, tmp_path, figures):
    trained = [{"step": 1, "loss": 0.1307}, {"step": 2, "loss": 0.1307 * fall}]
    held_out = [{"step": 2, "loss": 0.1307 * fall, "effective_rank": 3.0, "largest_rank": 7}]
    plots.learning_curve(trained, held_out, {"mean": 0.1307, "linear": 0.1307 * fall}, tmp_path / "loss.png")
    axis, (low, high) = figures[0].axes[0].yaxis, figures[0].axes[0].get_ylim()
    shown = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
    assert 3 <= len(shown) <= 10
    assert all(len(axis.get_major_formatter()(tick)) <= 6 for tick in shown)


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are written instead of files."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    return drawn


def test_spectrum_is_a_image_with_the_curve_and_the_mark(tmp_path, model):
    figure = read(plots.spectrum(model.ldae.tokenizer, tmp_path / "spectrum.png"))
    assert figure.shape == (510, 1350, 3)
    for colour in (plots.BLUE, plots.RED):
        exact = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (figure == exact).all(axis=-1).any()


def test_confusion_matrix_shows_percent_of_the_rows(tmp_path, figures):
    labels, predictions = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 0, 2])
    path = plots.confusion_matrix(predictions, labels, ["a", "b", "c", "unseen"], tmp_path / "new" / "matrix.png")
    assert path == tmp_path / "new" / "matrix.png"
    axes = figures[0].axes[0]
    (image,) = axes.get_images()
    third = 100 / 3
    expected = [[2 * third, third, 0, 0], [0, 100, 0, 0], [50, 0, 50, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(image.get_array(), expected)
    assert [text.get_text() for text in axes.texts] == ["67", "33", "100", "50", "50"]
    assert [text.get_position() for text in axes.texts] == [(0, 0), (1, 0), (1, 1), (0, 2), (2, 2)]  # column, row
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b", "c", "unseen"]
    for count, numbered, named in ((50, True, True), (51, False, True), (101, False, False)):
        classes = torch.arange(count)
        plots.confusion_matrix(classes, classes, list(map(str, range(count))), path)
        axes = figures[-1].axes[0]
        assert (bool(axes.texts), bool(axes.get_yticklabels())) == (numbered, named)


def test_confusion_matrix_is_a_image(tmp_path):
    sheet = read(plots.confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 1]), ["a", "b"], tmp_path / "m.png"))
    assert ((sheet[..., 2] > 90) & (sheet[..., 0] < 20)).any()  # the dark blue of 100 %


def test_class_names_are_no_formulas(tmp_path):
    two = torch.tensor([0, 1])
    assert plots.confusion_matrix(two, two, [r"$\frac{$", "two\nlines"], tmp_path / "m.png").is_file()


def test_neighbours_are_framed_by_class(tmp_path):
    queries, nearest = colours(-1, 1), torch.stack([colours(-0.5, 0.5), colours(0, 2)])
    same_class = torch.tensor([[True, False], [False, True]])
    sheet = read(plots.neighbours(queries, nearest, same_class, tmp_path / "new" / "neighbours.png"))
    height, width, frame = 8 * 12, 6 * 12, 5  # enlarged to 96 pixels
    outer = height + 2 * frame, width + 2 * frame
    top = 16 + 22 + 26
    assert sheet.shape[0] == top + 2 * (outer[0] + 8) + 8
    exact = {x: [int(x[i : i + 2], 16) for i in (1, 3, 5)] for x in (plots.GREEN, plots.RED)}
    frames = [["white", plots.GREEN, plots.RED], ["white", plots.RED, plots.GREEN]]
    levels = [[0, 64, 191], [255, 128, 255]]
    for i in range(2):
        for j in range(3):
            y, x = top + i * (outer[0] + 8), 16 + j * (outer[1] + 8)
            cell = sheet[y : y + outer[0], x : x + outer[1]]
            assert np.abs(cell[frame:-frame, frame:-frame] - levels[i][j]).max() <= 1
            colour = exact.get(frames[i][j], [255] * 3)
            for edge in (cell[:frame], cell[-frame:], cell[:, :frame], cell[:, -frame:]):
                assert (edge == colour).all()


def test_sweep_shows_its_figures(tmp_path, figures):
    """A line for clean and one for noisy images by t, and the untrained network's accuracy dashed in both panels."""

    def measured(accuracy):
        return {"protocols": {"knn": {"accuracy": accuracy, "standard_error": 0.5}}}

    blocks = (("encoder", 1, 40.0), ("encoder", 2, 45.0), ("decoder", 1, 42.0))
    result = {
        "depth": [{"part": part, "block": block, **measured(accuracy)} for part, block, accuracy in blocks],
        "timesteps": [
            {"t": t, "noisy": noisy, **measured(30.0 + t - noisy)} for t in (0, 5) for noisy in (True, False)
        ],
        "floor": {"knn": {"accuracy": 20.0}},
    }
    plots.sweep(result, tmp_path / "sweep.png")
    depth, timesteps = figures[0].axes
    lines = [
        [(list(bars.lines[0].get_xdata()), list(bars.lines[0].get_ydata())) for bars in axes.containers]
        for axes in (depth, timesteps)
    ]
    assert lines == [[([1, 2, 3], [40.0, 45.0, 42.0])], [([0, 5], [30.0, 35.0]), ([0, 5], [29.0, 34.0])]]
    assert [tick.get_text() for tick in depth.get_xticklabels()] == ["1", "2", "1"]
    assert [text.get_text() for text in depth.texts] == ["encoder", "decoder"]
    for axes in (depth, timesteps):
        assert [20.0, 20.0] in [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "--"]
