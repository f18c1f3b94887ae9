"""The ablation: every rung is its one change, trains, reloads, and reports what its files hold."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import probe_ldae
from experiments.ablation import figures, report, run, rungs, runs, verdicts
from experiments.ablation.tables import tables
from ldae import LDAEConfig, LDAEForPreTraining
from ldae.generation.command import GenerationArguments
from ldae.options import option_parser, parse_arguments
from ldae.report.results import save_result

TINY = [
    f"--{option}"
    for option in (
        "image_size=32", "patch_size=8", "hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2",
        "per_device_batch_size=4", "max_steps=2", "tokenizer_epochs=1", "checkpointing_steps=0", "knn_steps=0",
        "image_steps=0", 'autoencoder={"block_out_channels": [8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}',
    )
]  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    """Images of two classes in two splits, and a recipe that names them."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(6):
                coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                coarse.resize((16, 16), Image.Resampling.BICUBIC).save(tmp_path / f"data/{split}/{name}/{i}.png")
    (tmp_path / "tiny.yaml").write_text(f"data: {tmp_path / 'data'}\n")
    return str(tmp_path / "tiny.yaml")


def config(rung):
    names = LDAEConfig.__dataclass_fields__
    return LDAEConfig(**{name: value for name, value in rungs.options(rung).items() if name in names})


def make_ablation(recipe, some, output_dir=Path("runs"), seeds=(3,), workers=2, **kwargs):
    model_args, data_args, _ = parse_arguments([recipe, *TINY])
    return run.Ablation(recipe, output_dir, some, list(seeds), workers, model_args.config(), data_args, TINY, **kwargs)


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


@pytest.mark.slow
def test_runs_reload_and_are_reported(recipe, tmp_path, capsys):
    """Two rungs as the command runs them: processes of their own."""
    command = [recipe, "--output_dir", str(tmp_path / "ablation"), "--rungs", "patch-ae", "l-dae", "--seeds", "3"]
    run.main([*command, "--dry_run", "--", *TINY])
    assert "2 runs to do" in capsys.readouterr().out
    assert not (tmp_path / "ablation").exists()
    run.main([*command, "--sweep", "--", *TINY])
    out = capsys.readouterr().out
    assert "| `l-dae` | predict the original image | 64.5 |" in out
    assert "block 2 of 2" in out
    for name, prediction in (("patch-ae", "noise"), ("l-dae", "image")):
        model = LDAEForPreTraining.from_pretrained(tmp_path / "ablation" / f"{name}-seed3")
        assert model.config.prediction == prediction
        assert torch.isfinite(model(torch.zeros(1, 3, 32, 32)).loss)
    run.main([*command, "--dry_run", "--", *TINY])
    assert "0 runs to do" in capsys.readouterr().out
    run.main(
        [recipe, "--rungs", "all", "--seeds", "3", "--output_dir", str(tmp_path / "ablation"), "--dry_run", "--", *TINY]
    )
    assert f"{len(rungs.RUNGS) - 2} runs to do" in capsys.readouterr().out
    report.main([str(tmp_path / "ablation"), "--write", str(tmp_path / "docs/ablation.md")])
    for name in ("rungs", "dimensions", "schedules", "filters", "denoised"):
        with Image.open(tmp_path / f"docs/ablation/{name}.png") as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    assert "| `l-dae` | predict the original image | 64.5 |" in (tmp_path / "docs/ablation.md").read_text()


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


def test_a_tokenizer_is_trained_once_before_the_rungs_that_share_it(recipe, tmp_path, monkeypatch):
    """With the processes replaced by what they would leave."""
    calls = []

    def train(command, **kwargs):
        folder = Path(command[command.index("--output_dir") + 1])
        given = command[command.index("--tokenizer") + 1] if "--tokenizer" in command else None
        calls.append((folder, "--tokenizer_only" in command, given))
        broken = "no-perceptual" in folder.name
        if not broken:
            (folder / "results").mkdir(parents=True)
            (folder / "results/train.json").write_text('{"kind": "train", "seconds": 60}')
        return subprocess.CompletedProcess(command, int(broken))

    monkeypatch.setattr(run.subprocess, "run", train)
    some = [rungs.RUNGS[name] for name in ("no-perceptual", "no-adversarial", "linear-gamma2", "patch-pca")]
    ablation = make_ablation(recipe, some, tmp_path, [7])
    assert "2 tokenizers to do, 2 at a time: unknown until one is done" in ablation.plan()
    assert ablation.run() == ["tokenizers/no-perceptual-seed7", "no-perceptual-seed7 (its tokenizer failed)"]
    shared = tmp_path / "tokenizers/no-adversarial-seed7"
    assert {folder for folder, only, _ in calls[:2] if only} == {shared, tmp_path / "tokenizers/no-perceptual-seed7"}
    assert sorted(calls[2:]) == [
        (tmp_path / "linear-gamma2-seed7", False, str(shared)),
        (tmp_path / "no-adversarial-seed7", False, str(shared)),
        (tmp_path / "patch-pca-seed7", False, None),
    ]
    assert "1 tokenizers to do, 2 at a time: 1 minutes, from 1 that are done" in ablation.plan()


