"""Every rung is its one change, takes a training step and reloads."""

import pytest
import torch
from ablation_stand_in import TINY, make_ablation
from torch.testing import assert_close

from experiments.ablation import rungs
from ldae import LDAEConfig, LDAEForPreTraining
from ldae.options import parse_arguments


def config(rung):
    names = LDAEConfig.__dataclass_fields__
    return LDAEConfig(**{name: value for name, value in rungs.options(rung).items() if name in names})


def latent_dim(name, patch_size):
    return rungs.options(rungs.RUNGS[name], LDAEConfig(patch_size=patch_size))["latent_dim"]


@pytest.mark.parametrize("rung", [rung for rung in rungs.RUNGS.values() if rung.before], ids=lambda rung: rung.name)
def test_a_rung_differs_from_the_one_before_in_exactly_its_change(rung):
    """All options that it hands to the script, and what the configuration becomes."""
    before, after = (rungs.options(r) for r in (rungs.RUNGS[rung.before], rung))
    changed = {name for name in after | before if after.get(name) != before.get(name)}
    expected = set(rung.change)
    if "shrink" in expected:  # of the images of 224 pixels, or of what the rung before made of them
        expected = expected - {"shrink"} | {"image_size", "patch_size"}
    assert changed == expected
    before, after = (config(r).to_dict() for r in (rungs.RUNGS[rung.before], rung))
    fields = {name for name in expected if name in LDAEConfig.__dataclass_fields__}
    assert {name for name in after if after[name] != before[name]} == fields
    assert expected


def test_the_papers_figures():
    """Tables 1 to 3, figure 5 and section 4.4 of the paper."""
    path = rungs.main_path()
    assert [rung.paper for rung in path] == [
        57.5, 62.5, 58.4, 59.0, 63.4, 64.9, 64.7, 65.1, 62.4, 63.6, 63.6, 63.9, 64.5
    ]  # fmt: skip
    assert [rung.fid for rung in path[:5]] == [11.6, 30.9, 54.3, 75.6, 93.2]
    assert all(rung.fid is None for rung in path[5:])
    table2 = {
        "linear-gamma2": "conv-vae-d8 54.5 linear-gamma2 63.4 conv-vae-d32 62.8 conv-vae-d64 57.0 conv-vae-d128 48.1",
        "patch-vae": "patch-vae-d8 58.3 patch-vae 64.9 patch-vae-d32 64.8 patch-vae-d64 56.8",
        "patch-ae": "patch-ae-d8 59.9 patch-ae 64.7 patch-ae-d32 64.6 patch-ae-d64 59.9",
        "patch-pca": "patch-pca-d8 56.0 patch-pca-d16 63.4 patch-pca 65.1 patch-pca-d64 60.0 patch-pca-d128 53.9",
    }
    for name, row in rungs.TABLE2.items():
        dims = [rungs.at_dimension(name, d) for d in row]
        assert " ".join(f"{rung} {rungs.RUNGS[rung].paper}" for rung in dims) == table2[name]
    sides = {"one-level": 61.5, "random-crop": 65.0, "classical-dae": 23.6, "pixels-d768": 23.6, "predict-noise": None}
    assert {name: rungs.RUNGS[name].paper for name in sides} == sides


def test_the_last_rung_is_the_default():
    assert config(rungs.RUNGS["l-dae"]).to_dict() == LDAEConfig().to_dict()


def test_latent_dimensions_are_the_papers_part_of_a_patch():
    assert latent_dim("patch-pca", 16) == 32
    assert latent_dim("patch-pca", 8) == 8
    assert latent_dim("classical-dae", 8) == 192
    names = [rungs.at_dimension("linear-gamma2", d) for d in rungs.TABLE2["linear-gamma2"]]
    assert [latent_dim(name, 16) for name in names] == [8, 16, 32, 64, 128]
    assert [latent_dim(name, 8) for name in names] == [4, 4, 8, 16, 32]


