"""`train_ldae.py --dry_run` says what a run would be, and leaves nothing."""

import json
import re

import pytest
from accelerate.state import AcceleratorState

import train_ldae
from ldae.names import duration
from ldae.training import learning

pytestmark = pytest.mark.usefixtures("few_photos")

MODEL = "--image_size 16 --patch_size 4 --hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --latent_dim 4"


def rehearsed(capsys, tmp_path, *options: str) -> dict[str, str]:
    arguments = [*MODEL.split(), "--output_dir", str(tmp_path / "run"), "--dry_run", *options]
    assert train_ldae.main(arguments) is None
    lines = capsys.readouterr().out.splitlines()
    return dict(re.split(r": +", line, maxsplit=1) for line in lines if re.match(r"[a-z]+: ", line))


def test_facts(capsys, tmp_path):
    said = rehearsed(capsys, tmp_path, "--epochs", "3", "--keep_ratio", "0.5", "--per_device_batch_size", "13")
    assert not (tmp_path / "run").exists()
    AcceleratorState._reset_state(True)
    length = ("--max_steps", "1", "--no_probe", "--report_to", "none")
    folder = train_ldae.main([*MODEL.split(), "--output_dir", str(tmp_path / "run"), *length, "--keep_ratio", "0.5"])
    parameters = sum(p.numel() for p in train_ldae_model(folder).parameters())
    assert f" {parameters / 1e6:.1f} M parameters" in said["model"]
    assert said["images"].startswith("photos: 26 images at 16 x 16 px, 16 patches of 4 x 4, ")
    assert said["images"].endswith("sees 50%")
    assert said["step"].startswith("13 images; ")
    assert said["time"].endswith(": 6 steps, 3 epochs")  # 3 * 26 / 13
    assert json.loads((folder / "results/train.json").read_text())["steps"] == 1


def train_ldae_model(folder):
    from ldae import LDAEForPreTraining

    return LDAEForPreTraining.from_pretrained(folder)


@pytest.mark.parametrize(("few", "expected"), [(27, True), (26, False)])
def test_few_images_are_said(capsys, tmp_path, monkeypatch, few, expected):
    monkeypatch.setattr(learning, "FEW", few)
    arguments = [*MODEL.split(), "--output_dir", str(tmp_path / "run"), "--dry_run", "--held_out", "0"]
    train_ldae.main(arguments)
    assert ("26 images are few to learn from: " in capsys.readouterr().out) == expected


def test_the_clock_ends_a_run(capsys, tmp_path):
    said = rehearsed(capsys, tmp_path, "--max_minutes", "90", "--clock", "processor")
    assert said["time"].startswith("1.5 hours of the processor, ")
    images_a_second = float(said["speed"].split()[0].replace(",", ""))
    steps = int(re.search(r"([\d,]+) steps", said["time"])[1].replace(",", ""))
    assert steps * 64 == pytest.approx(90 * 60 * images_a_second, rel=0.05)


def test_another_runs_folder_is_left_alone_and_an_untrained_tokenizer_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/file").touch()
    train_ldae.main([*MODEL.split(), "--output_dir", str(tmp_path / "run"), "--dry_run"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]
    tokenizer = ["--tokenizer_type", "patch_ae", "--prediction", "latent", "--output_dir", str(tmp_path / "other")]
    with pytest.raises(ValueError, match="--tokenizer FOLDER"):
        train_ldae.main([*MODEL.split(), *tokenizer, "--dry_run"])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.21, "0.21 seconds"), (119, "119 seconds"), (150, "2.5 minutes"), (5400, "1.5 hours"), (864000, "10 days")],
)
def test_duration(seconds, words):
    assert duration(seconds) == words