def test_distances_and_sweeps_are_measured_once_after_the_runs(recipe, tmp_path, monkeypatch):
    """With the processes replaced by what they would leave; the second rung's training fails."""
    calls = []

    def execute(command, **kwargs):
        calls.append(command[2])
        folder = Path(command[command.index("--output_dir" if "--output_dir" in command else "--model") + 1])
        if "no-adversarial-seed" in str(folder) and "tokenizers" not in str(folder):
            return subprocess.CompletedProcess(command, 1)
        leaves = {
            "train_ldae": ("train", "probe-x"),
            "ldae.generation": ("generation",),
            "probe_ldae": ("sweep-x",),
        }
        (folder / "results").mkdir(parents=True, exist_ok=True)
        for name in leaves[command[2]]:
            kind = name.split("-")[0]
            (folder / f"results/{name}.json").write_text(
                json.dumps({"kind": kind, "seconds": 60, "protocols": {}, "floor": {}})
            )
        return subprocess.CompletedProcess(command, 0)

    some = [rungs.RUNGS[name] for name in ("linear-gamma2", "no-adversarial", "l-dae")]
    ablation = make_ablation(recipe, some, tmp_path, [3, 4], generate=8, encoder="org/mae", sweep=True)
    commands = dict(ablation.measurements())
    assert {folder.name for folder in commands} == {
        "linear-gamma2-seed3", "linear-gamma2-seed4", "no-adversarial-seed3", "no-adversarial-seed4", "l-dae-seed3",
    }  # fmt: skip
    parser = option_parser(GenerationArguments, description="")
    (given,) = parser.parse_args_into_dataclasses(commands[tmp_path / "linear-gamma2-seed3"][3:])
    assert (given.model, given.output_dir) == (str(tmp_path / "linear-gamma2-seed3"),) * 2
    assert (given.data, given.num_images, given.encoder) == (ablation.data.data, 8, "org/mae")
    probe, _ = probe_ldae.parse_arguments(commands[tmp_path / "l-dae-seed3"][3:])
    assert (probe.model, probe.data, probe.sweep) == (str(tmp_path / "l-dae-seed3"), ablation.data.data, True)
    assert probe.seed == 3  # the probe's, whose figures it goes beside
    assert "5 measurements to do after them" in ablation.plan()
    with monkeypatch.context() as context:
        context.setattr(run.subprocess, "run", execute)
        assert ablation.run() == ["no-adversarial-seed3", "no-adversarial-seed4"]
    assert calls.index("ldae.generation") > max(i for i, name in enumerate(calls) if name == "train_ldae")
    assert (calls.count("ldae.generation"), calls.count("probe_ldae")) == (2, 1)
    assert "2 measurements to do after them" in ablation.plan()


def test_a_shared_tokenizer_is_trained_by_the_same_command_for_any_rung(recipe, tmp_path):
    """Or one that was stopped could not go on for another rung."""
    commands = set()
    for some in (["no-adversarial"], ["linear-gamma2"], ["linear-gamma2", "no-adversarial"]):
        ablation = make_ablation(recipe, [rungs.RUNGS[name] for name in some], tmp_path, [7])
        (job,) = ablation.tokenizer_jobs()
        commands.add(tuple(ablation.command(*job, "--tokenizer_only")))
    (command,) = commands
    assert command[command.index("--noise_schedule") + 1] == "ddpm"


