"""Hub folders, their way to the Hub and back, and their cards. The Hub is a stand-in; its client is the real one."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from packaging.version import Version
from PIL import Image
from transformers import AutoImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

from ldae import LDAEBackbone, LDAEConfig, LDAEForImageClassification, LDAEForPreTraining, LDAEModel
from ldae.hub import cards
from ldae.hub.cards import write_card
from ldae.hub.folder import AUTO_MAP, image_processor, push_folder, save_hub_folder
from ldae.report.results import save_result

ROOT = Path(__file__).parents[1]
MODEL_ID = "org/ldae-vit-tiny"
CODE = {path.name for path in ROOT.glob("*_ldae.py")} - {"train_ldae.py", "probe_ldae.py"}
FILES = {*CODE, "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "results/probe.json",
         "results/train.json"}  # fmt: skip
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


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "ldae-vit-tiny")


# ----------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("model_class", [LDAEForPreTraining, LDAEModel, LDAEForImageClassification, LDAEBackbone])
def test_saved_folder_loads_bit_for_bit_and_carries_its_code(model_class, tmp_path):
    model = tiny_model(model_class)
    save_hub_folder(model, tmp_path)
    assert_same_weights(model, model_class.from_pretrained(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    assert all((tmp_path / name).read_bytes() == (ROOT / name).read_bytes() for name in CODE)
    for name in AUTO_MAP.values():
        module, class_name = name.split(".")
        assert module + ".py" in CODE
        assert hasattr(importlib.import_module(module), class_name)
    assert not hasattr(model.config, "auto_map")


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_wrapped_models_and_given_weights_are_saved(wrap, tmp_path):
    model = tiny_model()
    save_hub_folder(wrap(model), tmp_path)
    assert_same_weights(model, LDAEForPreTraining.from_pretrained(tmp_path))

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average = {name: 0.5 * tensor for name, tensor in before.items()}
    save_hub_folder(wrap(model), tmp_path, state_dict=average)
    loaded = LDAEForPreTraining.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], average[name]) for name in average)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize(
    ("num_channels", "modes"), [(3, ["RGB", "L", "RGBA", "P", "1", "CMYK"]), (1, ["L"]), (4, ["RGBA"])]
)
def test_processor_makes_what_the_model_takes(num_channels, modes, backend, tmp_path):
    if (num_channels, backend) == (4, "torchvision") and Version(transformers.__version__) < Version("5.21"):
        pytest.skip(
            "transformers before 5.21 takes no image of four channels here, as image_processor's docstring says"
        )
    model = tiny_model(LDAEModel, num_channels=num_channels)
    model.config.image_size = [32, 48]  # height and width must not change places
    save_hub_folder(model, tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    for mode in modes:
        black = Image.new("RGBA", (50, 40), (0, 0, 0, 0 if mode == "RGBA" and num_channels == 4 else 255))
        white = Image.new("RGBA", (50, 40), (255, 255, 255, 255))
        images = [image.convert("RGB").convert(mode) if mode != "RGBA" else image for image in (black, white)]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        assert pixel_values.shape == (2, num_channels, 32, 48)
        assert torch.allclose(pixel_values[0], torch.tensor(-1.0))
        assert torch.allclose(pixel_values[1], torch.tensor(1.0))


def test_a_baseline_of_transformers_is_saved_without_our_code(tmp_path):
    model = ViTMAEForPreTraining(ViTMAEConfig(**TINY, decoder_hidden_size=32, decoder_num_hidden_layers=1))
    save_hub_folder(model, tmp_path)
    assert_same_weights(model, ViTMAEForPreTraining.from_pretrained(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    card = ModelCard.load(write_card(tmp_path))
    assert "ViTMAEForPreTraining of transformers" in card.text
    assert "trust_remote_code" not in card.text
    assert "ldae" not in card.data.tags


def test_a_card_says_that_no_baseline_was_measured(folder):
    probe = {name: value for name, value in PROBE.items() if name != "thumbnail"} | {"floor": {}}
    save_result(folder / "results/probe.json", probe, overwrite=True)
    text = write_card(folder).read_text()
    assert "| Protocol | This model | Data |" in text
    assert "No baseline" in text


# -------------------------------------------------------------------------------------------------- to the Hub and back

# What a newcomer's process does: nothing of this repository can be imported there.
NEWCOMER = """
import importlib.abc, sys, torch
from PIL import Image

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ldae" or (name.endswith("_ldae") and "." not in name):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
model_id, folder, example, inputs, answers = sys.argv[1:]
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

