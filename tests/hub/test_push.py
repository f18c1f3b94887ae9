"""Hub folders on their way to the Hub and back. The Hub is a stand-in; its client is the real one."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hub_folders import FILES, MODEL_ID, ROOT, make_folder, read_all, tiny_model
from hub_stand_in import HubStandIn
from PIL import Image

from ldae.hub.folder import image_processor
from ldae.hub.push import push_folder

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

# A process of its own pushes; the client reads its environment when it is imported.
PUSHER = """
import json, sys
from ldae.hub.push import push_folder

print("\\n" + json.dumps({"url": push_folder(*sys.argv[1:])}))
"""


def run(code, *arguments, env, cwd, flags=()):
    command = [sys.executable, *flags, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """After PUSHER: the `hub`, the `folder`, its `contents` before, PUSHER's `report` and `output`."""
    tmp_path = tmp_path_factory.mktemp("pushed")
    folder = make_folder(tmp_path / "ldae-vit-tiny")
    for name in ("checkpoints/checkpoint_0/optimizer.bin", "run/events.out.tfevents.1", "run/hparams.yml",
                 "losses.jsonl", "images/step_10.png", "results/train.tmp", ".env", "id_rsa", "data/private.jpg", "mine.py",
                 "wandb/run/config.yaml", "results/neighbours-data.png", "tokenizers/x/model.safetensors",
                 "model-old/model.safetensors"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not for the Hub")
    contents = read_all(folder)
    with HubStandIn(tmp_path / "hf_home") as hub:
        output = run(PUSHER, folder, MODEL_ID, env={**hub.environment, "PYTHONPATH": str(ROOT)}, cwd=tmp_path)
        report = json.loads(output.splitlines()[-1])
        yield SimpleNamespace(hub=hub, folder=folder, contents=contents, report=report, output=output)


def test_push_is_one_commit_with_everything_and_nothing_else(pushed):
    repository = pushed.hub.repositories[MODEL_ID]
    assert pushed.report["url"] == f"{pushed.hub.url}/{MODEL_ID}"
    assert [set(commit["paths"]) for commit in repository.commits] == [FILES]
    assert repository.files == {name: pushed.contents[name] for name in FILES}
    assert f"Uploading {len(FILES)} files of {pushed.folder} to {MODEL_ID}: {', '.join(sorted(FILES))}" in pushed.output


@pytest.mark.slow
def test_a_newcomer_gets_the_same_model_bit_for_bit(pushed, tmp_path):
    model = tiny_model()
    torch.manual_seed(1)
    transparent = Image.fromarray((255 * torch.rand(50, 40, 4)).byte().numpy())
    transparent.save(tmp_path / "image.jpg", "PNG")  # transformers' own pipeline would drop the transparency
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
