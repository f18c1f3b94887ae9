"""The ladder: every rung is its one change, trains, reloads, and reports what its files hold."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldae import LDAEConfig, LDAEForPreTraining, ladder
from ldae.arguments import parse_arguments
from ldae.results import save_result

TINY = [
    f"--{option}"
    for option in (
        "image_size=16", "patch_size=4", "hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "latent_dim=4",
        "per_device_batch_size=4", "max_steps=2", "tokenizer_epochs=1", "checkpointing_steps=0", "knn_steps=0",
        "picture_steps=0", 'autoencoder={"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}',
    )
]  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    """Pictures of two classes in two splits, and a recipe that names them."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(6):
                coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                coarse.resize((16, 16), Image.Resampling.BICUBIC).save(tmp_path / f"data/{split}/{name}/{i}.png")
    (tmp_path / "tiny.yaml").write_text(f"data: {tmp_path / 'data'}\n")
    return str(tmp_path / "tiny.yaml")


def config(rung, patch_dim=768):
    names = LDAEConfig.__dataclass_fields__
    given = {name: value for name, value in ladder.options(rung, patch_dim).items() if name in names}
    return LDAEConfig(**given)


@pytest.mark.parametrize("rung", [rung for rung in ladder.RUNGS.values() if rung.before], ids=lambda rung: rung.name)
def test_a_rung_differs_from_the_one_before_in_exactly_its_change(rung):
    before, after = (config(r).to_dict() for r in (ladder.RUNGS[rung.before], rung))
    changed = {name for name in after if after[name] != before[name]}
    fields = {name for name in rung.change if name in LDAEConfig.__dataclass_fields__}
    if "latent_dim" in fields and config(rung).latent_dim == config(ladder.RUNGS[rung.before]).latent_dim:
        fields.discard("latent_dim")  # the recipe's own dimension is one of table 2's
    assert changed == fields
    assert rung.change


def test_the_end_of_the_road_is_the_default():
    assert config(ladder.RUNGS["l-dae"]).to_dict() == LDAEConfig().to_dict()


def test_latent_dimensions_are_the_papers_part_of_a_patch():
    assert ladder.options(ladder.RUNGS["patch-pca-d32"], 768)["latent_dim"] == 32
    assert ladder.options(ladder.RUNGS["patch-pca-d32"], 192)["latent_dim"] == 8
    assert ladder.options(ladder.RUNGS["classical-dae"], 192)["latent_dim"] == 192
    convolutional = {d: [ladder.options(ladder.RUNGS[f"conv-vae-d{d}"], D)["latent_dim"] for D in (768, 192)]
                     for d in (8, 16, 32, 64, 128)}  # fmt: skip
    assert convolutional == {8: [8, 4], 16: [16, 4], 32: [32, 8], 64: [64, 16], 128: [128, 32]}


@pytest.mark.parametrize("rung", ladder.RUNGS.values(), ids=lambda rung: rung.name)
def test_every_rung_is_an_option_list_that_the_script_takes(rung, recipe):
    given = [str(part) for name, value in ladder.options(rung, 48).items() for part in (f"--{name}", value)]
    model_args, _, _ = parse_arguments([recipe, *TINY, *given])
    LDAEForPreTraining(model_args.config())


@pytest.mark.slow
def test_runs_reload_and_are_reported(recipe, tmp_path, capsys):
    """Two rungs as the command runs them: processes of their own."""
    command = [recipe, "--output_dir", str(tmp_path / "ladder"), "--rungs", "patch-ae", "l-dae", "--seeds", "3"]
    ladder.main([*command, "--dry_run", "--", *TINY])
    assert "2 runs to do" in capsys.readouterr().out
    assert not (tmp_path / "ladder").exists()
    ladder.main([*command, "--", *TINY])
    out = capsys.readouterr().out
    assert "| l-dae | predict the original image | 64.5 |" in out
    for name, prediction in (("patch-ae", "noise"), ("l-dae", "image")):
        model = LDAEForPreTraining.from_pretrained(tmp_path / "ladder" / f"{name}-seed3")
        assert model.config.prediction == prediction
        assert torch.isfinite(model(torch.zeros(1, 3, 16, 16)).loss)
    ladder.main([*command, "--dry_run", "--", *TINY])
    assert "0 runs to do" in capsys.readouterr().out
    ladder.main(["--output_dir", str(tmp_path / "ladder"), "--report", str(tmp_path / "docs/ladder.md")])
    assert (tmp_path / "docs/road.png").stat().st_size > 1000
    assert (tmp_path / "docs/ladder.md").read_text() in out


