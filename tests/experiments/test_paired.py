"""Methods beside one of them: means over seeds, and differences with the error of the same images and of the seeds."""

from pathlib import Path

import numpy as np
import pytest

from experiments.comparison.paired import main, table
from experiments.errors import paired_error, pooled_variance
from ldae.probes import pack
from ldae.report.results import save_result

ROOT = Path(__file__).parents[2]
MAE = {"model_type": "vit_mae", "architectures": ["ViTMAEBaseline"], "mask_ratio": 0.75, "decoder_num_hidden_layers": 4}
LDAE = {
    "model_type": "ldae", "tokenizer_type": "pca", "latent_dim": 16, "latent_scaling": "global", "decoder_num_hidden_layers": 2
}  # fmt: skip
LABELS = np.arange(8) % 3


def predicted(right):
    return pack(np.where(np.isin(np.arange(8), list(right)), LABELS, (LABELS + 1) % 3))


def run(folder, config, right, data="tiny", images_seen=2000, standardised=None, minutes=15.0):
    """A run that classifies these of eight images rightly."""
    arguments = {"base_learning_rate": 0.002, "max_minutes": minutes}
    train = {"kind": "train", "config": config, "images_seen": images_seen, "arguments": arguments}
    save_result(folder / "results/train.json", train, overwrite=True)
    figures = {"accuracy": 100 * len(right) / 8, "predictions": predicted(right)}
    if standardised is not None:
        figures |= {
            "accuracy_standardised": 100 * len(standardised) / 8,
            "predictions_standardised": predicted(standardised),
        }
    probe = {"kind": "probe", "data": {"name": data, "labels": pack(LABELS)}, "protocols": {"knn": figures}}
    save_result(folder / f"results/probe-{data}.json", probe)


def test_the_paired_error_of_two_runs_is_mcnemars():
    after, before = (np.random.default_rng(seed).random(500) < part for seed, part in ((0, 0.6), (1, 0.5)))
    gained = sum(a and not b for a, b in zip(after, before, strict=True))
    lost = sum(b and not a for a, b in zip(after, before, strict=True))
    expected = (gained + lost - (gained - lost) ** 2 / 500) ** 0.5 / 500
    assert paired_error(after.astype(float), before.astype(float)) == pytest.approx(100 * expected)
    assert paired_error(after.astype(float), after.astype(float)) == 0


def test_the_variance_between_seeds_is_pooled_over_methods():
    assert pooled_variance([[1.0, 3.0], [5.0], [2.0, 2.0, 5.0]]) == pytest.approx((2.0 + 6.0) / 3)
    assert pooled_variance([[1.0], []]) is None


def test_one_seed_has_the_error_of_its_images_alone(tmp_path):
    run(tmp_path / "mae-seed0", MAE, [0, 1, 2, 3])
    run(tmp_path / "ours-seed0", LDAE, [0, 1, 2, 4, 5, 6], images_seen=1500)
    # right for ours and wrong for mae: 4, 5, 6; the other way: 3
    error = 100 * (3 + 1 - (3 - 1) ** 2 / 8) ** 0.5 / 8
    about, tiny = table(tmp_path, "mae").split("\n\n")
    assert about.splitlines()[2:] == [
        "| `mae` | ViTMAE (transformers), 75 % masked | 4 | 2e-3 | 1 | 2 |",
        "| `ours` | l-DAE, d = 16, one global factor | 2 | 2e-3 | 1 | 2 |",
    ]
    assert tiny.splitlines()[2:] == ["| `mae` | 50.0 |", f"| `ours` | 75.0 (+25.0 ± {error:.1f}) |"]


def test_a_reference_that_was_not_measured_is_refused(tmp_path):
    run(tmp_path / "mae-seed0", MAE, [0])
    (tmp_path / "mae-seed0/results/probe-tiny.json").unlink()
    with pytest.raises(ValueError, match=r"mae of '.*' was measured by no protocol that classifies; probe it first"):
        table(tmp_path, "mae")


def test_a_method_without_a_decoder_has_a_dash(tmp_path):
    run(tmp_path / "mae-seed0", MAE, [0])
    run(tmp_path / "labels-seed0", {"model_type": "vit", "architectures": ["Supervised"]}, [0])
    assert "| `labels` | supervised ViT | – | 2e-3 | 1 | 2 |" in table(tmp_path, "mae")


