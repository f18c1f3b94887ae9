"""Runs of train_ldae.py on a tiny model and a handful of images."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file

import train_ldae
from ldae import LDAEForPreTraining, interruption
from ldae.data.images import ImageDataset
from ldae.data.sources import load_examples
from ldae.features.encoders import load_encoder
from ldae.options import parse_arguments
from ldae.report.results import environment
from ldae.seeds import mix_seed
from ldae.training import probing
from ldae.training import run as run_module
from ldae.training.checkpoints import Checkpoints
from ldae.training.models import build_model
from ldae.training.recorder import Recorder
from ldae.training.run import CLOCKS, Run

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden_losses.json")
TINY = (
    "--image_size=16 --patch_size=4 --hidden_size=32 --num_hidden_layers=1 --num_attention_heads=2 --latent_dim=4",
    "--per_device_batch_size=4 --max_steps=6 --checkpointing_steps=2 --base_learning_rate=0.1 --report_to=none --no_probe",
    "--held_out=0",
)

TOKENIZER = ("--tokenizer_type", "patch_ae", "--prediction", "latent", "--tokenizer_epochs", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """22 smooth random images in two classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(22):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((25, 20), Image.Resampling.BICUBIC).save(root / "ab"[i % 2] / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory) -> Path:
    """The same images in parquet files, three of them for training."""
    root, paths = tmp_path_factory.mktemp("files"), sorted(folder.glob("*/*.png"))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    for name, part in (
        ("train-0", paths[:8]),
        ("train-1", paths[8:15]),
        ("train-2", paths[15:]),
        ("validation", paths),
    ):
        rows = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in part], "label": [0] * len(part)}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{name}.parquet", batch_size=2)
    return root


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(True)


def train(folder: Path, output: Path, *options: str) -> Path:
    return train_ldae.main(["--data", str(folder), "--output_dir", str(output), *" ".join(TINY).split(), *options])


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


def same_run(a: Path, b: Path):
    """The two runs' weights, averages, optimizers and losses are equal bit for bit."""
    assert losses(a) == losses(b)
    for name in ("model", "ema", "optimizer"):
        x, y = (load_file(Checkpoints(run / "checkpoints").last() / f"{name}.safetensors") for run in (a, b))
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x)


def stop_at(monkeypatch, step: int):
    """Makes the next run end like a crash once `step` steps are done, before it can save anything more."""
    steps = iter(range(1, 1000))
    real = EMAModel.step

    def ema_step(self, parameters):
        if next(steps) > step:
            raise KeyboardInterrupt
        real(self, parameters)

    monkeypatch.setattr(EMAModel, "step", ema_step)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--num_workers 2 --gradient_accumulation_steps 2 --crop random_resized",
        "--streaming",
        "--streaming --num_workers 2 --gradient_accumulation_steps 2 --crop random_resized",
    ],
    ids=["plain", "workers-accumulation-crops", "stream", "stream-workers-accumulation-crops"],
)
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(folder, files, tmp_path, monkeypatch, options):
    options = options.split()
    data = files if "--streaming" in options else folder
    train(data, tmp_path / "whole", *options)
    with monkeypatch.context() as context:
        stop_at(context, 5)
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "broken", *options)
    assert Checkpoints(tmp_path / "broken/checkpoints").last().name == "checkpoint-00000004"
    train(data, tmp_path / "broken", *options, "--resume")
    same_run(tmp_path / "whole", tmp_path / "broken")


