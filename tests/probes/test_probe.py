"""The probing script, end to end on tiny models and a tiny folder of images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

import probe_ldae
from ldae import LDAEConfig, LDAEForPreTraining
from ldae.data.images import ImageDataset
from ldae.data.sources import load_examples
from ldae.features import extraction
from ldae.features.encoders import Encoder
from ldae.probes import Knn, LinearFast, Subject, unpack

TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
COLOURS = {"blue": (60, 60, 190), "green": (60, 190, 60), "red": (190, 60, 60)}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Features are cached below the home folder, results of foreign models below the working folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path):
    """Noisy images of three colours: 10 of each to learn from, 5 of each to measure."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 5)):
        for name, colour in COLOURS.items():
            folder = tmp_path / "colours" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 120, (20, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "colours"


@pytest.fixture
def folder(tmp_path):
    """A saved l-DAE with its decoder."""
    torch.manual_seed(0)
    model = LDAEForPreTraining(LDAEConfig(**TINY, latent_dim=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def run(*arguments):
    return json.loads(probe_ldae.main([*map(str, arguments), "--device", "cpu"]).read_text())


def by_hand(encoder, data, *protocols):
    """What protocols give for an encoder when they are called without the script."""
    splits = (ImageDataset(load_examples(str(data), split), (16, 16)) for split in ("train", "validation"))
    subject = Subject(encoder, *splits)
    return {protocol.name: json.loads(json.dumps(protocol(subject))) for protocol in protocols}


def figures(measured):
    """Without what differs from run to run."""
    return {
        name: {key: value for key, value in part.items() if key not in ("seconds", "commit")}
        for name, part in measured.items()
        if name != "description"
    }


def test_end_to_end(folder, data, capsys):
    result = run("--model", folder, "--data", data, "--knn_k", 5, "--batch_size", 4)
    assert (folder / "results" / "probe-colours.json").exists()
    assert (result["kind"], result["model"], result["seed"]) == ("probe", folder.name, 0)
    assert {key: result["data"][key] for key in ("name", "num_train", "num_validation", "num_classes")} == {
        "name": "colours", "num_train": 30, "num_validation": 15, "num_classes": 3,
    }  # fmt: skip
    assert result["commit"] is None or len(result["commit"]) >= 40
    encoder = Encoder(LDAEForPreTraining.from_pretrained(folder))
    expected = by_hand(encoder, data, Knn(knn_k=5), LinearFast())
    assert figures(result["protocols"]) == figures(expected)
    assert figures(result["floor"]) == figures(by_hand(encoder.untrained(), data, Knn(knn_k=5), LinearFast()))
    right = unpack(result["protocols"]["knn"]["predictions"]) == unpack(result["data"]["labels"])
    assert (len(right), 100 * right.mean()) == (15, pytest.approx(expected["knn"]["accuracy"]))
    out = capsys.readouterr().out
    assert f"{expected['knn']['accuracy']:.1f} ± {expected['knn']['standard_error']:.1f}" in out


EVERY = [
    "knn", "knn-whitened", "linear", "linear-fast", "attentive", "attentive-efficient", "finetune", "few-shot", "retrieval",
]  # fmt: skip


def test_every_protocol_with_sweep_and_figures(folder, data, capsys):
    assert sorted(EVERY) == sorted(probe_ldae.PROTOCOLS)
    few = ["--linear_epochs", 2, "--linear_batch_size", 8, "--attentive_epochs", 1, "--attentive_efficient_epochs", 1]
    few += ["--finetune_epochs", 1, "--finetune_batch_size", 10, "--few_shot_shots", 1, 2, "--few_shot_draws", 2]
    few += ["--linear_fast_iterations", 20]
    result = run("--model", folder, "--data", data, "--protocols", *EVERY, *few, "--sweep", "--figures")
    assert list(result["protocols"]) == EVERY
    assert list(result["floor"]) == ["description", *EVERY]
    made = {path.name for path in (folder / "results").iterdir()}
    assert {"probe-colours.json", "sweep-colours.json", "sweep-colours.png", "neighbours-colours.png"} <= made
    assert {f"confusion-{name}-colours.png" for name in EVERY if name not in ("few-shot", "retrieval")} <= made
    out = capsys.readouterr().out
    lines = out.splitlines()
    first = 1 + next(index for index, line in enumerate(lines) if line.startswith("in %"))  # the table's head
    assert [line.split()[0] for line in lines[first : first + len(EVERY)]] == EVERY
    assert "decoder block 1" in out


def test_protocols_are_added_and_not_measured_again(folder, data, monkeypatch):
    first = run("--model", folder, "--data", data, "--protocols", "knn")
    both = run("--model", folder, "--data", data, "--protocols", "knn", "retrieval")
    assert both["protocols"]["knn"] == first["protocols"]["knn"]  # with its seconds: the very same
    assert list(both["protocols"]) == ["knn", "retrieval"]
    with pytest.raises(FileExistsError, match="--knn_k"):
        run("--model", folder, "--data", data, "--protocols", "knn", "--knn_k", 3)
    with pytest.raises(FileExistsError, match="seed"):
        run("--model", folder, "--data", data, "--protocols", "linear-fast", "--seed", 1)
    with monkeypatch.context() as later:  # in which the protocol does another thing
        later.setattr(Knn, "description", "the vote of a later version")
        with pytest.raises(FileExistsError, match=r"holds knn as it was measured once: weighted 20-NN .*; choose"):
            run("--model", folder, "--data", data, "--protocols", "knn")
    again = run("--model", folder, "--data", data, "--protocols", "knn", "--knn_k", 3, "--overwrite")
    for part in ("protocols", "floor", "random_vit", "thumbnail"):
        assert again[part]["knn"]["settings"]["knn_k"] == 3
    assert again["protocols"]["retrieval"] == both["protocols"]["retrieval"]


def test_without_a_baseline(folder, data, capsys):
    result = run("--model", folder, "--data", data, "--protocols", "knn", "--no_baseline")
    assert result["floor"] == {}
    assert not {"random_vit", "thumbnail"} & result.keys()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("knn "))
    assert "–" not in line


def test_attentive_protocols_leave_the_cache_to_the_others(folder, data, tmp_path, monkeypatch):
    options = ["--model", folder, "--data", data, "--attentive_epochs", 1, "--protocols", "knn"]
    cache = tmp_path / "home" / ".cache" / "ldae" / "features"
    both = run(*options, "attentive", "--output_dir", tmp_path / "both")
    assert (
        len(list(cache.glob("*.safetensors"))) == 6
    )  # two splits of the encoder, the network as initialized, the random ViT
    shared = extraction.shared_features

    def only_thumbnails(*args, represent, **kwargs):
        assert represent is not None
        return shared(*args, represent=represent, **kwargs)

    monkeypatch.setattr(extraction, "shared_features", only_thumbnails)
    knn = run(*options, "--output_dir", tmp_path / "knn")
    for part in ("protocols", "floor", "random_vit", "thumbnail"):
        assert figures({"knn": knn[part]["knn"]}) == figures({"knn": both[part]["knn"]})


def test_unreadable_images_are_named(folder, data, capsys):
    (data / "train" / "red" / "0.png").write_bytes(b"no image")
    result = run("--model", folder, "--data", data, "--protocols", "knn")
    assert result["data"]["num_train"] == 29
    (name,) = result["data"]["unreadable"]
    assert name.startswith("colours/train/red/0.png: UnidentifiedImageError")
    assert f"left out, unreadable: {data / 'train/red/0.png'}: UnidentifiedImageError" in capsys.readouterr().out
    assert list(result["protocols"]) == ["knn"]


def test_a_foreign_model_with_its_image_processor(data, tmp_path):
    torch.manual_seed(0)
    mae = ViTMAEForPreTraining(ViTMAEConfig(**TINY, decoder_hidden_size=16, decoder_num_attention_heads=2))
    mae.save_pretrained(tmp_path / "mae")
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=mean, image_std=std).save_pretrained(
        tmp_path / "mae"
    )
    result = run("--model", tmp_path / "mae", "--data", data, "--knn_k", 5)
    expected = by_hand(Encoder(mae, mean=mean, std=std), data, Knn(knn_k=5), LinearFast())
    assert figures(result["protocols"]) == figures(expected)


# -------------------------------------------------------------------------------------------------------------- refused


def test_an_earlier_result_is_kept(folder, data):
    path = folder / "results" / "probe-colours.json"
    path.parent.mkdir()
    path.write_text("{}")
    with pytest.raises(FileExistsError, match="--overwrite"):
        run("--model", folder, "--data", data)
    assert path.read_text() == "{}"


def test_a_broken_result_is_named_or_overwritten(folder, data):
    path = folder / "results" / "probe-colours.json"
    path.parent.mkdir()
    path.write_text('{"identity": "')
    with pytest.raises(ValueError, match=r"probe-colours\.json is damaged"):
        run("--model", folder, "--data", data, "--protocols", "knn")
    assert "knn" in run("--model", folder, "--data", data, "--protocols", "knn", "--overwrite")["protocols"]


def test_an_earlier_sweep_is_kept(folder, data):
    path = folder / "results" / "sweep-colours.json"
    path.parent.mkdir()
    path.write_text("{}")
    with pytest.raises(FileExistsError, match="holds an earlier sweep"):
        run("--model", folder, "--data", data, "--protocols", "knn", "--no_baseline", "--sweep")
    assert path.read_text() == "{}"


def test_no_labels(folder, data):
    for path in data.glob("*/*/*.png"):
        path.rename(path.parents[1] / f"{path.parent.name}{path.name}")
    with pytest.raises(ValueError, match="--label_column"):
        run("--model", folder, "--data", data)


def test_no_validation_split(folder, data):
    (data / "val").rename(data / "unused")
    with pytest.raises(ValueError, match="--validation_split"):
        run("--model", folder, "--data", data)


def test_splits_of_different_classes(folder, data):
    """Class numbers come from the folders' names: one more in validation would shift the others without a word."""
    (data / "train" / "blue").rename(data / "unused")
    with pytest.raises(ValueError, match="blue"):
        run("--model", folder, "--data", data)


def test_wrong_paths(folder, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="--model"):
        run("--model", tmp_path / "nowhere", "--data", data)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run("--model", folder, "--data", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="--model"):
        run("--model", data, "--data", data, "--output_dir", tmp_path / "out")  # no model's folder


def test_code_of_a_model_is_not_run_unasked(data, tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        run("--model", folder, "--data", data)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_protocol_is_named():
    with pytest.raises(ValueError, match="--protocols: 'everything' is none of knn, "):
        probe_ldae.parse_arguments(["--model", "x", "--protocols", "knn", "everything"])


@pytest.mark.parametrize(("option", "value"), [("--knn_k", "0"), ("--batch_size", "0"), ("--num_workers", "-1")])
def test_impossible_values(option, value, capsys):
    with pytest.raises(SystemExit):
        probe_ldae.parse_arguments(["--model", "x", option, value])
    assert f"argument {option}: must be an integer of at least " in capsys.readouterr().err


def test_a_chosen_protocol_checks_its_options(tmp_path):
    (tmp_path / "file").touch()
    options = ["--model", "x", "--finetune_output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="--finetune_output_dir must be new or empty"):
        probe_ldae.parse_arguments([*options, "--protocols", "finetune"])
    probe_ldae.parse_arguments([*options, "--protocols", "knn"])


def test_a_model_must_be_named(capsys):
    with pytest.raises(SystemExit):
        probe_ldae.parse_arguments([])
    assert "required: --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "short"), [("org/data-set", "org-data-set"), ("photos", "photos"), ("../../etc/x y", "etc-x-y")]
)
def test_names_become_safe_file_names(name, short):
    assert probe_ldae.short_name(name) == short


def test_a_folder_is_named_as_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "disk 2" / "below").mkdir(parents=True)
    (tmp_path / "Pictures").symlink_to(tmp_path / "disk 2")
    assert probe_ldae.short_name(f"{tmp_path}/Pictures/") == "Pictures"
    monkeypatch.chdir(tmp_path / "disk 2" / "below")
    assert probe_ldae.short_name("..") == "disk-2"


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.mark.slow
def test_two_processes_equal_one(folder, data, tmp_path):
    """Four batches of training and two of validation images are shared; one of the second half is unreadable."""
    (data / "train" / "red" / "9.png").write_bytes(b"no image")
    options = ["--model", folder, "--data", data, "--batch_size", 8, "--protocols", "knn", "linear", "attentive"]
    options += ["--linear_epochs", 3, "--linear_batch_size", 8, "--attentive_epochs", 1, "--features_cache"]
    one = run(*options, tmp_path / "one", "--output_dir", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command += [Path(probe_ldae.__file__), *options, tmp_path / "two", "--output_dir", tmp_path / "two"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), check=True, env=environment, timeout=300)
    two = json.loads((tmp_path / "two" / "probe-colours.json").read_text())
    assert figures(two["protocols"]) == figures(one["protocols"])
    for part in ("floor", "random_vit", "thumbnail"):
        assert figures(two[part]) == figures(one[part])
    assert two["data"] == one["data"]
    one, two = (sorted(path.name for path in (tmp_path / run).glob("*.safetensors")) for run in ("one", "two"))
    assert two == one
    assert len(one) == 6  # two splits of the encoder, the network as initialized, the random ViT
    command += ["--figures"]  # of images whose features no protocol asks for again
    subprocess.run(list(map(str, command)), check=True, env=environment, timeout=300)
    assert (tmp_path / "two" / "neighbours-colours.png").is_file()
