"""Fine-tuning, on tiny encoders and images of three colours."""

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from ldae import LDAEModel
from ldae.data.images import ImageDataset, to_pixel_values
from ldae.data.sources import load_examples
from ldae.features.encoders import Encoder
from ldae.probes import finetune
from ldae.probes.finetune import Classifier, FineTune, drop_blocks, freeze_unused
from ldae.probes.subject import Subject

TINY = {
    "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
COLOURS = {"blue": (60, 60, 190), "green": (60, 190, 60), "red": (190, 60, 60)}
PLAIN = {
    f"finetune_{name}": 0 for name in ("drop_path", "mixup", "cutmix", "randaugment", "label_smoothing", "erasing")
}
FAST = {"finetune_epochs": 1, "finetune_batch_size": 16}


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """It is half of the time of runs as short as these."""
    monkeypatch.setattr(Accelerator, "free_memory", lambda accelerator: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noisy images of three colours: 16 of each to learn from, 7 of each to measure."""
    root = tmp_path_factory.mktemp("data") / "colours"
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 7)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 60, (20, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def make_encoder():
    torch.manual_seed(0)
    return Encoder(ViTModel(ViTConfig(**TINY)).eval())


def make_subject(data, encoder, validation=None, **fields):
    splits = (load_examples(str(data), "train"), validation or load_examples(str(data), "validation"))
    train, validation = (ImageDataset(part, encoder.image_hw, encoder.num_channels) for part in splits)
    return Subject(encoder, train, validation, Accelerator(cpu=True), batch_size=8, **fields)


@pytest.fixture
def subject(data):
    return make_subject(data, make_encoder())


@pytest.fixture
def ldae_subject(data, tiny_model):
    return make_subject(data, Encoder(tiny_model(LDAEModel, image_size=16)))


@pytest.mark.parametrize("fastest", ["eager", None])
def test_it_takes_the_attention_that_trains_fastest(subject, monkeypatch, fastest):
    used = []
    monkeypatch.setattr(finetune.launch, "attention", lambda accelerator: fastest)
    monkeypatch.setattr(
        finetune,
        "shared_features",
        lambda encoder, *args, **kwargs: used.append(encoder.model.config._attn_implementation),
    )
    assert FineTune(**FAST).measure(subject) is None  # as on a process without features
    assert used == [fastest or "sdpa"]
    assert subject.encoder.model.config._attn_implementation == "sdpa"


def test_it_learns_and_leaves_the_encoder_as_it_was(subject):
    before = copy.deepcopy(subject.encoder.state_dict())
    modes = [module.training for module in subject.encoder.modules()]
    grads = [parameter.requires_grad for parameter in subject.encoder.parameters()]
    protocol = FineTune(
        finetune_epochs=10, finetune_batch_size=16, finetune_base_learning_rate=0.05, finetune_layer_decay=1.0
    )
    protocol.check()
    result = protocol(subject)
    assert result["accuracy"] > 80
    assert result["settings"]["steps"] == 30
    assert result["settings"]["finetune_mixup"] == 0.8
    assert 0 < result["settings"]["loss"] < 1.09
    predictions = subject.predictions["finetune"]
    assert predictions.shape == (21,)
    right = predictions.numpy() == subject.validation.labels
    assert result["accuracy"] == pytest.approx(100 * right.mean())

    after = subject.encoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [module.training for module in subject.encoder.modules()] == modes
    assert [parameter.requires_grad for parameter in subject.encoder.parameters()] == grads
    assert all(parameter.grad is None for parameter in subject.encoder.parameters())


def test_the_seed_decides_all(data, subject):
    first = FineTune(**FAST).measure(subject)
    torch.manual_seed(5)
    again = FineTune(**FAST).measure(make_subject(data, make_encoder()))
    assert again["settings"] == first["settings"]
    assert torch.equal(again["predictions"], first["predictions"])
    other = FineTune(**FAST).measure(make_subject(data, make_encoder(), seed=1))
    assert other["settings"]["loss"] != first["settings"]["loss"]


def trained_weights(subject, **options):
    classifier = Classifier(copy.deepcopy(subject.encoder), subject.num_classes)
    nn.init.normal_(classifier.head.weight, generator=torch.Generator().manual_seed(0))
    FineTune(**{**FAST, **options})._train(classifier, subject)
    return classifier.state_dict()


def test_every_option_changes_the_weights(subject):
    default = trained_weights(subject)
    changed = {
        "warmup_epochs": 0, "base_learning_rate": 2e-3, "weight_decay": 0.5, "layer_decay": 0.5, "drop_path": 0.9,
        "mixup": 0.0, "cutmix": 0.0, "randaugment": 0, "label_smoothing": 0.3, "ema_decay": 0.0, "erasing": 1.0,
        "max_grad_norm": 1e-9,
    }  # fmt: skip
    for name, value in changed.items():
        weights = trained_weights(subject, **{f"finetune_{name}": value})
        assert any(not torch.equal(weights[key], default[key]) for key in default), name
    assert all(torch.equal(value, default[key]) for key, value in trained_weights(subject).items())


def test_validation_labels_change_nothing(data, subject):
    first = FineTune(**FAST).measure(subject)
    validation = load_examples(str(data), "validation")
    poisoned = validation.remove_columns("label").add_column("label", [2] * len(validation))
    second = FineTune(**FAST).measure(make_subject(data, make_encoder(), poisoned.cast(validation.features)))
    assert second["settings"] == first["settings"]
    assert torch.equal(second["predictions"], first["predictions"])


def test_unreadable_images_are_left_out_and_named(data, tmp_path):
    shutil.copytree(data, tmp_path / "colours")
    for path in ("train/red/3.png", "val/blue/2.png"):
        (tmp_path / "colours" / path).write_bytes(b"no image")
    subject = make_subject(tmp_path / "colours", make_encoder())
    assert FineTune(**FAST).measure(subject)["predictions"].shape == (20,)
    assert len(subject.known["finetune"].bad) == 2


@pytest.mark.parametrize("kind", ["ldae", "vit", "vitmae", "timm"])
def test_any_encoder(kind, data, tiny_model):
    if kind == "ldae":
        encoder = Encoder(tiny_model(LDAEModel, image_size=16))
    elif kind == "timm":
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
        config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=0, model_args=sizes)
        encoder = Encoder(TimmWrapperModel(config).eval(), (16, 16), 3)
    else:
        encoder = Encoder(ViTModel(ViTConfig(**TINY)) if kind == "vit" else ViTMAEModel(ViTMAEConfig(**TINY)))
    subject = make_subject(data, encoder)
    weights = trained_weights(subject, finetune_ema_decay=0.0)
    before = encoder.state_dict()
    moved = {
        name
        for name, parameter in encoder.named_parameters()
        if not torch.equal(weights[f"encoder.{name}"], before[name])
    }
    fixed = {name for name, _ in encoder.named_parameters()} - moved
    assert len(moved) > 20
    assert all("pooler" in name or "position" in name or "k_proj.bias" in name for name in fixed), fixed


# --------------------------------------------------------------------------------------------------------------- parts


def test_unused_parameters_are_frozen():
    classifier = Classifier(make_encoder(), 3)
    freeze_unused(classifier)
    frozen = {name for name, parameter in classifier.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.model.pooler.dense.weight", "encoder.model.pooler.dense.bias"}
    assert all(parameter.grad is None for parameter in classifier.parameters())


class Block(nn.Module):
    """Adds 1, or in a tuple."""

    def __init__(self, as_tuple=False, width=None):
        super().__init__()
        self.as_tuple, self.width = as_tuple, width

    def forward(self, hidden_states):
        output = (hidden_states + 1)[..., : self.width]
        return (output, "rest") if self.as_tuple else output


def test_blocks_are_dropped_in_training_only():
    blocks = [Block() for _ in range(3)]
    drop_blocks(blocks, 0.5)
    x = torch.zeros(4000, 2, 3)
    for block, rate in zip(blocks, (0, 0.25, 0.5), strict=True):
        outputs = block(hidden_states=x)
        assert torch.equal(outputs, outputs[:, :1, :1].expand_as(outputs))  # whole images
        dropped = (outputs[:, 0, 0] == 0).float().mean()
        assert dropped == pytest.approx(rate, abs=0.04)
        torch.testing.assert_close(outputs.max(), torch.tensor(1 / (1 - rate)))
        block.eval()
        assert torch.equal(block(x), x + 1)


def test_a_block_that_is_nearly_always_dropped():
    blocks = [Block(), Block(as_tuple=True)]
    drop_blocks(blocks, 1 - 1e-6)
    output, rest = blocks[1](torch.zeros(50, 2, 3))
    assert torch.equal(output, torch.zeros(50, 2, 3))
    assert rest == "rest"


def test_a_block_that_changes_the_shape_is_kept():
    blocks = [Block(), Block(width=2)]
    drop_blocks(blocks, 0.999)
    assert torch.equal(blocks[1](torch.zeros(50, 2, 3)), torch.ones(50, 2, 2))


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("batch_size", 0), ("warmup_epochs", -1), ("base_learning_rate", float("nan")), ("mixup", -0.1),
        ("cutmix", -1), ("weight_decay", -1), ("layer_decay", 0), ("layer_decay", 1.1), ("drop_path", 1.0),
        ("label_smoothing", 1.0), ("ema_decay", 1.0), ("erasing", 1.5), ("randaugment", 11), ("max_grad_norm", -1),
    ],
)  # fmt: skip
def test_impossible_values(name, value):
    with pytest.raises(ValueError, match=f"--finetune_{name}"):
        FineTune(**{f"finetune_{name}": value}).check()


def test_a_folder_that_holds_something(tmp_path):
    FineTune(finetune_output_dir=str(tmp_path)).check()
    FineTune(finetune_output_dir=str(tmp_path / "new")).check()
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="--finetune_output_dir"):
            FineTune(finetune_output_dir=str(folder)).check()


def test_what_the_subject_rules_out(data, subject, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="l-DAE"):
        FineTune(finetune_output_dir=str(tmp_path / "new")).prepare(subject)
    with pytest.raises(ValueError, match="--finetune_batch_size must be a multiple of the 3 processes, got 64"):
        FineTune().prepare(replace(subject, accelerator=SimpleNamespace(num_processes=3)))
    with pytest.raises(ValueError, match="the training images have no labels"):
        FineTune().prepare(replace(subject, train=SimpleNamespace(labels=np.array([0, -1]))))
    monkeypatch.setattr(subject.encoder, "num_channels", 4)
    with pytest.raises(ValueError, match="--finetune_randaugment 0"):
        FineTune().prepare(subject)


def test_validation_images_that_cannot_be_read(data, tmp_path):
    shutil.copytree(data, tmp_path / "colours")
    for path in (tmp_path / "colours" / "val").glob("*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="a probe needs validation images, got none that can be read"):
        FineTune(**FAST).measure(make_subject(tmp_path / "colours", make_encoder()))


def test_a_loss_that_is_not_finite(subject, monkeypatch):
    monkeypatch.setattr(finetune, "to_pixel_values", lambda images: images.float() * torch.nan)
    with pytest.raises(ValueError, match=r"nan at step 1 of 3: lower --finetune_base_learning_rate"):
        FineTune(**FAST).measure(subject)


# ---------------------------------------------------------------------------------------------------------------- saved


def test_the_saved_classifier_predicts_the_same(ldae_subject, tmp_path, capsys):
    protocol = FineTune(**FAST, finetune_base_learning_rate=0.05, finetune_output_dir=str(tmp_path / "saved"))
    predictions = protocol.measure(ldae_subject)["predictions"]
    assert f"Classifier: {tmp_path / 'saved'}\n" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    pixels = torch.stack([ldae_subject.validation[0, i]["pixel_values"] for i in range(21)])
    with torch.no_grad():
        assert torch.equal(model(to_pixel_values(pixels)).logits.argmax(dim=1), predictions)

    # the floor, which is measured next, is not saved over it
    weights = (tmp_path / "saved" / "model.safetensors").read_bytes()
    floor = make_floor(ldae_subject)
    protocol.measure(floor)
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == weights


def make_floor(subject):
    return Subject(subject.encoder.untrained(), subject.train, subject.validation, subject.accelerator, batch_size=8)


# ------------------------------------------------------------------------------------------------------------ processes


def train_and_save(data, path):
    """What each process of the next test runs."""
    torch.set_num_threads(1)
    subject = make_subject(data, make_encoder())
    protocol = FineTune(**FAST, **PLAIN, finetune_ema_decay=0.5, finetune_base_learning_rate=0.01)
    classifier = Classifier(copy.deepcopy(subject.encoder), 3)
    settings = protocol._train(classifier, subject)
    result = protocol.measure(subject)
    assert (result is None) == (not subject.accelerator.is_main_process)
    if result is not None:
        torch.save(classifier.state_dict(), path)
        figures = {"loss": settings["loss"], "predictions": result["predictions"].tolist()}
        Path(path).with_suffix(".json").write_text(json.dumps(figures))


@pytest.mark.slow
def test_two_processes_equal_one(data, tmp_path):
    train_and_save(data, tmp_path / "one.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command += [__file__, data, tmp_path / "two.pt"]
    root = str(Path(finetune.__file__).parents[2])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    subprocess.run(list(map(str, command)), check=True, env=environment, timeout=300)
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["predictions"] == one["predictions"]


if __name__ == "__main__":
    train_and_save(*sys.argv[1:])
