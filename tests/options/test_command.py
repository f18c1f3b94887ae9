"""The arguments of a training: a recipe and options that win over it."""

import subprocess
import sys

import pytest
from sample_options import ROOT

from ldae.options import parse_arguments


def test_options_win_over_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: somewhere\nhidden_size: 64\nbase_learning_rate: 1e-4\nimage_size: [32, 64]\nmodel_size: small\n"
    )
    model, data, run = parse_arguments([str(recipe), "--hidden_size", "96", "--no_flip"])
    assert (data.data, data.flip, run.base_learning_rate) == ("somewhere", False, 1e-4)
    assert (model.config().hidden_size, model.config().image_hw, model.config().num_hidden_layers) == (96, (32, 64), 12)
    assert run.output_dir == "runs/ldae-small-somewhere"
    assert parse_arguments([])[1].data == "photos"
    assert parse_arguments(["--image-size", "32"])[2].max_minutes is not None  # of the recipe photos
    assert parse_arguments(["--data", "x"])[2].max_minutes is None


@pytest.mark.parametrize("given", ["--epochs=5", "--max-steps 7", "--max_minutes 9"])
def test_a_length_that_is_given_replaces_the_recipes(tmp_path, given):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 2\nmax_steps: 3\nmax_minutes: 4\nseed: 8\n")
    names = ("epochs", "max_steps", "max_minutes")
    run = parse_arguments([str(recipe), *given.split()])[2]
    expected = {"--epochs=5": (5, None, None), "--max-steps 7": (100, 7, None), "--max_minutes 9": (100, None, 9)}
    assert tuple(getattr(run, name) for name in names) == expected[given]
    assert run.seed == 8
    run = parse_arguments([str(recipe), "--seed", "1", "--output_dir", "epochs"])[2]
    assert tuple(getattr(run, name) for name in names) == (2, 3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tokenizer some/where", "--tokenizer needs --tokenizer_type patch_ae, patch_vae, conv_vae, got 'pca'"),
        ("--init_from a --tokenizer b", "tokenizer is what --init_from brings with it"),
        ("--init_from a --class_conditional", "class_conditional is what --init_from brings with it"),
        (
            "--tokenizer_type patch_ae --prediction latent --tokenizer_adversarial_weight 1",
            "needs --tokenizer_type conv_vae",
        ),
        ("--latent_dim 999", "^latent_dim must not exceed a patch's 768 numbers, got 999$"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--data", ".", *options.split()])


def test_options_load_no_heavy_library():
    """So that --help is quick. What the Auto classes of transformers load by themselves (5.17: scikit-learn) is theirs."""
    heavy = {"datasets", "diffusers", "matplotlib", "sklearn", "torchmetrics"}
    code = (
        "import sys; from transformers import AutoModel; theirs = {*sys.modules}; import ldae.options; "
        f"print(*{heavy} & (set(sys.modules) - theirs))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