untrusted = {}
for place in (model_id, folder):
    try:
        AutoModel.from_pretrained(place)
    except ValueError as error:
        untrusted[place] = str(error)

names = {"image": Image.open("image.jpg")}
exec(open(example).read(), names)  # the card's example
inputs = torch.load(inputs)
pixel_values = names["processor"](names["image"], return_tensors="pt")["pixel_values"]
trust = {"trust_remote_code": True}
with torch.no_grad():
    model = AutoModelForPreTraining.from_pretrained(model_id, **trust)
    classifier = AutoModelForImageClassification.from_pretrained(model_id, num_labels=3, **trust)
    backbone = AutoBackbone.from_pretrained(model_id, out_indices=[0, 2], **trust)
    local = AutoModel.from_pretrained(folder, **trust)
    outputs = model(**inputs)
    torch.save({
        "untrusted": untrusted,
        "pixel_values": pixel_values,
        "pipeline": torch.tensor(names["features"]),
        "last_hidden_state": names["outputs"].last_hidden_state,
        "loss": outputs.loss,
        "reconstruction": outputs.reconstruction,
        "weights": model.state_dict(),
        "classifier": {name: tensor for name, tensor in classifier.state_dict().items() if name.startswith("ldae.")},
        "feature_maps": backbone(pixel_values).feature_maps,
        "local": local(pixel_values).last_hidden_state,
        "modules": sorted({type(m).__module__.split(".")[0] for m in (model, classifier, backbone, local)}),
    }, answers)
"""

# One process pushes, and fails to push: without a token, with a wrong one, without a network.
PUSHER = """
import json, os, sys
from huggingface_hub import constants
from ldae.hub.folder import push_folder

folder, model_id = sys.argv[1:]
report = {"url": push_folder(folder, model_id)}

def push(failure, **options):
    try:
        push_folder(folder, "org/other-" + failure.replace(" ", "-"), **options)
    except RuntimeError as error:
        report[failure] = str(error)