def test_pixels_at_four_sizes_have_as_many_tokens():
    sizes = [config(rungs.RUNGS[f"pixels-d{d}"]) for d in (768, 192, 48, 12)]
    assert [c.image_size for c in sizes] == [224, [112, 112], [56, 56], [28, 28]]
    assert [c.latent_dim for c in sizes] == [c.patch_dim for c in sizes] == [768, 192, 48, 12]
    with pytest.raises(ValueError, match="pixels-d12 needs a patch_size divisible by 8, got 4x4"):
        rungs.options(rungs.RUNGS["pixels-d12"], LDAEConfig(image_size=16, patch_size=4))


@pytest.mark.parametrize("rung", rungs.RUNGS.values(), ids=lambda rung: rung.name)
def test_every_rung_is_an_option_list_that_the_script_takes(rung, recipe, tmp_path):
    ablation = make_ablation(recipe, [rung])
    command = ablation.command(tmp_path / "run", rung, 3)
    model_args, data_args, train_args = parse_arguments(command[3:])
    assert (train_args.seed, train_args.output_dir, train_args.resume) == (3, str(tmp_path / "run"), True)
    given = {**vars(model_args), **vars(data_args), **vars(train_args)}
    assert {name: given[name] for name in rungs.options(rung, ablation.config)} == rungs.options(rung, ablation.config)


@pytest.mark.parametrize("rung", rungs.RUNGS.values(), ids=lambda rung: rung.name)
def test_every_rung_takes_a_training_step_and_reloads(rung, recipe, tmp_path):
    model_args, _, _ = parse_arguments(
        [recipe, *TINY, *rungs.as_arguments(rungs.options(rung, make_ablation(recipe, []).config))]
    )
    torch.manual_seed(0)
    size = model_args.image_size
    fields = {"num_classes": 2} if rungs.options(rung)["class_conditional"] else {}
    model = LDAEForPreTraining(LDAEConfig.from_size("tiny", **{**model_args.overrides(), **fields}))
    pixel_values = torch.rand(4, 3, *(size * 2)[:2]).cumsum(3) / 16 - 1
    model.ldae.tokenizer.fit([pixel_values], model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    drawn = model.sample_noise(4, generator=torch.Generator().manual_seed(0))
    drawn |= {"labels": torch.tensor([0, 1, 1, 0])} if fields else {}
    losses = []
    for _ in range(3):
        loss = model(pixel_values, **drawn).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    model.save_pretrained(tmp_path)
    again, found = LDAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert_close(again(pixel_values, **drawn).loss, model(pixel_values, **drawn).loss)


def test_rungs_share_their_tokenizers():
    shared = {name: rungs.tokenizer_of(rung) for name, rung in rungs.RUNGS.items() if not rung.side}
    assert shared == {
        "dit": "dit", "no-classes": "dit", "no-perceptual": "no-perceptual", "no-adversarial": "no-adversarial",
        "linear-gamma2": "no-adversarial", "patch-vae": "patch-vae", "patch-ae": "patch-ae", "patch-pca": None,
        "clean-latent": None, "no-input-scaling": None, "image-input": None, "image-output": None, "l-dae": None,
    }  # fmt: skip
    assert rungs.tokenizer_of(rungs.RUNGS["conv-vae-d32"]) == "conv-vae-d32"


def test_without_lpips_the_first_rungs_take_the_third_ones_tokenizer():
    names = ("dit", "no-classes", "no-perceptual", "no-adversarial", "patch-pca")
    found = {name: rungs.tokenizer_of(rungs.RUNGS[name], lpips=False) for name in names}
    assert found == dict(zip(names, ["no-perceptual"] * 3 + ["no-adversarial", None], strict=True))
    assert rungs.options(rungs.RUNGS["dit"], lpips=False)["tokenizer_perceptual_weight"] == 0