def at_step(monkeypatch, step: int, do):
    """Makes the next run do something when the weights of a step, counted from 1, have been updated."""
    steps, real = iter(range(1, 1000)), EMAModel.step

    def ema_step(self, parameters):
        real(self, parameters)
        if next(steps) == step:
            do()

    monkeypatch.setattr(EMAModel, "step", ema_step)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("options", ["", "--streaming --num_workers 2 --gradient_accumulation_steps 2"])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    folder, files, tmp_path, monkeypatch, capsys, number, status, options
):
    options = [*options.split(), "--checkpointing_steps", "0"]
    data, before = files if "--streaming" in options else folder, signal.getsignal(number)
    train(data, tmp_path / "whole", *options)
    with monkeypatch.context() as context:
        at_step(context, 3, lambda: [os.kill(os.getpid(), number) for _ in range(2)])  # a launcher's too
        with pytest.raises(SystemExit) as ended:
            train(data, tmp_path / "run", *options)
    assert ended.value.code == status
    assert capsys.readouterr().err.endswith(
        f"\nInterrupted by {number.name}: the same command with --resume goes on.\n"
    )
    assert (Checkpoints(tmp_path / "run/checkpoints").last().name, len(losses(tmp_path / "run"))) == (
        "checkpoint-00000003", 3
    )  # fmt: skip
    assert signal.getsignal(number) is before
    train(data, tmp_path / "run", *options, "--resume")
    same_run(tmp_path / "whole", tmp_path / "run")