def test_seeds_are_averaged_and_their_variance_is_part_of_the_error(tmp_path):
    for seed, right in enumerate(([0, 1, 2, 3], [0, 1], [0, 1, 2])):
        run(tmp_path / f"mae-seed{seed}", MAE, right)
    run(tmp_path / "ours-seed0", LDAE, [0, 1, 2, 4, 5, 6])
    each = [1 - 1, 1 - 1, 1 - 2 / 3, 0 - 1 / 3, 1, 1, 1, 0]  # by image, ours less the mean of mae's seeds
    images = np.var(each) / 8
    seeds = np.var([50.0, 25.0, 37.5], ddof=1) * (1 / 3 + 1)
    line = table(tmp_path, "mae").splitlines()[-1]
    assert line.endswith(f"| 75.0 (+37.5 ± {(1e4 * images + seeds) ** 0.5:.1f}) |")


def test_each_data_set_has_a_table_and_what_is_missing_a_dash(tmp_path):
    for data in ("tiny", "imagenette"):
        run(tmp_path / "mae-seed0", MAE, [0, 1], data)
    run(tmp_path / "ours-seed0", LDAE, [0, 1, 2], "imagenette")
    run(tmp_path / "unprobed-seed0", LDAE, [0])
    (tmp_path / "unprobed-seed0/results/probe-tiny.json").unlink()
    about, imagenette, tiny = (part.splitlines() for part in table(tmp_path, "mae").split("\n\n"))
    assert len(about) == len(imagenette) == len(tiny) == 4
    assert imagenette[0] == "| imagenette | k-NN |"
    assert tiny[3] == "| `ours` | – |"
    with pytest.raises(ValueError, match="--reference must be one of mae, ours, unprobed, got 'dino'"):
        table(tmp_path, "dino")


def test_the_vote_on_standardised_features_has_a_column(tmp_path):
    run(tmp_path / "mae-seed0", MAE, [0, 1, 2, 3], standardised=[0, 1])
    run(tmp_path / "ours-seed0", LDAE, [0, 1], standardised=[0, 1, 2, 3])
    lines = table(tmp_path, "mae").splitlines()
    assert lines[-4] == "| tiny | k-NN | k-NN, standardised |"
    error = 100 * (2 - 2**2 / 8) ** 0.5 / 8
    assert lines[-1] == f"| `ours` | 25.0 (-25.0 ± {error:.1f}) | 50.0 (+25.0 ± {error:.1f}) |"


def test_what_some_seeds_alone_were_measured_by_is_left_out(tmp_path):
    run(tmp_path / "mae-seed0", MAE, [0, 1])
    run(tmp_path / "mae-seed1", MAE, [0, 1], standardised=[0, 1, 2, 3])
    run(tmp_path / "ours-seed0", LDAE, [0, 1])
    run(tmp_path / "ours-seed1", LDAE, [0])
    (tmp_path / "ours-seed1/results/probe-tiny.json").unlink()
    _, tiny = table(tmp_path, "mae").split("\n\n")
    assert tiny.splitlines() == ["| tiny | k-NN |", "| --- | ---: |", "| `mae` | 25.0 |"]


def test_the_command_fills_the_marker_of_the_studys_name(tmp_path):
    run(tmp_path / "t/mae-seed0", MAE, [0, 1])
    page = tmp_path / "page.md"
    page.write_text("<!-- t -->\nold\n<!-- t -->\n")
    main([str(tmp_path / "t"), "--reference", "mae", "--write", str(page)])
    assert page.read_text() == f"<!-- t -->\n{table(tmp_path / 't', 'mae')}\n<!-- t -->\n"


def test_a_method_that_is_left_out_takes_the_deviation_of_its_seeds_with_it(tmp_path):
    run(tmp_path / "mae-seed0", MAE, [0, 1, 2, 3])
    run(tmp_path / "ours-seed0", LDAE, [0, 1, 2, 4, 5, 6])
    alone = table(tmp_path, "mae")
    for seed, right in enumerate(([0, 1, 2, 3], [])):
        run(tmp_path / f"failed-seed{seed}", MAE, right)
    assert table(tmp_path, "mae", without=["failed"]) == alone
    assert table(tmp_path, "mae").splitlines()[-1] != alone.splitlines()[-1]
    with pytest.raises(ValueError, match="--without must be some of failed, mae, ours, got 'dino'"):
        table(tmp_path, "mae", without=["dino"])
