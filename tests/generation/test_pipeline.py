"""The pipeline: guidance, generators, output types, saving, and the arguments that it does not take."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from samplers import pipeline, randn, sample, seeded
from torch.testing import assert_close

from ldae.generation.pipeline import LDAEPipeline
from ldae.generation.schedulers import SCHEDULERS, make_scheduler


def test_predict_is_what_training_computes(make, images):
    model = make(prediction="latent", num_classes=3)
    drawn = {**model.sample_noise(2, generator=seeded()), "drop_class": torch.tensor([False, True])}
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
    assert index["_class_name"] == ["pipeline_ldae", "LDAEPipeline"]
    assert index["model"] == ["modeling_ldae", "LDAEForPreTraining"]
    assert not list(tmp_path.rglob("*.bin"))
    for loaded in (
        LDAEPipeline.from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is LDAEPipeline
        assert type(loaded.scheduler) is type(pipe.scheduler)
        for given in ({"batch_size": 2}, {"class_labels": [0, 1, 2], "guidance_scale": 3.0}):
            assert torch.equal(sample(loaded, **given), sample(pipe, **given))


def test_unknown_schedulers_are_refused_by_name(make, tmp_path):
    pipe, message = pipeline(make()), "must be one of diffusers' DDIMScheduler, .*, got EulerDiscreteScheduler"
    with pytest.raises(ValueError, match=message):
        LDAEPipeline(make(), EulerDiscreteScheduler())
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(path.read_text().replace("DDIMScheduler", "EulerDiscreteScheduler"))
    with pytest.raises(ValueError, match=message):
        LDAEPipeline.from_pretrained(tmp_path)
    pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match=message):
        sample(pipe)


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


def test_the_pipeline_is_not_offloaded(make):
    """The pipeline uses parts of its one model, which the hooks of offloading do not see."""
    with pytest.raises(ValueError, match="offload"):
        pipeline(make()).enable_model_cpu_offload()