push("wrong token", token="hf_wrong")
del os.environ["HF_TOKEN"]
push("no token")
constants.ENDPOINT = "http://127.0.0.1:9"
push("no network", token="hf_stand_in", private=True)
print("\\n" + json.dumps(report))
"""


def run(code, *arguments, env, cwd, flags=()):
    command = [sys.executable, *flags, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """After PUSHER: the `hub`, the `folder`, its `contents` before, an `empty` folder, PUSHER's `report`."""
    tmp_path = tmp_path_factory.mktemp("pushed")
    folder, empty = make_folder(tmp_path / "ldae-vit-tiny"), tmp_path / "empty"
    empty.mkdir()
    for name in ("checkpoints/checkpoint_0/optimizer.bin", "run/events.out.tfevents.1", "run/hparams.yml",
                 "losses.jsonl", "images/step_10.png", "results/train.tmp"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not for the Hub")
    contents = read_all(folder)
    with HubStandIn(tmp_path / "hf_home") as hub:
        output = run(PUSHER, folder, MODEL_ID, env={**hub.environment, "PYTHONPATH": str(ROOT)}, cwd=empty)
        report = json.loads(output.splitlines()[-1])
        yield SimpleNamespace(hub=hub, folder=folder, contents=contents, empty=empty, report=report)


def test_push_is_one_commit_with_everything_and_nothing_else(pushed):
    repository = pushed.hub.repositories[MODEL_ID]
    assert pushed.report["url"] == f"{pushed.hub.url}/{MODEL_ID}"
    assert [set(commit["paths"]) for commit in repository.commits] == [FILES]
    assert repository.files == {name: pushed.contents[name] for name in FILES}


@pytest.mark.parametrize(
    ("failure", "reason"), [("wrong token", "401"), ("no token", "hf auth login"), ("no network", "refused")]
)
def test_a_failed_push_says_why_and_loses_nothing(pushed, failure, reason):
    message = pushed.report[failure]
    assert reason in message
    assert f"{pushed.folder} was not uploaded to org/other-{failure.replace(' ', '-')}" in message
    assert "the folder is whole" in message
    assert read_all(pushed.folder) == pushed.contents


def test_the_command_of_a_failed_push_uploads_the_same(pushed):
    program, *arguments = shlex.split(pushed.report["no network"].splitlines()[-1])
    assert program == "hf"
    assert "--private" in arguments  # as was asked
    command = [Path(sys.executable).with_name(program), *arguments]
    subprocess.run(command, env=pushed.hub.environment, cwd=pushed.empty, check=True, capture_output=True)
    assert len(pushed.hub.repositories["org/other-no-network"].commits) == 1
    assert pushed.hub.repositories["org/other-no-network"].files == pushed.hub.repositories[MODEL_ID].files


def test_a_newcomer_gets_the_same_model_bit_for_bit(pushed, tmp_path):
    model = tiny_model()
    torch.manual_seed(1)
    Image.fromarray((255 * torch.rand(50, 40, 3)).byte().numpy()).save(tmp_path / "image.jpg")
    image = Image.open(tmp_path / "image.jpg")
    pixel_values = image_processor(model.config)(image, return_tensors="pt")["pixel_values"]
    inputs = {"pixel_values": pixel_values, **model.sample_noise(1)}
    torch.save(inputs, tmp_path / "inputs.pt")
    example = re.search(r"```python\n(.*?)```", (pushed.folder / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "example.py").write_text(example)
    arguments = [MODEL_ID, pushed.folder, "example.py", "inputs.pt", "answers.pt"]
    run(NEWCOMER, *arguments, env=pushed.hub.environment, cwd=tmp_path, flags=["-I"])
    answers = torch.load(tmp_path / "answers.pt")

    assert answers["modules"] == ["transformers_modules"]
    assert answers["untrusted"].keys() == {MODEL_ID, str(pushed.folder)}
    assert all("trust_remote_code=True" in message for message in answers["untrusted"].values())
    with torch.no_grad():
        features = model.ldae(pixel_values, output_hidden_states=True)
        maps = [model.ldae.layernorm(features.hidden_states[i]).mT.unflatten(2, (4, 4)) for i in (0, 2)]
        outputs = model(**inputs)
    assert torch.equal(answers["pixel_values"], pixel_values)
    assert torch.equal(answers["last_hidden_state"], features.last_hidden_state)
    assert torch.equal(answers["local"], features.last_hidden_state)
    assert torch.equal(answers["pipeline"], features.pooler_output)
    assert torch.equal(answers["loss"], outputs.loss)
    assert torch.equal(answers["reconstruction"], outputs.reconstruction)
    assert torch.equal(torch.stack(answers["feature_maps"]), torch.stack(maps))
    weights = model.state_dict()
    encoder = {name: tensor for name, tensor in weights.items() if name.startswith("ldae.")}
    for loaded, expected in (("weights", weights), ("classifier", encoder)):
        assert answers[loaded].keys() == expected.keys()
        assert all(torch.equal(answers[loaded][name], expected[name]) for name in expected)


def test_only_hub_folders_are_pushed(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("config.json")):
        push_folder(tmp_path, MODEL_ID)


# ------------------------------------------------------------------------------------------------------------- the card


def accuracies(card):
    return [result.metric_value for result in card.data.eval_results or []]


def test_card_holds_the_numbers_of_the_results(folder):
    second = json.loads(json.dumps(PROBE))
    second["seed"], second["protocols"] = 4, {"linear": {**PROBE["protocols"]["linear"], "accuracy": 56.5}}
    save_result(folder / "results/probe_seed4.json", second)
    card = ModelCard.load(write_card(folder, MODEL_ID))
    assert accuracies(card) == [43.210191, 55.03184713375796, 56.5]
    assert {(result.dataset_type, result.metric_type) for result in card.data.eval_results} == {
        ("imagenette", "accuracy")
    }
    assert len({result.metric_name for result in card.data.eval_results}) == 3
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert (card.data.pipeline_tag, card.data.model_name) == ("image-feature-extraction", "ldae-vit-tiny")
    assert card.data.datasets == ["frgfm/imagenette"]
    for text in ("| Protocol | This model | Untrained | Thumbnail |", "| 43.2 ± 0.8 | 34.9 ± 0.8 | 29.5 ± 0.7 |",
                 "| 55.0 ± 0.8 | 47.6 ± 0.8 | – |", "- Thumbnail: the image itself", "9,469 images", "1,480 steps",
                 "1.50 hours", "learning_rate: 0.0001", "2401.14404",
                 f'"{MODEL_ID}", trust_remote_code=True'):  # fmt: skip
        assert text in card.text


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("probe.json", ("protocols", "linear", "accuracy")),
        ("probe.json", ("protocols", "knn", "standard_error")),
        ("probe.json", ("floor", "linear", "accuracy")),
        ("probe.json", ("floor", "knn", "standard_error")),
        ("probe.json", ("thumbnail", "knn", "accuracy")),
        ("probe.json", ("data", "num_validation")),
        ("probe.json", ("seed",)),
        ("train.json", ("arguments", "learning_rate")),
        ("train.json", ("data", "num_images")),
        ("train.json", ("images_seen",)),
        ("train.json", ("loss",)),
        ("train.json", ("seconds",)),
    ],
)
def test_card_follows_the_results(folder, file, keys):
    before = (folder / "README.md").read_text()
    result = json.loads((folder / "results" / file).read_text())
    holder = result
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] += 1000
    (folder / "results" / file).write_text(json.dumps(result))
    assert write_card(folder, MODEL_ID).read_text() != before
    if keys[-1] == "accuracy" and keys[0] == "protocols":
        assert accuracies(ModelCard.load(folder / "README.md")) == [43.210191, holder["accuracy"]]


