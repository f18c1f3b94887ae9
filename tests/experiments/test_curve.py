"""Accuracy against time: points of several studies, with the error of images and seeds."""

import numpy as np
import pytest
from test_paired import LDAE, MAE, run

from experiments.comparison.curve import curves, draw, main


@pytest.fixture
def studies(tmp_path):
    """Two studies of eight images, of 15 and of 60 minutes."""
    short, long = tmp_path / "short", tmp_path / "long"
    for seed, right in enumerate(([0, 1], [0, 1, 2, 3])):
        run(short / f"mae-seed{seed}", MAE, right)
    run(short / "ours-seed0", LDAE, [0, 1, 2])
    run(long / "mae-seed0", MAE, [0, 1, 2, 3, 4], minutes=60.0)
    run(long / "ours-seed0", LDAE, [0, 1, 2, 3, 4, 5], minutes=60.0)
    run(long / "other-seed0", LDAE, [0], minutes=60.0)
    return [str(long), str(short)]


def test_points_stand_in_the_order_of_time_with_the_errors_of_images_and_seeds(studies):
    lines = curves(studies, ["mae", "ours"])
    assert set(lines) == {("tiny", "k-NN")}
    found = lines["tiny", "k-NN"]
    assert {name: [point[:2] for point in points] for name, points in found.items()} == {
        "mae": [(15.0, 37.5), (60.0, 62.5)],
        "ours": [(15.0, 37.5), (60.0, 75.0)],
    }
    seeds = np.var([25.0, 50.0], ddof=1)
    images = np.var([100.0, 100, 50, 50, 0, 0, 0, 0]) / 8
    assert found["mae"][0][2] == pytest.approx((images + seeds / 2) ** 0.5)
    assert found["ours"][1][2] == pytest.approx((100**2 * 0.75 * 0.25 / 8 + seeds) ** 0.5)


def test_a_picture_is_drawn(studies, tmp_path, capsys):
    main(["--studies", *studies, "--methods", "mae", "ours", "--output", str(tmp_path / "curve.png")])
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    assert "curve.png" in capsys.readouterr().out


def test_what_cannot_be_drawn_is_refused(studies, tmp_path):
    with pytest.raises(ValueError, match=r"--methods: '.*long' has none of dino, but mae, other, ours"):
        curves(studies, ["dino"])
    run(tmp_path / "epochs/mae-seed0", MAE, [0], minutes=None)
    with pytest.raises(ValueError, match=r"--methods: mae of '.*epochs' was not trained by --max_minutes"):
        curves([str(tmp_path / "epochs")], ["mae"])
    with pytest.raises(ValueError, match="none of them was trained for several times"):
        draw(curves(studies[:1], ["mae"]), ["mae"], tmp_path / "curve.png")
