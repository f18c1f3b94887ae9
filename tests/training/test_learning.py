"""Held-out images, the references beside their loss, and what a run leaves of them."""

import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import train_ldae
from ldae.training import learning
from ldae.training.clock import CLOCKS
from ldae.training.learning import LinearDenoiser, effective_rank, hold_out, what_is_learned
from moments_ldae import PatchMoments
from tokenizers_ldae import patchify

TINY = (
    "--image_size=16 --patch_size=4 --hidden_size=32 --num_hidden_layers=1 --num_attention_heads=2 --latent_dim=4 --no_flip "
    "--per_device_batch_size=4 --max_steps=20 --checkpointing_steps=5 --base_learning_rate=0.1 --report_to=none --no_probe"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 smooth random images without labels."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((20, 16), Image.Resampling.BICUBIC).save(root / f"{i:02d}.png")
    return root


def train(folder: Path, output: Path, *options: str) -> Path:
    return train_ldae.main(["--data", str(folder), "--output_dir", str(output), *TINY.split(), *options])


def points(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "held_out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (40, 0.01, 8),
        (2000, 0.01, 20),
        (2000, 0.5, 1000),
        (200_000, 0.01, 1000),
        (22, 0.01, 4),
        (4, 0.01, 0),
        (4, 0.5, 2),
        (40, 0, 0),
    ],
)
def test_held_out_share(count, share, expected):
    examples = datasets.Dataset.from_dict({"n": range(count)})
    trained, held, _ = hold_out(examples, None, share, seed=3)
    ours, theirs = trained["n"][:], [] if held is None else held["n"][:]
    assert len(theirs) == expected
    assert sorted(ours + theirs) == list(range(count))
    again = hold_out(examples, None, share, seed=3)[1]
    assert theirs == ([] if again is None else again["n"][:])
    if 0 < expected < 1000:
        assert theirs != hold_out(examples, None, share, seed=4)[1]["n"][:]


def test_a_validation_split_is_held_out_and_all_of_the_training_split_is_trained_on():
    examples, validation = (datasets.Dataset.from_dict({"n": range(n)}) for n in (50, 1500))
    trained, held, _ = hold_out(examples, validation, 0.01, seed=0)
    assert trained is examples
    assert len(held) == 1000
    assert hold_out(examples, validation, 0, seed=0)[:2] == (examples, None)


@pytest.mark.parametrize(
    ("tokenizer", "prediction"),
    [  # all pairs but patch_ae and image, which the configuration refuses
        *itertools.product(["pca", "pixels"], ["image", "latent", "noise"]),
        *itertools.product(["patch_ae"], ["latent", "noise"]),
    ],
)
@pytest.mark.parametrize("schedule", ["linear_sigma", "linear_gamma2"])
def test_linear_denoiser_is_the_least_squares_solution(tiny_model, images, tokenizer, prediction, schedule):
    """Solved naively for one t at a time: the normal equations of all components, written out in float64."""
    fields = {"latent_dim": 48} if tokenizer == "pixels" else {}
    model = tiny_model(tokenizer_type=tokenizer, prediction=prediction, noise_schedule=schedule, **fields)
    config, predicts_noise = model.config, prediction == "noise"
    x = images(config, count=64) * torch.linspace(0.2, 1, 12)  # patches of several variances
    z = model.ldae.tokenizer.encode(x)
    y = model.target(x, z, z)
    moments = PatchMoments(z.shape[-1] + (0 if predicts_noise else y.shape[-1]))
    moments.update((z if predicts_noise else torch.cat([z, y], dim=-1)).double())
    noise_schedule = model.noise_schedule
    found = LinearDenoiser(moments, noise_schedule.gamma, noise_schedule.sigma, config.latent_dim, predicts_noise)

    flat, clean = (v.reshape(-1, v.shape[-1]).double().numpy() for v in (z, y))
    noisy = torch.randn(3, z.shape[1], z.shape[2])
    for t in (1, 300, 999):
        gamma, sigma = (float(table[t]) for table in (noise_schedule.gamma, noise_schedule.sigma))
        design = np.cov(gamma * flat.T, bias=True) + sigma**2 * np.eye(flat.shape[1])
        both = sigma * np.eye(flat.shape[1])  # E[eps z_t']
        mean = np.zeros(flat.shape[1])
        if not predicts_noise:
            mean = clean.mean(axis=0)
            both = gamma * (clean - mean).T @ (flat - flat.mean(axis=0)) / len(flat)
        weights = np.linalg.lstsq(design, both.T, rcond=None)[0].T
        expected = mean + (noisy.double().numpy() - gamma * flat.mean(axis=0)) @ weights.T
        np.testing.assert_allclose(found(noisy, torch.full((3,), t)), expected, rtol=1e-6, atol=1e-8)


