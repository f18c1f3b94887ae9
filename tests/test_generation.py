"""Sampling against the formulas of DDIM and DDPM in float64, and the Fréchet distance against scipy's square root."""

import json
import math

import numpy as np
import pytest
import scipy
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import nn
from torch.testing import assert_close

from ldae import LDAEForPreTraining, LDAEModel
from ldae.data.images import ImageDataset
from ldae.data.order import evaluation_loader, to_pixel_values
from ldae.data.sources import load_examples
from ldae.features.encoders import Encoder
from ldae.generation import command, frechet
from ldae.generation.frechet import frechet_distance
from ldae.generation.pipeline import LDAEPipeline, denoise
from ldae.generation.schedulers import SCHEDULERS, make_scheduler, respace
from tokenizers_ldae import patchify

LATENT = {"input_space": "latent", "prediction": "noise", "noise_schedule": "ddpm"}
KINDS = [
    {"noise_schedule": schedule, "prediction": prediction}
    for schedule in ("ddpm", "linear_gamma2")
    for prediction in ("noise", "latent")
]


@pytest.fixture
def make(tiny_model):
    """make(**fields): a model of noisy latents."""

    def model(**fields):
        return tiny_model(LDAEForPreTraining, **{**LATENT, **fields})

    return model


def pipeline(model, name="ddim"):
    pipe = LDAEPipeline.from_model(model, name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(pipe, seed=0, **given):
    return pipe(**{"num_inference_steps": 7, "generator": seeded(seed), "output_type": "pt", **given}).images


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def levels_by_hand(count, steps):
    """`steps` of `count` levels, evenly spread, the noisiest first."""
    return [math.floor(count * i / steps + 0.5) - 1 for i in range(steps, 0, -1)]


def gamma2(model, level):
    return 1.0 if level < 0 else float(model.noise_schedule.tables()[0][level]) ** 2


def clean_and_noise(model, prediction, z, g2):
    """z_0 and epsilon that a prediction stands for at gamma^2 = g2."""
    if model.config.prediction == "noise":
        return (z - math.sqrt(1 - g2) * prediction) / math.sqrt(g2), prediction
    return prediction, (z - math.sqrt(g2) * prediction) / math.sqrt(1 - g2)


# ------------------------------------------------------------------------------------------------------------ schedulers


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("fields", KINDS)
def test_the_scheduler_has_the_models_noise(make, fields, name):
    model = make(**fields)
    scheduler = make_scheduler(model, name)
    table = model.noise_schedule.tables()[0].square()
    kept = 1000 if fields["noise_schedule"] == "ddpm" else 999  # not gamma = 0
    assert len(scheduler.alphas_cumprod) == scheduler.config.num_train_timesteps == kept
    assert_close(scheduler.alphas_cumprod.double(), table[:kept], rtol=1e-5, atol=0)
    assert scheduler.config.prediction_type == {"noise": "epsilon", "latent": "sample"}[fields["prediction"]]
    assert not scheduler.config.thresholding
    assert not scheduler.config.get("clip_sample", False)
    for steps in (1, 2, 13, 30, 50, kept):  # diffusers' own timesteps end in -1 for 13 and 30 of 999
        spaced, levels = respace(scheduler, steps)
        assert levels == levels_by_hand(kept, steps)
        assert spaced.timesteps.tolist() == list(range(steps))[::-1]
        rtol = 1e-2 if steps < 3 else 1e-4  # 1 - beta in float32, beta near 1
        assert_close(spaced.alphas_cumprod.double(), table[levels[::-1]], rtol=rtol, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("fields", KINDS)
def test_ddim_against_its_formula(make, fields, eta, monkeypatch):
    """Equations 12 and 16 of arXiv 2010.02502, with a number of steps that does not divide T."""
    model, seen = make(**fields), []
    predict = model.predict

    def network(z, t, classes):
        seen.append((z, int(t)))
        return predict(z, t, classes)

    monkeypatch.setattr(model, "predict", network)
    pixels = sample(pipeline(model), eta=eta, batch_size=2)
    generator = seeded()
    z = torch.randn(2, 6, 8, generator=generator).double()
    levels = levels_by_hand(999 if fields["noise_schedule"] == "linear_gamma2" else 1000, 7)
    assert [t for _, t in seen] == levels
    for (shown, level), before in zip(seen, [*levels[1:], -1], strict=True):
        assert_close(shown.double(), z, rtol=1e-3, atol=1e-3)
        g2, target = gamma2(model, level), gamma2(model, before)
        with torch.no_grad():
            output = predict(shown, torch.tensor([level])).double()
        clean, noise = clean_and_noise(model, output, z, g2)
        deviation = eta * math.sqrt((1 - target) / (1 - g2) * (1 - g2 / target))
        z = math.sqrt(target) * clean + math.sqrt(1 - target - deviation**2) * noise
        if eta:
            z = z + deviation * torch.randn(2, 6, 8, generator=generator).double()
    tokenizer = model.ldae.tokenizer
    expected = (z * tokenizer.scale) @ tokenizer.U.T.double() + tokenizer.mean
    assert_close(patchify(pixels, (4, 4)).double(), (expected / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fields", KINDS)
def test_ddpm_against_its_formula(make, fields):
    """Equation 7 of arXiv 2006.11239, and the variance beta_t (1 - gamma^2_{t-1}) / (1 - gamma^2_t)."""
    model, count = make(**fields), 4000
    scheduler, levels = respace(make_scheduler(model, "ddpm"), 7)
    z, output = randn(1, 6, 8), randn(1, 6, 8, seed=1)
    for i in (0, 3, 6):
        g2, target = gamma2(model, levels[i]), gamma2(model, [*levels, -1][i + 1])
        drawn = scheduler.step(
            output.expand(count, -1, -1), scheduler.timesteps[i], z.expand(count, -1, -1), generator=seeded()
        ).prev_sample
        clean, _ = clean_and_noise(model, output.double(), z.double(), g2)
        alpha = g2 / target
        mean = math.sqrt(target) * (1 - alpha) / (1 - g2) * clean + math.sqrt(alpha) * (1 - target) / (1 - g2) * z
        deviation = math.sqrt((1 - alpha) * (1 - target) / (1 - g2))
        assert_close(drawn.double().mean(0, keepdim=True), mean, rtol=1e-3, atol=1e-3 + 5 * deviation / count**0.5)
        assert_close(drawn.double().std(0).mean().item(), deviation, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("fields", KINDS)
def test_a_perfect_network_gives_the_image_back(make, images, fields, name, monkeypatch):
    model = make(**fields)
    tokenizer = model.ldae.tokenizer
    clean = tokenizer.encode(0.3 * images(model.config, 1))

    def perfect(z, t, classes):
        g2 = gamma2(model, int(t))
        return clean if fields["prediction"] == "latent" else (z - math.sqrt(g2) * clean) / math.sqrt(1 - g2)

    monkeypatch.setattr(model, "predict", perfect)
    expected = (tokenizer.decode(clean, model.config.image_hw) / 2 + 0.5).clamp(0, 1)
    for steps in (1, 7, 30):
        pixels = sample(pipeline(model, name), num_inference_steps=steps)
        assert_close(pixels, expected, rtol=0, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- pipeline


def test_predict_is_what_training_computes(make, images):
    model = make(prediction="latent", num_classes=3)
    drawn = {**model.sample_noise(2, generator=seeded()), "drop_label": torch.tensor([False, True])}
    pixel_values = images(model.config)
    output = model(pixel_values, labels=torch.tensor([2, 1]), **drawn)
    z = model.noise_schedule.add_noise(model.ldae.tokenizer.encode(pixel_values), drawn["noise"], drawn["timesteps"])
    latents = model.predict(z, drawn["timesteps"], torch.tensor([2, 3]))
    assert torch.equal(output.reconstruction, model.ldae.tokenizer.decode(latents, model.config.image_hw))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_images_depend_on_the_generator_alone(make, name):
    pipe = pipeline(make(noise_schedule="linear_gamma2"), name)
    pixels = sample(pipe, batch_size=3)
    assert pixels.shape == (3, 3, 8, 12)
    assert torch.isfinite(pixels).all()
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert torch.equal(pixels, sample(pipe, batch_size=3))
    assert not torch.equal(pixels, sample(pipe, 1, batch_size=3))
    each = sample(pipe, batch_size=2, generator=[seeded(0), seeded(1)])
    assert_close(each[1:], sample(pipe, 1, batch_size=1), rtol=1e-4, atol=1e-5)


def test_output_types(make):
    pipe = pipeline(make())
    pixels = sample(pipe, batch_size=2)
    (array,) = sample_tuple = pipe(2, num_inference_steps=7, generator=seeded(), output_type="np", return_dict=False)
    assert isinstance(sample_tuple, tuple)
    assert_close(torch.from_numpy(array), pixels.permute(0, 2, 3, 1))
    images = sample(pipe, batch_size=2, output_type="pil")
    assert [image.size for image in images] == [(12, 8)] * 2
    assert np.abs(np.asarray(images[1]) / 255 - array[1]).max() <= 0.5 / 255 + 1e-6


def test_guidance(make, monkeypatch):
    """What the scheduler is given: none + s (class - none)."""
    pipe, given, sizes = pipeline(make(num_classes=3)), [], []
    step, predict = DDIMScheduler.step, pipe.model.predict

    def watched_step(self, prediction, *args, **kwargs):
        given.append(prediction)
        return step(self, prediction, *args, **kwargs)

    def watched_predict(z, t, classes):
        sizes.append(len(z))
        return predict(z, t, classes)

    monkeypatch.setattr(DDIMScheduler, "step", watched_step)
    monkeypatch.setattr(pipe.model, "predict", watched_predict)
    z, t = randn(2, 6, 8), torch.tensor([999])
    with torch.no_grad():
        of_class, of_none = (predict(z, t, torch.tensor(c)) for c in ([0, 2], [3, 3]))
    assert (of_class - of_none).abs().max() > 0.1
    for arguments, expected, size in (
        ({"class_labels": [0, 2]}, of_class, 2),
        ({"class_labels": torch.tensor([0, 2]), "guidance_scale": 1.0}, of_class, 2),
        ({"class_labels": [3, 3]}, of_none, 2),
        ({"batch_size": 2}, of_none, 2),
        ({"class_labels": [0, 2], "guidance_scale": 0.0}, of_none, 4),
        ({"class_labels": [0, 2], "guidance_scale": 2.5}, of_none + 2.5 * (of_class - of_none), 4),
    ):
        sample(pipe, **arguments, num_inference_steps=1)
        assert_close(given.pop(), expected)
        assert sizes.pop() == size


@pytest.mark.parametrize("name", SCHEDULERS)
def test_saved_and_loaded_bit_for_bit(make, tmp_path, name):
    pipe = pipeline(make(num_classes=3, prediction="latent", noise_schedule="linear_gamma2"), name)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "LDAEPipeline"
    assert index["model"] == ["modeling_ldae", "LDAEForPreTraining"]
    assert not list(tmp_path.rglob("*.bin"))
    loaded = LDAEPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is type(pipe.scheduler)
    for given in ({"batch_size": 2}, {"class_labels": [0, 1, 2], "guidance_scale": 3.0}):
        assert torch.equal(sample(loaded, **given), sample(pipe, **given))


def test_refusals(make):
    for fields in (
        {"input_space": "image"},
        {"noise_schedule": "linear_sigma"},
        {"prediction": "image"},
        {"input_space": "image", "prediction": "image", "noise_schedule": "linear_sigma"},
    ):
        with pytest.raises(ValueError, match=r"noise_schedule='linear_gamma2' or 'ddpm'; this model has .*denoise"):
            LDAEPipeline.from_model(make(**fields))
    with pytest.raises(ValueError, match="scheduler must be one of ddim, ddpm, dpm, got 'euler'"):
        make_scheduler(make(), "euler")
    plain, classes, ancestral = pipeline(make()), pipeline(make(num_classes=3)), pipeline(make(), "ddpm")
    for pipe, given, text in (
        (plain, {"class_labels": [0]}, "num_classes=0"),
        (plain, {"guidance_scale": 2.0}, "needs class_labels"),
        (plain, {"batch_size": 0}, "batch_size must be at least 1"),
        (plain, {"num_inference_steps": 0}, r"num_inference_steps must be in \[1, 1000\]"),
        (plain, {"num_inference_steps": 1001}, r"num_inference_steps must be in \[1, 1000\]"),
        (plain, {"output_type": "jpg"}, "output_type"),
        (ancestral, {"eta": 0.5}, "eta=0.5 is DDIM's"),
        (classes, {"class_labels": [4]}, r"\[0, 3\]"),
        (classes, {"class_labels": []}, r"\[0, 3\]"),
        (classes, {"class_labels": [0], "batch_size": 2}, "contradicts"),
    ):
        with pytest.raises(ValueError, match=text):
            sample(pipe, **given)


def test_dpm_solver_goes_where_ddim_goes(make):
    """Both follow the same differential equation: to first order DDIM, to second DPM-Solver++, whose error is 25 times smaller in
    five times the steps, not five times."""

    def end(name, steps):
        pipe = pipeline(make(), name)
        return pipe(batch_size=1, num_inference_steps=steps, generator=seeded(), output_type="pt").images

    limit = end("ddim", 500)
    error = {steps: (end("dpm", steps) - limit).abs().mean().item() for steps in (50, 250)}
    assert error[250] < 1e-3
    assert error[250] < error[50] / 8


def test_denoise(tiny_model, images):
    model = tiny_model().train()
    pixel_values = images(model.config)
    modes = []
    model.decoder.register_forward_hook(lambda module, *_: modes.append(module.training))
    noisy, clean = denoise(model, pixel_values, 500, seeded())
    assert (modes, model.training) == ([False], True)
    again = denoise(model, pixel_values, torch.tensor([500, 500]), seeded())
    assert all(torch.equal(x, y) for x, y in zip((noisy, clean), again, strict=True))
    noise = randn(2, 6, 8)
    outputs = model.eval()(pixel_values, noise=noise, timesteps=torch.tensor([500, 500]))
    assert_close(noisy, outputs.noisy_pixel_values.clamp(-1, 1))
    assert_close(clean, outputs.reconstruction.clamp(-1, 1))


# ------------------------------------------------------------------------------------------------------ Fréchet distance


class Means(nn.Module):
    """An encoder whose features are the first numbers of an image."""

    image_hw, num_channels, name, device = (2, 2), 1, "means", torch.device("cpu")

    def pool(self, pixel_values):
        return pixel_values.flatten(1)


def naive_distance(a, b):
    (m, s), (n, t) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    return ((m - n) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)


def test_frechet_distance_against_scipy():
    mix = randn(4, 4, seed=3)
    real, fake = randn(300, 4), randn(200, 4, seed=1) @ mix + 0.5
    batches = iter(fake.reshape(-1, 1, 2, 2).split(33))
    result = frechet_distance(real.reshape(-1, 1, 2, 2), batches, Means())
    assert result["value"] == pytest.approx(naive_distance(real.double().numpy(), fake.double().numpy()), rel=1e-6)
    assert result["metric"] == "Fréchet distance on features of means"
    assert (result["num_real"], result["num_fake"], result["num_features"]) == (300, 200, 4)
    same = frechet_distance(real.reshape(-1, 1, 2, 2), real.reshape(-1, 1, 2, 2), Means(), batch_size=7)
    assert same["value"] == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_few_images():
    real = randn(300, 1, 2, 2)
    with pytest.raises(ValueError, match="fake holds 1 readable images"):
        frechet_distance(real, real[:1], Means())
    with pytest.warns(UserWarning, match="fake holds 4 images, too few for the 4 dimensions"):
        frechet_distance(real, real[:4], Means())


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # of grey images' equal channels
@pytest.mark.parametrize("channels", [1, 3])
def test_fid_sees_what_inception_takes(channels, monkeypatch):
    """Three channels of whole numbers in [0, 255]; the rest is the distance of any features."""

    class Corners(nn.Module):
        num_features = 6

        def forward(self, images):
            assert (images.dtype, images.shape[1:]) == (torch.uint8, (3, 2, 2))
            return torch.cat([images[:, :, 0, 0], images[:, :, 1, 1]], dim=1).double()

    monkeypatch.setattr(frechet, "_inception", lambda: frechet.FrechetInceptionDistance(Corners()))
    monkeypatch.setattr(frechet, "INCEPTION_DIM", 6)
    real, fake = (0.4 * randn(200, channels, 2, 2, seed=seed) for seed in (0, 1))
    result = frechet_distance(real, fake)
    levels = [((x.clamp(-1, 1) + 1) * 127.5).round().expand(-1, 3, -1, -1).double() for x in (real, fake)]
    features = [torch.cat([x[:, :, 0, 0], x[:, :, 1, 1]], dim=1).numpy() for x in levels]
    assert (result["metric"], result["num_features"]) == ("FID", 6)
    assert result["value"] == pytest.approx(naive_distance(*features), rel=1e-4)


def test_fid_names_what_is_missing(monkeypatch):
    def missing(error):
        def metric(*args, **kwargs):
            raise error

        monkeypatch.setattr(frechet, "FrechetInceptionDistance", metric)

    missing(ModuleNotFoundError("torch-fidelity"))
    with pytest.raises(ImportError, match=r"pip install torch-fidelity.*--encoder"):
        frechet_distance(iter(()), iter(()))
    missing(OSError("no network"))
    with pytest.raises(OSError, match=r"no network.*--encoder"):
        frechet_distance(iter(()), iter(()))


def test_images_are_resized_to_the_encoder(tiny_model):
    encoder = Encoder(tiny_model(LDAEModel), name="tiny")
    real = 2 * torch.rand(20, 3, 16, 24, generator=seeded()) - 1
    assert frechet_distance(real, real, encoder)["value"] == pytest.approx(0, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    (folder / "05.png").write_bytes(b"no image")
    return folder


def run(*args):
    return command.main([*map(str, args), "--num_inference_steps", "3"])


@pytest.fixture
def given(make, tiny_model, data, tmp_path, monkeypatch):
    """The options of 21 images in batches of 8, and with `measured` those of their distance to `data`."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    make(num_classes=3).save_pretrained(tmp_path / "model")
    tiny_model(LDAEForPreTraining, hidden_size=8).save_pretrained(tmp_path / "encoder")
    return ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--num_images", 21, "--batch_size", 8]


@pytest.fixture
def measured(given, data, tmp_path):
    of_data = ["--data", data, "--encoder", tmp_path / "encoder"]
    return [*given, *of_data, "--guidance_scale", 2, "--sampler", "ddpm"]


def test_command_line(make, tiny_model, data, tmp_path, measured, capsys):
    """The distance is scipy's, of features of the images that the pipeline makes; classes take turns."""
    result = run(*measured)
    written = json.loads((tmp_path / "out/results/generation.json").read_text())
    counted = {name: written[name] for name in ("kind", "num_real", "num_fake", "num_features", "sampler", "split")}
    assert counted == {
        "kind": "generation", "num_real": 19, "num_fake": 21, "num_features": 8, "sampler": "ddpm", "split": "train",
    }  # fmt: skip
    assert str(tmp_path / "encoder") in written["metric"]
    assert "commit" in written
    with Image.open(tmp_path / "out/samples.png") as grid:
        assert grid.size == (5 * 14 + 2, 5 * 10 + 2)
    assert "Fréchet distance" in capsys.readouterr().out

    pipe, generator = pipeline(make(num_classes=3), "ddpm"), seeded()
    labels = [list(range(first, min(first + 8, 21))) for first in (0, 8, 16)]
    sampled = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": generator}
    fake = torch.cat([sample(pipe, class_labels=[i % 3 for i in batch], **sampled) for batch in labels])
    images = ImageDataset(load_examples(str(data), "train"), (8, 12), 3)
    (real,) = (batch["pixel_values"] for batch in evaluation_loader(images, 64, 0))
    encoder = Encoder(tiny_model(LDAEForPreTraining, hidden_size=8))
    with torch.inference_mode():
        features = [encoder.pool(x).double().numpy() for x in (to_pixel_values(real), 2 * fake - 1)]
    assert written["value"] == result["value"] == pytest.approx(naive_distance(*features), rel=1e-3)


def test_command_line_replaces_no_result_unasked(given, measured):
    value = run(*measured)["value"]
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(*measured)
    assert run(*measured, "--overwrite")["value"] == value
    assert run(*measured, "--overwrite", "--seed", 1)["value"] != pytest.approx(value, rel=1e-3)
    assert "value" not in run(*given, "--overwrite")  # images alone


def test_command_line_validates_before_any_work(given, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_model", lambda *args: pytest.fail("a model was loaded"))
    for args, text in (
        (["--num_images", 1, "--data", data], "--num_images must be at least 2"),
        (["--encoder", tmp_path / "encoder"], "--encoder .* --data"),
    ):
        with pytest.raises(ValueError, match=text):
            run(*given, *args)
    with pytest.raises(SystemExit):
        run(*given, "--batch_size", 0)
    assert "batch_size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_line_needs_a_model_that_generates(tiny_model, tmp_path):
    tiny_model(LDAEForPreTraining).save_pretrained(tmp_path / "model")
    tiny_model(LDAEModel, **LATENT).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="denoise"):
        run("--model", tmp_path / "model", "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match="lacks"):
        run("--model", tmp_path / "encoder", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_pipeline_is_not_offloaded(make):
    """The pipeline uses parts of its one model, which the hooks of offloading do not see."""
    with pytest.raises(ValueError, match="offload"):
        pipeline(make()).enable_model_cpu_offload()


def test_command_line_validates_before_it_reads_an_image(make, data, tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(command, "load_examples", lambda *args: pytest.fail("images were read"))
    given = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--data", data]
    for option, value, text in (
        ("num_inference_steps", 1001, "must be in"),
        ("guidance_scale", 2, "needs a model that is told"),
    ):
        with pytest.raises(ValueError, match=f"{option} {text}"):
            command.main([*map(str, given), f"--{option}", str(value)])
    assert not (tmp_path / "out").exists()