def test_a_given_autoencoder_is_the_first_rungs_tokenizer(recipe, tmp_path, monkeypatch):
    calls = []
    some = [rungs.RUNGS[name] for name in ("dit", "no-classes")]
    ablation = make_ablation(recipe, some, tmp_path, [7], autoencoder="org/vae")
    assert "tokenizers to do" not in ablation.plan()
    with monkeypatch.context() as context:
        done = subprocess.CompletedProcess([], 0)
        context.setattr(run.subprocess, "run", lambda command, **_: calls.append(command) or done)
        assert ablation.run() == []
    assert [command[command.index("--tokenizer") + 1] for command in calls] == ["org/vae"] * 2
    third = make_ablation(recipe, [rungs.RUNGS["no-perceptual"]], tmp_path, [7], autoencoder="org/vae")
    assert len(third.tokenizer_jobs()) == 1
    made(tmp_path, "dit", 40.0)
    path = tmp_path / "dit-seed0/results/train.json"
    train = json.loads(path.read_text())
    train["arguments"]["tokenizer"] = "org/vae"
    save_result(path, train, overwrite=True)
    assert "`dit` was run with `--tokenizer org/vae`." in tables(tmp_path)["table 1"]


def test_the_plan_says_what_a_rung_changes(recipe, tmp_path):
    ablation = make_ablation(
        recipe, [rungs.RUNGS[name] for name in ("linear-gamma2", "pixels-d192", "patch-pca")], tmp_path
    )
    lines = ablation.plan().splitlines()
    assert lines[0].endswith("γ² falls linearly: --noise_schedule linear_gamma2")
    assert lines[1].endswith(": --latent_dim 48 --image_size 16 16 --patch_size 4 4")
    assert lines[2].endswith(": --tokenizer_type pca --latent_dim 8")


def test_nothing_is_started_after_an_interrupt(recipe, tmp_path, monkeypatch):
    """With one worker, a job is started only after the one before it has ended well."""
    started = []

    def interrupted(command, **kwargs):
        started.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(run.subprocess, "run", interrupted)
    some = [rungs.RUNGS[name] for name in ("patch-pca", "clean-latent", "image-input", "l-dae")]
    with pytest.raises(KeyboardInterrupt):
        make_ablation(recipe, some, tmp_path, workers=1).run()
    assert len(started) == 1


def test_every_worker_has_a_gpu_of_those_that_may_be_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert [run._environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["2", "3", "2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [run._environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("--latent_dim=16", "latent_dim"),
        ("--seed 1", "seed"),
        ("--output_dir x", "output_dir"),
        ("--output-dir x", "output_dir"),
        ("--prediction noise", "prediction"),
        ("--crop random", "crop"),
        ("--num_classes 2", "num_classes"),
    ],
)
def test_what_the_ablation_decides_cannot_be_given(recipe, given, name, capsys):
    """Each is a valid option of train_ldae.py."""
    with pytest.raises(SystemExit):
        run.main([recipe, "--dry_run", "--", *given.split()])
    assert f"rungs, or the ablation itself, decide {name}: leave them out after --" in capsys.readouterr().err


def test_a_recipe_does_not_decide_about_classes(recipe, capsys):
    with open(recipe, "a") as file:
        file.write("num_classes: 2\n")
    with pytest.raises(SystemExit):
        run.main([recipe, "--dry_run"])
    assert "leave num_classes out of the recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("--workers 0", "--workers must be at least 1, got 0"),
        ("--generate 1", "--generate must be 0 or at least 2, got 1"),
        ("--generate -1", "--generate must be 0 or at least 2, got -1"),
        ("--encoder org/mae", "--encoder is the one that --generate measures with"),
        ("--autoencoder org/vae --without_lpips", "give one of the two"),
    ],
)
def test_options_that_contradict_each_other_end_the_command(recipe, given, text, capsys):
    with pytest.raises(SystemExit):
        run.main([recipe, "--dry_run", *given.split(), "--", *TINY])
    assert text in capsys.readouterr().err


