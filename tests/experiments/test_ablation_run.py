"""The ablation runs what is not done, each once, and says what it costs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from ablation_stand_in import TINY, made, make_ablation
from PIL import Image

import probe_ldae
from experiments.ablation import processes, report, run, rungs
from experiments.ablation.processes import Processes
from experiments.ablation.tables import tables
from ldae import LDAEForPreTraining
from ldae.generation.command import GenerationArguments
from ldae.options import option_parser
from ldae.report.results import save_result
from ldae.training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_runs_reload_and_are_reported(recipe, tmp_path, capsys):
    """Two rungs as the command runs them: processes of their own."""
    command = [recipe, "--output_dir", str(tmp_path / "ablation"), "--rungs", "patch-ae", "l-dae", "--seeds", "3"]
    command += ["--workers", "2"]
    run.main([*command, "--dry_run", "--", *TINY])
    assert "2 runs to do" in capsys.readouterr().out
    assert not (tmp_path / "ablation").exists()
    run.main([*command, "--sweep", "--", *TINY])
    out = capsys.readouterr().out
    assert f"What each run says: {tmp_path}" in out
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


def test_a_tokenizer_is_trained_once_before_the_rungs_that_share_it(recipe, tmp_path, monkeypatch, capsys):
    """With the processes replaced by what they would leave. The bar names what runs."""
    calls = []

    def train(processes, command, *_):
        folder = Path(command[command.index("--output_dir") + 1])
        given = command[command.index("--tokenizer") + 1] if "--tokenizer" in command else None
        calls.append((folder, "--tokenizer_only" in command, given))
        broken = "no-perceptual" in folder.name
        if not broken:
            (folder / "results").mkdir(parents=True)
            (folder / "results/train.json").write_text('{"kind": "train", "seconds": 60}')
        return int(broken)

    monkeypatch.setattr(Processes, "run", train)
    some = [rungs.RUNGS[name] for name in ("no-perceptual", "no-adversarial", "linear-gamma2", "patch-pca")]
    ablation = make_ablation(recipe, some, tmp_path, [7])
    assert "2 tokenizers to do, 2 at a time: unknown until one is done" in ablation.plan()
    assert ablation.run() == ["tokenizers/no-perceptual-seed7", "no-perceptual-seed7 (its tokenizer failed)"]
    assert "no-perceptual-seed7, no-adversarial-seed7" in capsys.readouterr().err
    shared = tmp_path / "tokenizers/no-adversarial-seed7"
    assert {folder for folder, only, _ in calls[:2] if only} == {shared, tmp_path / "tokenizers/no-perceptual-seed7"}
    assert sorted(calls[2:]) == [
        (tmp_path / "linear-gamma2-seed7", False, str(shared)),
        (tmp_path / "no-adversarial-seed7", False, str(shared)),
        (tmp_path / "patch-pca-seed7", False, None),
    ]
    assert "1 tokenizer to do, 2 at a time: 60 seconds, from 1 that are done" in ablation.plan()


def test_distances_and_sweeps_are_measured_once_after_the_runs(recipe, tmp_path, monkeypatch):
    """With the processes replaced by what they would leave; the second rung's training fails."""
    calls = []

    def execute(processes, command, *_):
        calls.append(command[2])
        folder = Path(command[command.index("--output_dir" if "--output_dir" in command else "--model") + 1])
        if "no-adversarial-seed" in str(folder) and "tokenizers" not in str(folder):
            return 1
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
        return 0

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
        context.setattr(Processes, "run", execute)
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
        context.setattr(Processes, "run", lambda processes, command, *_: calls.append(command) or 0)
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


def test_baselines_are_measured_with_the_first_seed_alone(recipe, tmp_path):
    ablation = make_ablation(recipe, [rungs.RUNGS["l-dae"]], tmp_path, [5, 4])
    commands = {seed: ablation.command(folder, rung, seed) for folder, rung, seed in ablation.jobs()}
    assert {seed: "--no_baseline" in command for seed, command in commands.items()} == {5: False, 4: True}


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

    def interrupted(processes, command, *_):
        started.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(Processes, "run", interrupted)
    some = [rungs.RUNGS[name] for name in ("patch-pca", "clean-latent", "image-input", "l-dae")]
    with pytest.raises(KeyboardInterrupt):
        make_ablation(recipe, some, tmp_path, workers=1).run()
    assert len(started) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_runs_end_with_the_ablation(recipe, tmp_path, number, status):
    """With a checkpoint of their last step."""
    folder = tmp_path / "ablation/l-dae-seed0"
    command = [sys.executable, "-m", "experiments.ablation.run", recipe, "--output_dir", str(folder.parent)]
    command += ["--workers", "2", "--rungs", "l-dae", "--seeds", "0", "--", *TINY]
    command += ["--max_steps", "100000", "--checkpointing_steps", "0"]
    ablation = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    losses = folder / "losses.jsonl"
    while not (losses.exists() and losses.read_text()):
        assert ablation.poll() is None, ablation.stderr.read()
        time.sleep(0.1)
    (training,) = psutil.Process(ablation.pid).children()
    ablation.send_signal(number)
    said = ablation.communicate(timeout=60)[1]
    assert ablation.returncode == status
    assert not psutil.wait_procs([training], timeout=60)[1]
    assert "Interrupted by SIGTERM: the same command with --resume goes on." in Path(f"{folder}.log").read_text()
    last = Checkpoints(folder / "checkpoints").last()
    assert int(last.name[-8:]) == len(losses.read_text().splitlines())
    if number is not signal.SIGKILL:
        assert f"Interrupted by {number.name}: the same command goes on." in said
        assert "Traceback" not in said


