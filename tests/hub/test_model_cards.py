"""What lies in model_cards: cards that the command of model_cards/README.md makes, and examples that run as they stand."""

import re
import shlex

import pytest
import torch
from hub_folders import ROOT
from PIL import Image

from ldae.hub import cards
from ldae.options import parse_arguments

CARDS = ROOT / "model_cards"
README = (CARDS / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def commands(start: str) -> list[str]:
    """What follows `start` in the commands of the README that begin with it."""
    return [command.removeprefix(start) for command in COMMANDS if command.startswith(start)]


def test_every_model_has_a_command_that_makes_its_card():
    made = {shlex.split(arguments)[0] for arguments in commands("python -m ldae.hub.cards --model ")}
    assert made == {f"model_cards/{path.parent.name}" for path in CARDS.glob("*/config.json")}
    assert {path.name for path in CARDS.iterdir()} == {"README.md", *(name.split("/")[1] for name in made)}


@pytest.mark.parametrize("arguments", commands("python -m ldae.hub.cards --model "))
def test_a_card_is_what_its_command_makes_of_the_results(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cards.main(["--model", *shlex.split(arguments), "--output", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text() == (ROOT / shlex.split(arguments)[0] / "README.md").read_text()


@pytest.mark.parametrize("card", sorted(CARDS.glob("*/README.md")), ids=lambda card: card.parent.name)
@pytest.mark.usefixtures("shipped_model")
def test_the_example_of_a_card_runs_as_it_stands(card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_cards").symlink_to(CARDS)
    Image.effect_noise((80, 60), 50).convert("RGB").save(tmp_path / "image.jpg")
    (example,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    assert "import ldae" in example  # which this process has done
    names: dict = {}
    exec(example, names)
    features, outputs = names["features"], names["outputs"]
    pooled, patches = outputs.pooler_output, outputs.last_hidden_state
    size = int(re.search(r"# (\d+) numbers: the mean", example)[1])
    assert torch.tensor(features).shape == pooled.shape == (1, size)
    close = {"rtol": 0.02, "atol": 0.02}  # the weights are bf16, and the pipeline makes the images bf16 too
    assert torch.allclose(torch.tensor(features), pooled.float(), **close)
    assert torch.allclose(patches.mean(dim=1), pooled, **close)


@pytest.mark.parametrize("arguments", commands("accelerate launch train_ldae.py "))
def test_the_recipes_of_the_papers_sizes_are_options_of_training(arguments):
    model, data, train = parse_arguments(shlex.split(arguments))
    config = model.config()
    blocks = {"base": (12, 768), "half-large": (12, 1024), "large": (24, 1024)}
    assert (config.num_hidden_layers, config.hidden_size) == blocks[model.model_size]
    assert (config.image_size, data.data, train.epochs) == (256, "ILSVRC/imagenet-1k", 400)
    assert f"{train.output_dir}".startswith(f"runs/ldae-{model.model_size}-")


def test_costs_stand_in_both_readmes():
    tables = [
        path.read_text().split("<!-- paper -->")[1] for path in (CARDS / "README.md", ROOT / "benchmarks/README.md")
    ]
    assert tables[0] == tables[1]
    assert tables[0].count("kWh") == 6