def test_data_that_cannot_be_probed_is_refused(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.main([recipe, "--output_dir", str(tmp_path / "out"), "--", *TINY, "--data", str(tmp_path / "data/train/a")])
    assert "there is no validation split" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no folder 'nowhere'"):
        run.main([recipe, "--output_dir", str(tmp_path / "out"), "--", *TINY, "--train_split", "nowhere"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_fails_is_named(recipe, tmp_path):
    command = [recipe, "--output_dir", str(tmp_path / "ablation"), "--rungs", "l-dae", "--seeds", "0", "--", *TINY]
    with pytest.raises(SystemExit, match="l-dae-seed0"):
        run.main([*command, "--attn_implementation", "nowhere"])
    assert "nowhere" in (tmp_path / "ablation/l-dae-seed0.log").read_text()


def made(folder, name, *accuracies, error=0.5, config=(), **arguments):
    """The results that runs of a rung would leave, one for each seed."""
    rung = rungs.RUNGS[name]
    given = {"crop": "center", **rungs.options(rung), **arguments}
    fields = LDAEConfig.from_size("tiny", num_hidden_layers=4, decoder_num_hidden_layers=2).to_dict()
    fields |= {k: v for k, v in given.items() if k in LDAEConfig.__annotations__}
    fields |= {"num_classes": 10 if given["class_conditional"] else None, **dict(config)}
    data = {"name": "x", "num_images": 1234, "fingerprint": "f"}
    for seed, accuracy in enumerate(accuracies):
        results = folder / f"{name}-seed{seed}/results"
        figures = {"linear-fast": {"accuracy": accuracy, "standard_error": error, "seconds": 15}}
        floor = {"description": "untrained", **figures}
        save_result(results / "probe-x.json", {"kind": "probe", "data": data, "protocols": figures, "floor": floor})
        if (tokenizer := rungs.tokenizer_of(rung)) is not None:
            given["tokenizer"] = str(folder / f"tokenizers/{tokenizer}-seed{seed}")
        train = {"kind": "train", "config": fields, "arguments": given, "epochs": 3.0, "seconds": 60, "seed": seed}
        save_result(results / "train.json", {**train, "data": data, "images_seen": 3702})


def test_the_cost_is_that_of_training_and_probing(recipe, tmp_path):
    """A minute of training for each rung that is done, and 30 s of probing; three that are to be done, two at a time."""
    made(tmp_path, "l-dae", 50.0)
    made(tmp_path, "patch-pca", 50.0)
    some = [rungs.RUNGS[name] for name in ("l-dae", "image-input", "image-output", "clean-latent")]
    plan = make_ablation(recipe, some, tmp_path, [0]).plan()
    assert "3 runs to do, 2 at a time: 3 minutes, from 2 that are done" in plan


def test_the_cost_is_that_of_the_same_kind_of_tokenizer(recipe, tmp_path):
    """One that takes ten minutes and one of a minute, both with 30 s of probing, one after the other."""
    made(tmp_path, "l-dae", 50.0)
    made(tmp_path, "linear-gamma2", 50.0)
    path = tmp_path / "linear-gamma2-seed0/results/train.json"
    save_result(path, {**json.loads(path.read_text()), "seconds": 600}, overwrite=True)
    some = [rungs.RUNGS[name] for name in ("no-adversarial", "image-input")]
    plan = make_ablation(recipe, some, tmp_path, [0], workers=1).plan()
    assert "2 runs to do, 1 at a time: 12 minutes, from 2 that are done" in plan


def test_verdicts(tmp_path):
    """clean-latent falls in the paper, no-input-scaling rises, image-input changes nothing, image-output too little."""
    made(tmp_path, "patch-pca", 50.0, 52.0)
    made(tmp_path, "clean-latent", 44.0, 46.0, 45.0)
    made(tmp_path, "no-input-scaling", 40.0)
    made(tmp_path, "image-input", 40.5)
    made(tmp_path, "image-output", 41.0)
    made(tmp_path, "l-dae", 41.5)
    figures = runs.measure(tmp_path)
    between = (2 * 1**2 + 2 * 1**2) / 3  # of the five runs with other seeds beside them, three degrees of freedom
    assert [figures[name].error for name in ("patch-pca", "clean-latent", "no-input-scaling")] == pytest.approx(
        [(0.25 + between / n) ** 0.5 for n in (2, 3, 1)]
    )
    assert [figures["clean-latent"].accuracy, figures["clean-latent"].seeds] == [45.0, 3]
    found = {name: verdicts.verdict(rungs.RUNGS[name], figures) for name in figures}
    assert found == {
        "patch-pca": "not run", "clean-latent": "agrees", "no-input-scaling": "does not", "image-input": "none seen",
        "image-output": "none seen", "l-dae": "undecided",
    }  # fmt: skip
    texts = tables(tmp_path)
    assert (
        "| `clean-latent` | `patch-pca` | predict the clean latent, λ = γ² | -2.7 | -6.0 ± 1.3 | agrees |"
        in texts["claims"]
    )
    assert "34 claims: 1 agrees, 2 none seen, 1 undecided, 1 does not, 29 not run." in texts["claims"]
    assert "9 runs of 6 rungs with 1 to 3 seeds each; 3.0 epochs of 1,234 images in 1 minutes" in texts["setting"]
    assert "| patch-wise PCA | 56.0 / – | 63.4 / – | 65.1 / 51.0 ± 1.0 |" in texts["table 2"]
    assert "Untrained, these networks reach 51.0 to 51.0 %." in texts["table 2"]  # of two seeds


def test_no_verdict_where_more_or_less_than_the_change_differs(tmp_path):
    """Where LPIPS cannot be had, classes can be compared without it, but not what LPIPS does."""
    for name, accuracy in (("dit", 40.0), ("no-classes", 45.0), ("no-perceptual", 30.0)):
        made(tmp_path, name, accuracy, tokenizer_perceptual_weight=0.0)
    made(tmp_path, "patch-pca", 50.0, 50.5)
    made(tmp_path, "clean-latent", 40.0, weight_decay=0.1)
    made(tmp_path, "no-input-scaling", 40.0, config={"hidden_size": 96})
    figures = runs.measure(tmp_path)
    assert figures["dit"].differs == {"tokenizer_perceptual_weight": 0.0}
    found = {name: verdicts.verdict(rungs.RUNGS[name], figures) for name in figures}
    assert found == {
        "dit": "not run", "no-classes": "agrees", "no-perceptual": "not comparable", "patch-pca": "not run",
        "clean-latent": "not comparable", "no-input-scaling": "not comparable",
    }  # fmt: skip
    texts = tables(tmp_path)
    assert "`dit` was run with `--tokenizer_perceptual_weight 0.0`." in texts["table 1"]
    assert "`no-perceptual` and `no-classes` are the same run here." in texts["claims"]
    assert "`clean-latent` and `patch-pca` also differ in weight_decay." in texts["claims"]
    assert "`no-input-scaling` and `clean-latent` also differ in hidden_size, weight_decay." in texts["claims"]


def made_tokenizer(folder, rung, images_seen, **arguments):
    """The results that the tokenizers of two seeds would leave."""
    train = {"kind": "train", "arguments": arguments, "config": {}, "images_seen": images_seen}
    for seed in (0, 1):
        name = rungs.folder_name(rungs.tokenizer_of(rungs.RUNGS[rung]), seed)
        save_result(folder / f"tokenizers/{name}/results/train.json", {**train, "data": {"fingerprint": "f"}})


def test_tokenizers_of_one_kind_must_be_trained_alike(tmp_path):
    """Of another kind, each is trained as it needs."""
    for name, seen in (("linear-gamma2", 2), ("patch-vae", 20), ("patch-vae-d8", 10), ("patch-vae-d32", 20)):
        made(tmp_path, name, 50.0, 50.5)
        made_tokenizer(tmp_path, name, seen, base_learning_rate=0.1)
    figures = runs.measure(tmp_path)
    found = {
        name: verdicts.verdict(rungs.RUNGS[name], figures) for name in ("patch-vae", "patch-vae-d8", "patch-vae-d32")
    }
    assert found == {"patch-vae": "undecided", "patch-vae-d8": "not comparable", "patch-vae-d32": "none seen"}
    reason = "`patch-vae-d8` and `patch-vae` also differ in the tokenizer's training."
    assert reason in tables(tmp_path)["claims"]


@pytest.mark.parametrize(
    ("arguments", "comparable"),
    [
        ({"tokenizer_lpips_net": "alex"}, True),  # of a loss that the second has no more
        ({"tokenizer_discriminator_width": 16}, False),  # of one that both have
        ({"ema_decay": 0.5}, False),
    ],
)
def test_what_a_tokenizers_losses_are_counts_where_they_have_a_weight(tmp_path, arguments, comparable):
    base = {"tokenizer_lpips_net": "vgg", "tokenizer_discriminator_width": 64, "tokenizer_adversarial_weight": 0.5}
    for name, perceptual, given in (("no-classes", 1.0, arguments), ("no-perceptual", 0.0, {})):
        made(tmp_path, name, 50.0, 50.5)
        made_tokenizer(tmp_path, name, 2, **{**base, "tokenizer_perceptual_weight": perceptual, **given})
    found = verdicts.verdict(rungs.RUNGS["no-perceptual"], runs.measure(tmp_path))
    assert found == ("undecided" if comparable else "not comparable")


def test_one_seed_is_no_verdict(tmp_path):
    """The deviation between seeds is that of all rungs, in other ablations too."""
    made(tmp_path / "first", "l-dae", 50.0)
    made(tmp_path / "first", "classical-dae", 30.0)
    made(tmp_path / "other", "patch-pca", 50.0, 51.0)
    row = "| `classical-dae` | `l-dae` | noise on pixels: the classical DAE | -40.9 | -20.0 ± "
    assert f"{row}0.7 | one seed |" in tables(tmp_path / "first")["claims"]
    assert f"{row}1.2 | agrees |" in tables(tmp_path / "first", [tmp_path / "other"])["claims"]


def test_a_reports_drawings_have_the_errors_of_its_tables(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "rungs", lambda steps, path: drawn.append(steps) or path)
    made(tmp_path / "first", "l-dae", 50.0)
    made(tmp_path / "other", "patch-pca", 50.0, 51.0)
    report.write(tmp_path / "first", tmp_path / "first.md", [tmp_path / "other"])
    (((_, _, (accuracy, error), _),),) = drawn
    assert (accuracy, error) == (50.0, pytest.approx(0.75**0.5))


def test_the_variance_that_tokenizers_hold_stands_below_table_2(tmp_path):
    made(tmp_path, "patch-pca", 50.0)
    path = tmp_path / "patch-pca-seed0/results/train.json"
    save_result(path, {**json.loads(path.read_text()), "variance_held": 0.91234}, overwrite=True)
    assert tables(tmp_path)["table 2"].endswith("| patch-wise PCA | – | – | 91.2 | – | – |")


def test_a_claim_that_is_not_run_is_judged_in_another_ablation(tmp_path):
    """With that ablation's own figures: there l-dae is 40, here 50."""
    first, crops = tmp_path / "first", tmp_path / "crops"
    for folder, accuracy in ((first, 50.0), (crops, 40.0)):
        made(folder, "l-dae", accuracy, accuracy)
        made(folder, "classical-dae", accuracy - 10)
    made(crops, "random-crop", 45.0, crop="other")
    alone, both = tables(first), tables(first, [crops])
    row = "| `random-crop` | `l-dae` | random crops | +0.5 | "
    assert row + "– | not run |" in alone["claims"]
    assert row + "+5.0 ± 0.7 | agrees |" in both["claims"]
    reason = (
        "`random-crop` is judged in another ablation, {}: `random-crop` reaches 45.0 ± 0.5, `l-dae` reaches 40.0 ± 0.5."
    )
    reason = reason.format(crops) + "\n\n`random-crop` was run with `--crop other`."
    assert both["claims"].endswith(reason)
    assert both["branches"] == f"{alone['branches']}\n\n{reason}"
    assert [both[name] for name in ("setting", "table 3")] == [alone[name] for name in ("setting", "table 3")]
    report.main([str(first), "--write", str(tmp_path / "first.md"), "--also", str(crops)])
    assert reason in (tmp_path / "first.md").read_text()
    with pytest.raises(FileNotFoundError, match=r"no rung in '.*nowhere'"):
        tables(first, [tmp_path / "nowhere"])


def test_only_the_ablations_own_runs_and_probes_count(tmp_path):
    made(tmp_path, "l-dae", 50.0)
    results = tmp_path / "l-dae-seed0/results"
    other = json.loads((results / "probe-x.json").read_text())
    other["protocols"]["linear-fast"]["accuracy"] = 90.0
    save_result(results / "probe-photos.json", {**other, "data": {"name": "photos"}})
    shutil.copytree(tmp_path / "l-dae-seed0", tmp_path / "old/l-dae-seed0")
    shutil.copytree(tmp_path / "l-dae-seed0", tmp_path / "l-dae-seed0-old")
    (found,) = runs.measure(tmp_path).values()
    assert (found.accuracy, found.seeds) == (50.0, 1)


def test_distances_of_generated_images_stand_in_table_1(tmp_path):
    made(tmp_path, "linear-gamma2", 50.0, 51.0)
    for seed, value in enumerate((10.0, 12.0)):
        result = {"kind": "generation", "metric": "Fréchet distance on features of x", "value": value, "num_fake": 2000}
        result |= {"num_real": 1234, "sampler": "ddim", "num_inference_steps": 50, "guidance_scale": 1.0}
        save_result(tmp_path / f"linear-gamma2-seed{seed}/results/generation.json", {**result, "data_fingerprint": "f"})
    made(tmp_path, "no-adversarial", 50.0, 51.0)
    guided = {**result, "guidance_scale": 4.0, "data_fingerprint": "f"}
    save_result(tmp_path / "no-adversarial-seed0/results/generation.json", guided)
    other = {**result, "value": 99.0, "data_fingerprint": "of other images"}
    save_result(tmp_path / "no-adversarial-seed1/results/generation.json", other)
    table = tables(tmp_path)["table 1"]
    assert "| 93.2 | – | 11.0 ± 1.0 |" in table  # the seeds' variance is 2, over two of them
    assert "| 75.6 | 12.0 | – |" in table  # of one seed
    assert "99.0" not in table
    note = "Fréchet distance on features of x, 2,000 generated and 1,234 real images, ddim, 50 steps"
    assert f"Distance 1: {note}, guidance 4." in table
    assert f"Distance 2: {note}." in table


def test_figures_by_timestep_stand_beside_the_papers(tmp_path):
    made(tmp_path, "l-dae", 50.0)
    rows = [{"t": t, "noisy": noisy, "protocols": {"linear-fast": {"accuracy": 40.0 + t / 10 - noisy, "standard_error": 0.8}}}
            for t in (0, 10, 20, 40, 80) for noisy in (False, True)]  # fmt: skip
    depth = [{"protocols": {"linear-fast": {"accuracy": 30.0 + i, "standard_error": 0.8}}} for i in range(3)]
    sweep = {"kind": "sweep", "timesteps": rows, "depth": depth, "data": {"name": "x"}}
    made(tmp_path, "classical-dae", 30.0)
    for rung in ("classical-dae", "patch-pca"):  # neither is the last rung
        save_result(tmp_path / f"{rung}-seed0/results/sweep-x.json", {**sweep, "timesteps": [], "depth": depth[:1]})
    assert "block 3 of 3" not in tables(tmp_path)["blocks"]
    save_result(tmp_path / "l-dae-seed0/results/sweep-x.json", sweep)
    save_result(tmp_path / "l-dae-seed0/results/sweep-y.json", {**sweep, "timesteps": [], "data": {"name": "y"}})
    table = tables(tmp_path)["timesteps"].splitlines()
    assert table[2].startswith("| clean | 64.1 / 40.0 ± 0.8 | 64.5 / 41.0 ± 0.8 |")
    assert table[3].endswith("| 64.5 / 47.0 ± 0.8 |")
    assert tables(tmp_path)["blocks"].endswith("| linear-fast | 30.0 ± 0.8 | 31.0 ± 0.8 | 32.0 ± 0.8 |")


def test_a_report_keeps_the_words_around_it(tmp_path):
    made(tmp_path, "l-dae", 50.0)
    path = tmp_path / "docs" / "mine.md"
    path.parent.mkdir()
    path.write_text("# Mine\n<!-- setting -->\nold\n<!-- setting -->\nwords\n")
    assert report.write(tmp_path, path)[1] == tmp_path / "docs/mine/schedules.png"
    text = path.read_text()
    assert text.startswith("# Mine\n<!-- setting -->\n1 runs of 1 rungs")
    assert "<!-- setting -->\nwords\n" in text
    assert "old" not in text
    assert "\n<!-- claims -->\n34 claims" in text
    report.write(tmp_path, path)
    assert path.read_text() == text
    with pytest.raises(ValueError, match=r"Markdown file.*got '.*mine'"):
        report.write(tmp_path, path.with_suffix(""))
    path.write_text("<!-- claims -->\n")
    with pytest.raises(ValueError, match="twice, got it 1 times"):
        report.write(tmp_path, path)


def test_nothing_done_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rung in"):
        tables(tmp_path)
