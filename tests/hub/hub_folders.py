"""Hub folders that the tests of the hub room write, with results as runs leave them."""

from pathlib import Path

import torch

from ldae import LDAEConfig, LDAEForPreTraining
from ldae.hub.cards import write_card
from ldae.hub.folder import save_hub_folder
from ldae.report.results import save_result

ROOT = Path(__file__).parents[2]
MODEL_ID = "org/ldae-vit-tiny"
CODE = {path.name for path in ROOT.glob("*_ldae.py")} - {"train_ldae.py", "probe_ldae.py"}
FILES = {*CODE, "README.md", "config.json", "digests.sha256", "model.safetensors", "preprocessor_config.json",
         "results/probe.json", "results/train.json"}  # fmt: skip
TINY = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

TRAINING = {
    "kind": "train",
    "data": {
        "name": "frgfm-imagenette",
        "hub_id": "frgfm/imagenette",
        "fingerprint": "0123abcd",
        "num_images": 9469,
        "bad_images": [],
    },
    "arguments": {"data": "imagenette", "learning_rate": 0.0001, "batch_size": 64, "seed": 3},
    "config": {},
    "steps": 1480,
    "images_seen": 94690,
    "epochs": 10.0,
    "seconds": 5400.0,
    "loss": 0.43219,
    "seed": 3,
}
PROBE = {
    "kind": "probe",
    "model": MODEL_ID,
    "data": {"name": "imagenette", "fingerprint": "4567ef01", "num_train": 9469,
             "num_validation": 3925, "num_classes": 10},
    "protocols": {
        "knn": {"description": "20 neighbours", "accuracy": 43.210191, "standard_error": 0.79, "settings": {"k": 20}},
        "linear": {"description": "linear", "accuracy": 55.03184713375796, "standard_error": 0.81, "settings": {}},
    },
    "floor": {
        "knn": {"description": "20 neighbours", "accuracy": 34.9, "standard_error": 0.76, "settings": {"k": 20}},
        "linear": {"description": "linear", "accuracy": 47.6, "standard_error": 0.83, "settings": {}},
        "description": "the same network, untrained",
    },
    "thumbnail": {
        "knn": {"description": "20 neighbours", "accuracy": 29.5, "standard_error": 0.72, "settings": {"k": 20}},
        "description": "the image itself",
    },
    "seed": 3,
    "seconds": 60.0,
}  # fmt: skip


def tiny_model(model_class=LDAEForPreTraining, **fields):
    """A model in which every weight and every number of the tokenizer matters (fresh ones hold zeros)."""
    torch.manual_seed(0)
    model = model_class(LDAEConfig(**TINY, latent_dim=16, num_labels=3, **fields)).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return model


def assert_same_weights(model, other):
    expected, actual = model.state_dict(), other.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def read_all(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_folder(folder, results=True):
    save_hub_folder(tiny_model(), folder)
    if results:
        save_result(folder / "results/train.json", TRAINING)
        save_result(folder / "results/probe.json", PROBE)
    write_card(folder, MODEL_ID)
    return folder