def test_card_without_results_claims_nothing(tmp_path):
    card = ModelCard.load(make_folder(tmp_path / "new", results=False) / "README.md")
    assert accuracies(card) == []
    assert card.data.datasets is None
    assert "not been evaluated" in card.text
    assert "±" not in card.text
    assert "## Training" not in card.text


def test_card_of_a_streamed_training(folder):
    data = {**TRAINING["data"], "num_images": None}
    save_result(folder / "results/train.json", {**TRAINING, "data": data, "epochs": None}, overwrite=True)
    text = write_card(folder).read_text()
    assert "imagenette, streamed" in text
    assert "94,690 images in 1,480 steps |" in text


def test_card_elsewhere_takes_along_what_it_shows(folder, tmp_path, monkeypatch):
    assert "![" not in (folder / "README.md").read_text()
    Image.new("RGB", (4, 4)).save(folder / "denoised.png")
    output = tmp_path / "model_cards/tiny/README.md"
    monkeypatch.setattr(sys, "argv", ["cards", str(folder), "--repo_id", "me/mine", "--output", str(output)])
    cards.main()
    assert "](denoised.png)" in output.read_text()
    assert 'model="me/mine"' in output.read_text()
    assert (output.parent / "denoised.png").read_bytes() == (folder / "denoised.png").read_bytes()
    assert (output.parent / "results/probe.json").read_bytes() == (folder / "results/probe.json").read_bytes()
    assert read_all(output.parent).keys() == {"README.md", "denoised.png", "results/probe.json", "results/train.json"}


def test_card_of_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("config.json")):
        write_card(tmp_path)