def test_no_linear_map_of_a_patch_has_a_lower_loss(tiny_model, images):
    """Also in the loss of equation 4, whose weights differ by component: any step away from it costs."""
    model = tiny_model()
    x = images(model.config, count=400) * torch.linspace(0.1, 1, 12)
    z = model.ldae.tokenizer.encode(x)
    moments = PatchMoments(z.shape[-1] + model.config.patch_dim)
    moments.update(torch.cat([z, patchify(x, model.config.patch_hw)], dim=-1))
    denoiser = LinearDenoiser(moments, model.noise_schedule.gamma, model.noise_schedule.sigma, z.shape[-1], False)
    t = torch.full((len(x),), 400)
    noisy = model.noise_schedule.add_noise(z, torch.randn_like(z), t)

    def loss() -> float:
        return model.loss(patchify(x, model.config.patch_hw), denoiser(noisy, t).float(), t).item()

    best, gain = loss(), denoiser.gain
    for factor in (0.9, 1.1):
        denoiser.gain = factor * gain
        assert loss() > best


def test_effective_rank():
    basis = torch.linalg.qr(torch.randn(200, 5)).Q
    basis -= basis.mean(dim=0)
    orthonormal = torch.linalg.qr(basis).Q  # orthogonal to the ones: centring leaves it
    assert effective_rank(orthonormal) == pytest.approx(5)
    assert effective_rank(orthonormal * torch.tensor([1, 0, 0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.ones(10, 4)) == 0


def test_what_is_learned():
    result = {"images": 8, "loss_of_mean": 1.0, "loss_of_linear": 0.5}
    for loss, words in ((0.4, "what patches say of each other"), (0.6, "less than single"), (1.1, "learned nothing")):
        assert words in what_is_learned({**result, "loss": loss})


def test_a_short_run_spends_little_time_on_being_measured(folder, tmp_path, monkeypatch):
    """Ten images are trained on for each that is measured, on a clock that stands still meanwhile; so too after a resume."""
    output = train(folder, tmp_path / "run")
    assert [point["step"] for point in points(output)] == [0, 20]
    monkeypatch.setattr(learning, "FEWEST_BETWEEN", 5)
    ticks, measure = itertools.count(), learning.LearningCurve.measure  # a second for every look at the clock
    monkeypatch.setitem(CLOCKS, "processor", lambda: float(next(ticks)))

    def slow_measure(self, model, step):
        for _ in range(1000):
            next(ticks)
        measure(self, model, step)

    monkeypatch.setattr(learning.LearningCurve, "measure", slow_measure)
    output = train(folder, tmp_path / "clocked", "--clock=processor", "--image_steps=0")
    assert [point["step"] for point in points(output)] == [0, 10, 20]
    seconds = json.loads((output / "results/train.json").read_text())["seconds"]
    assert seconds < 20 + 10  # a look for each step, and those around the measurements
    for path in (output / "checkpoints").glob("*20"):
        path.rename(tmp_path / path.name)  # as if it had been killed after step 15
    train(folder, output, "--clock=processor", "--image_steps=0", "--resume")
    assert [point["step"] for point in points(output)] == [0, 10, 20]


def test_the_linear_denoiser_sees_no_more_patches_than_the_network(folder, tmp_path):
    def references(share: float) -> tuple[float, float]:
        output = train(folder, tmp_path / f"{share}", "--keep_ratio", str(share), "--max_steps=1")
        held = json.loads((output / "results/train.json").read_text())["held_out"]
        return held["loss_of_mean"], held["loss_of_linear"]

    mean, linear = references(1)
    for share in (0.5, 0.25):  # about that share of what patches tell
        found, partly = references(share)
        assert found == pytest.approx(mean)
        assert (mean - partly) / (mean - linear) == pytest.approx(share, abs=0.1)


def test_a_run_without_labels_shows_whether_it_learns(folder, tmp_path, capsys, monkeypatch):
    """What is held out is not trained on; the untrained network, whose output is zero, loses what the mean patch does."""
    monkeypatch.setattr(learning, "FEWEST_BETWEEN", 1)
    output = train(folder, tmp_path / "run", "--image_steps", "10")
    said = capsys.readouterr().out
    assert "8 images of the training split are not trained on; loss.png" in said
    assert "32 images are few to learn from: try an encoder from elsewhere first, or --init_from model_cards/" in said
    end = said[said.index("Trained on ") :].replace(str(output), "RUN").replace(str(folder), "DATA").splitlines()
    assert [line.split()[0] for line in end] == ["Trained", "Loss", "Without", "So", "Model:", "In", "Features:"]
    assert end[1].startswith("Loss on 8 images that were not trained on: ")
    assert max(map(len, end)) <= 110
    result = json.loads((output / "results/train.json").read_text())
    held = result["held_out"]
    assert (result["data"]["num_images"], held["images"], held["origin"]) == (32, 8, "of the training split")
    assert [point["step"] for point in points(output)] == list(range(0, 21, 2))
    first, last = points(output)[0], points(output)[-1]
    assert first["loss"] == pytest.approx(held["loss_of_mean"], rel=5e-2)
    assert held["loss"] == last["loss"] < 0.95 * first["loss"]
    assert held["loss_of_linear"] < held["loss_of_mean"]
    assert 1 < held["effective_rank"] <= held["largest_rank"] == 7
    assert Image.open(output / "loss.png").size == (1350, 540)
    card = (output / "README.md").read_text()
    assert "](loss.png)" in card
    assert f"| Held-out loss | {held['loss']:.4f} on 8 images" in card.replace("  ", " ")


def test_an_unreadable_held_out_image_is_named_or_stops_the_run(folder, tmp_path, capsys):
    data = tmp_path / "data"
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
        for path in list(folder.iterdir())[:10]:
            (data / split / path.name).symlink_to(path)
    (data / "val/broken.png").write_bytes(b"no image")
    output = train(data, tmp_path / "run")
    assert capsys.readouterr().out.count(f"Skipping {data}/val/broken.png: ") == 1
    result = json.loads((output / "results/train.json").read_text())
    assert [name.split(":")[0] for name in result["data"]["bad_images"]] == ["data/val/broken.png"]
    assert result["held_out"]["images"] == 10
    with pytest.raises(ValueError, match=r"unreadable image \(--on_bad_image error\): .*val/broken.png"):
        train(data, tmp_path / "strict", "--on_bad_image", "error")


def test_measuring_changes_no_training_and_is_resumed_bit_for_bit(folder, tmp_path, monkeypatch):
    """Where there is a validation split, all images are trained on with and without."""
    monkeypatch.setattr(learning, "FEWEST_BETWEEN", 0)
    data = tmp_path / "data"
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
        for path in folder.iterdir():
            (data / split / path.name).symlink_to(path)
    whole = train(data, tmp_path / "whole")
    without = train(data, tmp_path / "without", "--held_out", "0")
    assert (whole / "losses.jsonl").read_bytes().count(b"\n") == 20
    losses = [[json.loads(line)["loss"] for line in (run / "losses.jsonl").open()] for run in (whole, without)]
    assert losses[0] == losses[1]
    assert not (without / "held_out.jsonl").exists()
    assert json.loads((without / "results/train.json").read_text())["held_out"] is None
    for path in (whole / "checkpoints").glob("*20"):
        path.rename(tmp_path / path.name)  # as if it had been killed after step 15
    before = points(whole)
    train(data, whole, "--resume")
    assert points(whole) == before