def test_rungs_share_their_tokenizers():
    shared = {name: ladder.tokenizer_of(rung) for name, rung in ladder.RUNGS.items() if not rung.side}
    assert shared == {
        "dit": "dit", "no-classes": "dit", "no-perceptual": "no-perceptual", "no-adversarial": "no-adversarial",
        "linear-gamma2": "no-adversarial", "patch-vae": "patch-vae", "patch-ae": "patch-ae", "patch-pca": None,
        "clean-latent": None, "no-input-scaling": None, "image-input": None, "image-output": None, "l-dae": None,
    }  # fmt: skip
    assert ladder.tokenizer_of(ladder.RUNGS["conv-vae-d32"]) == "conv-vae-d32"


def test_a_tokenizer_is_trained_once_before_the_rungs_that_share_it(tmp_path, monkeypatch):
    """With the processes replaced by what they would leave."""
    calls = []

    def train(command, **kwargs):
        folder = Path(command[command.index("--output_dir") + 1])
        given = command[command.index("--tokenizer") + 1] if "--tokenizer" in command else None
        calls.append((folder, "--tokenizer_only" in command, given))
        broken = "no-perceptual" in folder.name
        if not broken:
            (folder / "results").mkdir(parents=True)
            (folder / "results/train.json").write_text("{}")
        return subprocess.CompletedProcess(command, int(broken))

    monkeypatch.setattr(ladder.subprocess, "run", train)
    rungs = [ladder.RUNGS[name] for name in ("no-perceptual", "no-adversarial", "linear-gamma2", "patch-pca")]
    assert "2 tokenizers to train before them" in ladder.plan(tmp_path, rungs, [7], 2, 48)
    failed = ladder.run("recipe.yaml", tmp_path, rungs, [7], 2, 48, [])
    assert failed == ["tokenizers/no-perceptual-seed7", "no-perceptual-seed7 (its tokenizer failed)"]
    shared = tmp_path / "tokenizers/no-adversarial-seed7"
    assert {folder for folder, only, _ in calls[:2] if only} == {shared, tmp_path / "tokenizers/no-perceptual-seed7"}
    assert sorted(calls[2:]) == [
        (tmp_path / "linear-gamma2-seed7", False, str(shared)),
        (tmp_path / "no-adversarial-seed7", False, str(shared)),
        (tmp_path / "patch-pca-seed7", False, None),
    ]
    assert "1 tokenizers" in ladder.plan(tmp_path, rungs, [7], 2, 48)


@pytest.mark.slow
def test_a_run_that_fails_is_named(recipe, tmp_path):
    command = [recipe, "--output_dir", str(tmp_path / "ladder"), "--rungs", "l-dae", "--seeds", "0", "--", *TINY]
    with pytest.raises(SystemExit, match="l-dae-seed0"):
        ladder.main([*command, "--train_split", "nowhere"])
    assert "nowhere" in (tmp_path / "ladder/l-dae-seed0.log").read_text()


def made(folder, name, *accuracies, error=0.5):
    for seed, accuracy in enumerate(accuracies):
        figures = {"linear-fast": {"accuracy": accuracy, "standard_error": error}}
        save_result(folder / f"{name}-seed{seed}/results/probe-x.json", {"kind": "probe", "protocols": figures})


def test_verdicts(tmp_path):
    """clean-latent falls in the paper, no-input-scaling rises."""
    made(tmp_path, "patch-pca", 50.0, 52.0)
    made(tmp_path, "clean-latent", 45.0)
    made(tmp_path, "no-input-scaling", 43.0)
    made(tmp_path, "image-input", 43.5)
    figures = ladder.measured(tmp_path)
    assert figures["patch-pca"] == (51.0, pytest.approx(1.0), 2)  # the seeds differ by more than the pictures say
    assert figures["clean-latent"] == (45.0, 0.5, 1)
    verdicts = {name: ladder.verdict(ladder.RUNGS[name], figures) for name in (*figures, "image-output")}
    assert verdicts == {
        "patch-pca": "not run", "clean-latent": "agrees", "no-input-scaling": "does not", "image-input": "undecided",
        "image-output": "not run",
    }  # fmt: skip
    assert "| -6.0 ± 1.1 | agrees |" in ladder.report(tmp_path)