def test_a_second_signal_ends_the_run_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "ECHO", -1)
    at_step(monkeypatch, 3, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(SystemExit) as ended:
        train(folder, tmp_path / "run")
    assert ended.value.code == 130
    assert Checkpoints(tmp_path / "run/checkpoints").last().name == "checkpoint-00000002"


def test_a_signal_after_the_last_step_ends_the_run_at_once(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(train_ldae, "finish", lambda run: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            train(folder, tmp_path / "run")
    assert ended.value.code == 143
    train(folder, tmp_path / "run", "--resume")
    assert (tmp_path / "run/README.md").exists()


def test_a_signal_ends_the_processes_of_a_run(folder, tmp_path):
    """SIGTERM to all of them, as clusters send it: the workers end at once, and the run still writes its checkpoint."""
    command = [
        sys.executable,
        str(ROOT / "train_ldae.py"),
        "--data",
        str(folder),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    command += [*" ".join(TINY).split(), "--max_steps", "100000", "--checkpointing_steps", "0", "--num_workers", "2"]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not ((tmp_path / "run/losses.jsonl").exists() and losses(tmp_path / "run")):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) >= 2
    os.killpg(run.pid, signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 143, said
    assert "Traceback" not in said
    assert "Interrupted by SIGTERM: the same command with --resume goes on." in said
    assert int(Checkpoints(tmp_path / "run/checkpoints").last().name[-8:]) == len(losses(tmp_path / "run"))
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_a_worker_that_dies_ends_the_run_with_its_cause_and_a_checkpoint(folder, tmp_path, monkeypatch, capsys):
    options = ("--num_workers", "2", "--max_steps", "30", "--checkpointing_steps", "0")
    train(folder, tmp_path / "whole", *options)
    with monkeypatch.context() as context:
        at_step(context, 3, lambda: psutil.Process().children()[-1].kill())
        with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*is killed by signal: Killed"):
            train(folder, tmp_path / "run", *options)
    last = Checkpoints(tmp_path / "run/checkpoints").last()
    assert int(last.name[-8:]) == len(losses(tmp_path / "run")) >= 3
    assert f"The steps before it are in {last}; --resume goes on from it." in capsys.readouterr().out
    train(folder, tmp_path / "run", *options, "--resume")
    same_run(tmp_path / "whole", tmp_path / "run")


def test_checkpoints_are_written_by_minutes_too(folder, tmp_path, monkeypatch):
    """Steps of half a minute, and a checkpoint each minute."""
    saved, real, seconds = [], Run.save_checkpoint, iter(range(0, 10000, 30))
    monkeypatch.setitem(run_module.CLOCKS, "wall", lambda: next(seconds))
    monkeypatch.setattr(Run, "save_checkpoint", lambda run: (real(run), saved.append(run.state["step"])))
    train(folder, tmp_path / "run", "--checkpointing_steps", "0", "--checkpointing_minutes", "1")
    assert saved == [2, 4, 6]


def launch(folder: Path, output: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        str(ROOT / "train_ldae.py"),
        "--data",
        str(folder),
        "--output_dir",
        str(output),
        *" ".join(TINY).split(),
        *options,
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_train_a_tokenizer_then_the_ldae_and_probe_as_one(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data/train")
    shutil.copytree(folder, tmp_path / "data/val")
    options = ("--probe", "--knn_steps", "3", *TOKENIZER)
    two = launch(tmp_path / "data", tmp_path / "two", *options)
    assert two.wait(300) == 0, two.stderr.read()
    train(tmp_path / "data", tmp_path / "one", *options, "--per_device_batch_size", "8")
    a, b = (json.loads((tmp_path / name / "results/probe-data.json").read_text()) for name in ("two", "one"))
    assert a["data"] == b["data"]
    for part in ("protocols", "floor"):
        for name in ("knn", "linear-fast"):  # an image of 22 may change sides by rounding
            assert a[part][name]["accuracy"] == pytest.approx(b[part][name]["accuracy"], abs=100 / 22 + 1e-6)


@pytest.mark.compile
def test_a_compiled_run_loses_what_an_eager_one_does(folder, tmp_path):
    """After a tokenizer, which is not compiled."""
    options = (*TOKENIZER, "--num_hidden_layers", "3", "--decoder_num_hidden_layers", "2")
    train(folder, tmp_path / "eager", *options)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train(folder, tmp_path / "compiled", *options, "--torch_compile")
    # five blocks share what one compiles; encoder and decoder may each be compiled once
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert losses(compiled) == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
    LDAEForPreTraining.from_pretrained(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_two_processes_killed_and_resumed(folder, files, tmp_path, streaming):
    """Two processes are one with twice the batch, to rounding; killed and resumed they are themselves, bit for bit."""
    options = ("--max_steps", "40", "--checkpointing_steps", "2", *streaming)
    data = files if streaming else folder
    whole = launch(data, tmp_path / "whole", *options)
    assert whole.wait(300) == 0, whole.stderr.read()
    broken = launch(data, tmp_path / "broken", *options)
    while not (tmp_path / "broken/checkpoints/checkpoint-00000002").exists():
        assert broken.poll() is None, broken.stderr.read()
        time.sleep(0.01)
    processes = [
        broken,
        *psutil.Process(broken.pid).children(recursive=True),
    ]  # workers have process groups of their own
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    assert Checkpoints(tmp_path / "broken/checkpoints").last().name < "checkpoint-00000040"  # killed before its end
    resumed = launch(data, tmp_path / "broken", *options, "--resume")
    assert resumed.wait(300) == 0, resumed.stderr.read()
    same_run(tmp_path / "whole", tmp_path / "broken")
    train(data, tmp_path / "one", *options, "--per_device_batch_size", "8")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_golden_losses(folder, tmp_path):
    """A refactor reproduces the curve; to write it anew after a meant change, remove the file and run this test twice."""
    train(folder, tmp_path / "run", "--max_steps", "12")
    now = {"losses": losses(tmp_path / "run"), "made_on": {k: environment()[k] for k in ("versions", "hardware")}}
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(now, indent=1) + "\n")
        pytest.fail("there was no golden loss curve; it was written, look at it")
    golden = json.loads(GOLDEN.read_text())
    assert now["losses"][-1] < 0.9 * now["losses"][0]
    if golden["made_on"] == now["made_on"]:
        assert now["losses"] == golden["losses"]
    assert now["losses"] == pytest.approx(golden["losses"], rel=1e-3)  # other processors round otherwise


def test_the_folder_of_a_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data/train")
    shutil.copytree(folder, tmp_path / "data/val")
    output = train(tmp_path / "data", tmp_path / "run", "--probe", "--knn_steps", "4", "--image_steps", "3")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "modeling_ldae.py", "README.md",
                 "configuration_ldae.py", "denoised.png", "filters.png", "spectrum.png", "images/step-00000003.png",
                 "results/train.json"):  # fmt: skip
        assert (output / name).is_file(), name
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "checkpoint-00000004", "checkpoint-00000006"
    ]  # fmt: skip
    result = json.loads((output / "results/train.json").read_text())
    assert (result["steps"], result["images_seen"], result["data"]["num_images"]) == (6, 24, 22)
    probe = json.loads((output / "results/probe-data.json").read_text())
    assert set(probe["protocols"]) == {"knn", "linear-fast"} == set(probe["floor"]) - {"description"}
    # the result is the averaged model, with the tokenizer that PCA gave
    model = LDAEForPreTraining.from_pretrained(output)
    ema = load_file(output / "checkpoints/checkpoint-00000006/ema.safetensors")
    assert all(torch.equal(value, ema[name]) for name, value in model.state_dict().items())
    assert model.ldae.tokenizer.spectrum.sum() > 0


def test_two_splits_without_the_labels_of_one_are_trained_on_and_not_probed(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "data/val")
    for path in folder.glob("*/*.png"):
        (tmp_path / "data/train").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "data/train")
    output = train(tmp_path / "data", tmp_path / "run", "--probe", "--knn_steps", "2")
    assert "Nothing is probed: the training split has no labels" in capsys.readouterr().out
    assert [path.name for path in (output / "results").iterdir()] == ["train.json"]


def test_a_stream_is_all_that_is_read(files, tmp_path, monkeypatch):
    """No other split is prepared on disk for probes that cannot be."""
    streamed, real = [], datasets.load_dataset

    def load_dataset(*args, streaming=False, **kwargs):
        streamed.append(streaming)
        return real(*args, streaming=streaming, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    output = train(files, tmp_path / "run", "--streaming", "--probe", "--knn_steps", "2")
    assert streamed == [True]
    assert len(losses(output)) == 6


def test_online_probes_see_some_images(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "data/train")
    shutil.copytree(folder, tmp_path / "data/val")
    made, real = [], probing.Subject

    def subject(*args, **kwargs):
        made.append(real(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(probing, "Subject", subject)
    monkeypatch.setattr(probing, "KNN_IMAGES", 8)
    train(tmp_path / "data", tmp_path / "run", "--knn_steps", "2", "--probe")
    assert [(len(s.train), len(s.validation)) for s in made] == [(8, 8)] * 3 + [(22, 22)]
    assert made[0].train is made[1].train  # decoded once
    assert set(made[0].train.labels) == {0, 1}


def test_nothing_is_trained_for_a_run_that_will_be_refused(folder, tmp_path, monkeypatch):
    """A tokenizer would be trained first, perhaps for hours."""
    ae = ["--tokenizer_type", "patch_ae", "--prediction", "latent", "--input_space", "latent"]
    monkeypatch.setattr(train_ldae, "train", lambda *args: pytest.fail("a tokenizer was trained"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(FileExistsError, match=r"output_dir .*full.* is not empty"):
        train(folder, tmp_path / "full", *ae)
    monkeypatch.setattr("ldae.hub.push.get_token", lambda: None)
    with pytest.raises(ValueError, match="push_to_hub needs an access token"):
        train(folder, tmp_path / "new", *ae, "--push_to_hub")
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(folder / "a/00.png", flat)
    with pytest.raises(ValueError, match="class_conditional needs labels"):
        train(flat, tmp_path / "new", *ae, "--class_conditional")


def test_fewer_classes_than_labels_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"--num_classes 1: the label of image .* is 1, and there are 1 classes"):
        train(folder, tmp_path / "run", "--num_classes", "1")


def test_a_stream_trains_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"--streaming .*give --tokenizer FOLDER"):
        train(
            tmp_path / "data", tmp_path / "run", "--streaming", "--tokenizer_type", "patch_ae", "--prediction", "latent"
        )


def test_init_from_starts_a_new_run_from_weights(folder, tmp_path):
    first = train(folder, tmp_path / "first")
    second = train(
        folder, tmp_path / "second", "--init_from", str(first), "--learning_rate", "1e-12", "--ema_decay", "0"
    )
    a, b = (load_file(path / "model.safetensors") for path in (first, second))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    assert torch.equal(a["ldae.tokenizer.V"], b["ldae.tokenizer.V"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--latent_scaling global", "--latent_scaling global contradicts --init_from, whose tokenizer has component"),
        ("--patch_size 2 8", r"--patch_size \(2, 8\) contradicts --init_from, whose tokenizer has \(4, 4\)"),
        ("--prediction latent", "--init_from: decoder.*is .*, the configuration needs"),
        ("--subtract_mean False", "--subtract_mean False contradicts --init_from"),
        ("--num_hidden_layers 3", "--init_from: .* lacks .* of the weights of LDAEForPreTraining, such as .*layers"),
        ('--autoencoder {"layers_per_block":1}', None),  # a recipe's, for tokenizers of other rungs
    ],
)
def test_what_contradicts_the_weights_is_refused(tmp_path, options, message):
    given = ["--data", "photos", *" ".join(TINY).split()]
    LDAEForPreTraining(parse_arguments(given)[0].config()).save_pretrained(tmp_path)
    model_args, _, train_args = parse_arguments([*given, "--init_from", str(tmp_path), *options.split()])
    if message is None:
        assert build_model(model_args, train_args, None).config.latent_dim == model_args.latent_dim
        return
    with pytest.raises(ValueError, match=message):
        build_model(model_args, train_args, None)


@pytest.mark.parametrize(("layers", "refused"), [(1, False), (2, True)])
def test_a_convolutional_tokenizers_own_architecture_may_be_given_again(tmp_path, layers, refused):
    """A recipe's, which is a part of what the folder holds."""
    given = ["--data", "photos", *" ".join(TINY).split()]
    rung = ["--tokenizer_type=conv_vae", "--input_space=latent", "--prediction=noise", "--autoencoder"]
    small = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    LDAEForPreTraining(parse_arguments([*given, *rung, json.dumps(small)])[0].config()).save_pretrained(tmp_path)
    again = json.dumps({"block_out_channels": [8, 8], "layers_per_block": layers})
    model_args, _, train_args = parse_arguments([*given, "--init_from", str(tmp_path), "--autoencoder", again])
    if refused:
        with pytest.raises(ValueError, match="--autoencoder: layers_per_block 2 contradicts --init_from"):
            build_model(model_args, train_args, None)
    else:
        assert build_model(model_args, train_args, None).config.autoencoder["norm_num_groups"] == 4


def test_a_run_that_the_clock_ended_is_not_trained_further(folder, tmp_path):
    options = ("--max_minutes", "0.00001", "--warmup_ratio", "0")
    train(folder, tmp_path / "run", *options)
    weights, before = (tmp_path / "run/model.safetensors").read_bytes(), losses(tmp_path / "run")
    train(folder, tmp_path / "run", *options, "--resume")
    assert losses(tmp_path / "run") == before
    assert (tmp_path / "run/model.safetensors").read_bytes() == weights


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(folder, tmp_path, monkeypatch, capsys):
    train(folder, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    path = tmp_path / "broken/checkpoints/checkpoint-00000006/ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    train(folder, tmp_path / "broken", "--resume")
    assert "checkpoint-00000006 is damaged (ema.safetensors is not what was written)" in capsys.readouterr().out
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_an_image_that_goes_away_in_training_ends_no_run(folder, tmp_path, monkeypatch):
    """The fingerprint is that of the images that the run was started with."""
    data = shutil.copytree(folder, tmp_path / "data")
    before = ImageDataset(load_examples(str(data), "train"), (16, 16)).fingerprint()
    at_step(monkeypatch, 6, next(data.glob("a/*.png")).unlink)
    output = train(data, tmp_path / "run")
    assert json.loads((output / "results/train.json").read_text())["data"]["fingerprint"] == before


def test_a_run_whose_images_change_is_told_when_it_is_resumed(folder, tmp_path, monkeypatch, capsys):
    data = shutil.copytree(folder, tmp_path / "data")
    with monkeypatch.context() as context:
        stop_at(context, 5)
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "unchanged")
    train(data, tmp_path / "unchanged", "--resume")
    assert "have changed" not in capsys.readouterr().out
    for path in sorted(data.glob("a/*.png"))[:5]:
        path.unlink()
    output = train(data, tmp_path / "run", "--resume")
    said = capsys.readouterr().out
    assert f"The images of --data '{data}' have changed since the run was started: from step 5 on" in said
    now = ImageDataset(load_examples(str(data), "train"), (16, 16)).fingerprint()
    assert json.loads((output / "results/train.json").read_text())["data"]["fingerprint"] == now


def test_torn_lines_of_losses_are_named_and_left_out(folder, tmp_path, capsys):
    output = train(folder, tmp_path / "run")
    lines = (output / "losses.jsonl").read_text().splitlines()
    (output / "losses.jsonl").write_text("\n".join([lines[0], '{"st}', "[1]", *lines[3:5], lines[5][:9]]))
    train(folder, output, "--resume")
    said = capsys.readouterr().out
    assert [f"losses.jsonl, line {number}: damaged, and left out." in said for number in range(1, 7)] == [
        False, True, True, False, False, False
    ]  # fmt: skip
    assert (output / "losses.jsonl").read_text().splitlines() == [lines[0], *lines[3:5]]


def test_a_run_without_a_whole_checkpoint_is_not_started_afresh_unasked(folder, tmp_path):
    output = train(folder, tmp_path / "run")
    for state in output.glob("checkpoints/*/state.json"):
        state.unlink()
    with pytest.raises(ValueError, match=r"--resume: every checkpoint in .* is damaged; pass --overwrite too"):
        train(folder, output, "--resume")
    assert len(list(output.glob("checkpoints/*"))) == 2
    train(folder, output, "--resume", "--overwrite")
    assert Checkpoints(output / "checkpoints").last().name == "checkpoint-00000006"


def test_a_damaged_folder_is_refused(folder, tmp_path):
    output = train(folder, tmp_path / "run")
    path = output / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"--init_from: .*run' is damaged: model.safetensors is not what was written"):
        train(folder, tmp_path / "next", "--init_from", str(output))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"--model: .* is damaged: model.safetensors is not what was written"):
        load_encoder(str(output))


def read_later(monkeypatch):
    """Makes the next runs read the figures of a step when the following step has been made, as on a GPU."""
    real = Recorder.__init__

    def init(self, *args):
        real(self, *args)
        self.lag = 1

    monkeypatch.setattr(Recorder, "__init__", init)


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


def not_finite_at(monkeypatch, call: int, what: str = "loss"):
    """Makes the loss, or only its gradient, of the model's `call`-th forward in training, counted from 1, not finite."""
    real, calls = LDAEForPreTraining.forward, iter(range(1, 100))

    def forward(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        if self.training and next(calls) == call:
            output.loss = output.loss * float("nan") if what == "loss" else NoGradient.apply(output.loss)
        return output

    monkeypatch.setattr(LDAEForPreTraining, "forward", forward)


@pytest.mark.parametrize("later", [False, True], ids=["at-once", "a-step-later"])
@pytest.mark.parametrize("step", [2, 5, 6])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(folder, tmp_path, monkeypatch, what, step, later):
    """At the step of a checkpoint, which is not written then, between two, and at the last step."""
    not_finite_at(monkeypatch, step, what)
    if later:
        read_later(monkeypatch)
    last = (step - 1) // 2 * 2
    good = rf"checkpoint-0000000{last}.*whole" if last else "There is no checkpoint yet"
    with pytest.raises(FloatingPointError, match=rf"the {what}.* nan at step {step}, on a batch of .*\.png.*{good}"):
        train(folder, tmp_path / "run")
    checkpoints = sorted((tmp_path / "run/checkpoints").glob("*/*.safetensors"))
    assert len(checkpoints) == 3 * (last // 2)
    for path in checkpoints:
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    assert len(losses(tmp_path / "run")) == step - 1
    assert not (tmp_path / "run/config.json").exists()


@pytest.fixture
def fp16(monkeypatch):
    """fp16(scale): from now on, runs have accelerate's gradient scaler, as in fp16 on a GPU, with this scale at the beginning."""
    real, first = run_module._accelerator, []

    def accelerator(*args):
        made = real(*args)
        made.scaler, made.native_amp = torch.amp.GradScaler("cpu", init_scale=first[-1]), True
        made.state._mixed_precision = "fp16"
        return made

    monkeypatch.setattr(run_module, "_accelerator", accelerator)
    return first.append


def test_a_step_whose_scaled_gradient_overflows_changes_nothing(folder, tmp_path, monkeypatch, fp16):
    """Nor does it when the run is resumed in the middle of such steps: the scale falls on from where it was."""
    fp16(2.0**36)
    options = ("--max_steps", "20", "--ema_decay", "0.5")
    train(folder, tmp_path / "whole", *options)
    entries = [json.loads(line) for line in (tmp_path / "whole/losses.jsonl").read_text().splitlines()]
    assert "NaN" not in (tmp_path / "whole/losses.jsonl").read_text()
    skipped = [entry["grad_norm"] is None for entry in entries]
    number = sum(skipped)
    assert skipped == [True] * number + [False] * (20 - number)
    assert 3 < number < 18
    state = json.loads((Checkpoints(tmp_path / "whole/checkpoints").last() / "state.json").read_text())
    assert (state["averaged_steps"], state["loss_scale"]["scale"]) == (20 - number, 2.0 ** (36 - number))
    with monkeypatch.context() as context:
        calls, real = iter(range(1, 1000)), Run.advance
        context.setattr(
            Run, "advance", lambda run: (real(run), next(calls) == number - 1 and os.kill(os.getpid(), signal.SIGINT))
        )
        with pytest.raises(SystemExit):
            train(folder, tmp_path / "broken", *options)
    train(folder, tmp_path / "broken", *options, "--resume")
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_gradient_that_no_scale_makes_finite_stops_the_run(folder, tmp_path, monkeypatch, fp16):
    fp16(2.0**-22)
    monkeypatch.setattr(
        LDAEForPreTraining, "forward", lambda *a, real=LDAEForPreTraining.forward, **k: poisoned(real(*a, **k))
    )
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan at step 2"):
        train(folder, tmp_path / "run")


def poisoned(output):
    output.loss = NoGradient.apply(output.loss)
    return output


def test_a_loss_that_is_not_finite_names_the_images_of_its_micro_batch(folder, tmp_path, monkeypatch):
    not_finite_at(monkeypatch, 5)
    with pytest.raises(FloatingPointError, match=r"is nan at step 3, on a batch of") as error:
        train(folder, tmp_path / "run", "--gradient_accumulation_steps", "2")
    assert str(error.value).count(".png") == 4


def test_figures_that_are_read_a_step_later_are_the_same(folder, tmp_path, monkeypatch):
    train(folder, tmp_path / "at-once", "--image_steps", "3")
    read_later(monkeypatch)
    waiting, real = [], Recorder._report

    def report(self, step):
        waiting.append(self.state["step"] - step.number)
        real(self, step)

    monkeypatch.setattr(Recorder, "_report", report)
    train(folder, tmp_path / "later", "--image_steps", "3")
    assert waiting == [1, 0, 0, 0, 1, 0]  # images and checkpoints are made of weights whose loss has been read
    same_run(tmp_path / "at-once", tmp_path / "later")
    a, b = (json.loads((tmp_path / name / "results/train.json").read_text()) for name in ("at-once", "later"))
    assert (a["loss"], a["steps"]) == (b["loss"], b["steps"])


def test_two_runs_in_one_folder(folder, tmp_path, monkeypatch):
    """The second is refused before it changes anything, also where it would overwrite or resume; the first goes on."""
    second, real = iter(["--resume", "--overwrite"]), Run.save_checkpoint

    def save_checkpoint(run):
        real(run)
        before = sorted((tmp_path / "run").rglob("*"))
        if (option := next(second, None)) is not None:
            with pytest.raises(FileExistsError, match=rf"run' is in use by process {os.getpid()} on"):
                train(folder, tmp_path / "run", option)
            assert sorted((tmp_path / "run").rglob("*")) == before

    monkeypatch.setattr(Run, "save_checkpoint", save_checkpoint)
    train(folder, tmp_path / "run")
    assert next(second, None) is None
    assert len(losses(tmp_path / "run")) == 6
    assert not (tmp_path / "run/.lock").exists()


def test_a_lock_that_was_left_behind_locks_nothing(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text("process 1 on another machine")
    assert len(losses(train(folder, tmp_path / "run"))) == 6


def test_every_process_takes_its_part_of_all_noise(folder, tmp_path):
    """Whatever tensors a model's noise holds."""
    options = ["--data", str(folder), "--output_dir", str(tmp_path / "run"), *" ".join(TINY).split()]
    with Run(*parse_arguments(options)) as run:
        images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
        run.sample_noise = lambda size, generator: {
            "noise": torch.rand(size, 5, generator=generator), "keep": torch.arange(2 * size).view(size, 2)
        }  # fmt: skip
        run.images_per_batch = 12  # of three processes
        parts = []
        for index in range(3):
            run.accelerator = SimpleNamespace(process_index=index, device=torch.device("cpu"))
            parts.append(run.inputs({"pixel_values": images}, micro_step=0))
        generator = torch.Generator().manual_seed(mix_seed(0, 0, 0))
        assert torch.equal(torch.cat([part["noise"] for part in parts]), torch.rand(12, 5, generator=generator))
        assert torch.equal(torch.cat([part["keep"] for part in parts]), torch.arange(24).view(12, 2))
        assert all(torch.equal(part["pixel_values"], -torch.ones(4, 3, 16, 16)) for part in parts)


def test_unreadable_images_are_named_and_skipped_or_refused(folder, tmp_path, capsys):
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "a/broken.png").write_bytes((data / "a/00.png").read_bytes()[:60])
    output = train(data, tmp_path / "run")
    bad = json.loads((output / "results/train.json").read_text())["data"]["bad_images"]
    assert len(bad) == 1
    assert "broken.png" in bad[0]
    out = capsys.readouterr().out
    assert out.count(f"Skipping {data}/a/broken.png: ") == 1
    assert "Unreadable images, skipped: 1;" in out
    with pytest.raises(ValueError, match=r"on_bad_image error.*broken\.png"):
        train(data, tmp_path / "strict", "--on_bad_image", "error")


def test_images_that_all_are_unreadable_end_the_run_with_the_reason_of_the_first(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "data" / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of 2 images can be read; the first is .*\.png: UnidentifiedImageError"):
        train(tmp_path / "data", tmp_path / "run")


def test_a_run_never_replaces_another_unasked(folder, tmp_path, capsys):
    output = train(folder, tmp_path / "run")
    (output / "mine.txt").write_text("kept")
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"--resume.*--overwrite"):
        train(folder, output)
    with pytest.raises(ValueError, match=r"--resume .* seed was 0, is 1"):
        train(folder, output, "--resume", "--seed", "1")
    assert (output / "model.safetensors").read_bytes() == before
    train(folder, output, "--overwrite", "--seed", "1")
    assert (output / "model.safetensors").read_bytes() != before
    assert (output / "mine.txt").read_text() == "kept"
    train(folder, tmp_path / "fresh", "--resume")
    assert "starting afresh" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--latent_dim 999", "latent_dim"),
        ("--image_size 17", "patch_size must divide image_size"),
        ("--init_from /nowhere", "/nowhere"),
        ("--push_to_hub", "push_to_hub needs an access token"),
        ("--train_split nope", "nope"),
        ("--validation_split nope", "nope"),
    ],
)
def test_bad_options_are_refused_before_any_work(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("ldae.hub.push.get_token", lambda: None)
    with pytest.raises((ValueError, OSError), match=message):
        train(folder, tmp_path / "run", *options.split())
    assert not (tmp_path / "run").exists()


def test_the_clock_of_a_run_is_the_one_that_was_asked_for(folder, tmp_path, monkeypatch):
    ticks = itertools.count()  # a second for every look: one as the first step begins, and one a step
    monkeypatch.setitem(CLOCKS, "processor", lambda: float(next(ticks)))
    for name in (
        "fit_to_images",
        "training_loader",
    ):  # what prepares the PCA and the images takes long, and is no training
        slow = partial(slowed, getattr(run_module, name), lambda: [next(ticks) for _ in range(1000)])
        monkeypatch.setattr(run_module, name, slow)
    for steps, resume in ((3, []), (5, ["--resume"])):
        limit = f"--max_minutes={steps / 60}"
        output = train(folder, tmp_path / "run", "--clock=processor", limit, "--image_steps=0", *resume)
        result = json.loads((output / "results/train.json").read_text())
        assert (result["steps"], result["seconds"], result["clock"]) == (steps, float(steps), "processor")
        assert result["images_per_second"] == 4.0


def slowed(function, wait, *args, **kwargs):
    wait()
    return function(*args, **kwargs)