def test_nothing_is_started_once_processes_have_ended(tmp_path):
    ended = Processes()
    with pytest.raises(KeyboardInterrupt), ended:
        raise KeyboardInterrupt
    assert ended.run(["touch", str(tmp_path / "file")], tmp_path / "log") == -signal.SIGTERM
    assert not (tmp_path / "file").exists()


def test_every_worker_has_its_share_of_the_cores_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(processes.joblib, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert processes._environment(0, 3)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert processes._environment(0, 3)["OMP_NUM_THREADS"] == "1"


def test_every_worker_has_a_gpu_of_those_that_may_be_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert [processes._environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["2", "3", "2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [processes._environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]


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
def test_what_the_ablation_decides_cannot_be_given(recipe, given, name):
    """Each is a valid option of train_ldae.py."""
    with pytest.raises(ValueError, match=f"rungs, or the ablation itself, decide {name}: leave them out after --"):
        run.main([recipe, "--dry_run", "--", *given.split()])


def test_a_recipe_does_not_decide_about_classes(recipe):
    with open(recipe, "a") as file:
        file.write("num_classes: 2\n")
    with pytest.raises(ValueError, match="leave num_classes out of the recipe"):
        run.main([recipe, "--dry_run"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("--rungs l-dea", "--rungs: 'l-dea' is none of all, dit, "),
        ("--generate 1", "--generate must be 0 or at least 2, got 1"),
        ("--encoder org/mae", "--encoder is the one that --generate measures with"),
        ("--autoencoder org/vae --without_lpips", "give one of the two"),
    ],
)
def test_options_that_contradict_each_other_end_the_command(recipe, given, text):
    with pytest.raises(ValueError, match=text):
        run.main([recipe, "--dry_run", *given.split(), "--", *TINY])


@pytest.mark.parametrize("given", ["--workers 0", "--generate -1", "--seeds -1"])
def test_numbers_out_of_bounds_end_the_command(recipe, given, capsys):
    with pytest.raises(SystemExit):
        run.main([recipe, "--dry_run", *given.split()])
    assert f"argument {given.split()[0]}: " in capsys.readouterr().err


def test_data_that_cannot_be_probed_ends_the_command(recipe, tmp_path):
    with pytest.raises(ValueError, match="rungs are probed, which --streaming cannot be"):
        run.main([recipe, "--output_dir", str(tmp_path / "out"), "--rungs", "l-dae", "--", *TINY, "--streaming"])
    with pytest.raises(ValueError, match="no validation split"):
        run.main([recipe, "--output_dir", str(tmp_path / "out"), "--", *TINY, "--data", str(tmp_path / "data/train/a")])
    with pytest.raises(ValueError, match="has no folder 'nowhere'"):
        run.main([recipe, "--output_dir", str(tmp_path / "out"), "--", *TINY, "--train_split", "nowhere"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_fails_is_named(recipe, tmp_path):
    command = [recipe, "--output_dir", str(tmp_path / "ablation"), "--rungs", "l-dae", "--seeds", "0", "--", *TINY]
    with pytest.raises(SystemExit, match="l-dae-seed0"):
        run.main([*command, "--attn_implementation", "nowhere"])
    assert "nowhere" in (tmp_path / "ablation/l-dae-seed0.log").read_text()


def test_the_cost_is_that_of_training_and_probing(recipe, tmp_path):
    """A minute of training for each rung that is done, and 30 s of probing; three that are to be done, two at a time."""
    made(tmp_path, "l-dae", 50.0)
    made(tmp_path, "patch-pca", 50.0)
    some = [rungs.RUNGS[name] for name in ("l-dae", "image-input", "image-output", "clean-latent")]
    plan = make_ablation(recipe, some, tmp_path, [0]).plan()
    assert "3 runs to do, 2 at a time: 3 minutes, from 2 that are done" in plan


def test_the_cost_is_that_of_the_same_kind_of_tokenizer(recipe, tmp_path):
    """One that takes ten minutes and two of a minute, all with 30 s of probing, one after the other."""
    made(tmp_path, "l-dae", 50.0)
    made(tmp_path, "linear-gamma2", 50.0)
    path = tmp_path / "linear-gamma2-seed0/results/train.json"
    save_result(path, {**json.loads(path.read_text()), "seconds": 600}, overwrite=True)
    some = [rungs.RUNGS[name] for name in ("no-adversarial", "image-input", "image-output")]
    plan = make_ablation(recipe, some, tmp_path, [0], workers=1).plan()
    assert "3 runs to do, 1 at a time: 13.5 minutes, from 2 that are done" in plan
