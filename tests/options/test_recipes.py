"""Recipes: what they say, what they cannot be, and where they are found."""

import pytest
import yaml
from sample_options import TRAINING, read

from ldae.options import parse_arguments, recipe_path, recipes, validate


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmax_steps: 16.5", ", line 2: max_steps must be an integer of at least 1 or null, got 16.5"),
        ("max_steps: true", ", line 1: max_steps must be an integer of at least 1 or null, got true"),
        ("data: null", ", line 1: data must be a text that is not empty, got null"),
        ("data:", ", line 1: data must be a text that is not empty, got null"),
        ("epochs:\n- 1\n- 2", ": epochs must be a number greater than 0, got - 1 - 2"),
        ("report_to: [none, null]", ": report_to must be one or more texts that are not empty, got [none, null]"),
        ("image_size: []", ": image_size must be one or more integers or null, got []"),
        ("image_size: [[1]]", ": image_size must be one or more integers or null, got [[1]]"),
        ("seed: {a: 1}", ": seed must be an integer of at least 0 and at most 4,294,967,295, got {a: 1}"),
        ("crop: middle", ": crop must be one of center, random, random_resized, got middle"),
        ("flip: 3", ": flip must be true or false, got 3"),
        ("data: !!python/object/apply:os.getcwd []", ": data must be a text that is not empty, got !!python"),
        ("autoencoder: {a: 2024-01-01}", ": autoencoder must be a JSON object or null, got {a: 2024-01-01}"),
        ("autoencoder: {a: {b: 1, b: 2}}", ": autoencoder must be a JSON object or null, got {a: {b: 1, b: 2}}"),
        ("autoencoder: {? [a] : 1}", ": autoencoder must be a JSON object or null, got {? [a] : 1}"),
        ("autoencoder: {a: !x 1}", ": autoencoder must be a JSON object or null, got {a: !x 1}"),
        ("seed: 1\nseed: 1", ", line 2: seed is given twice; keep one of the two"),
        ("max_steps: 1\nmax-steps: 1", ", line 2: max_steps is given twice"),
        ("hiden_size: 64", ", line 1: 'hiden_size' is no option; did you mean hidden_size?"),
        ("no_probe: true", ", line 1: 'no_probe' is no option; did you mean probe?"),
        ("? [a]\n: 1", ", line 1: '[a]' is no option; --help lists the options"),
        ("- seed: 1", " must be lines of 'option: value', got a list"),
        ("seed 1", " must be lines of 'option: value', got plain text"),
        ("seed: 1\n---\nseed: 2", " holds several documents; keep one of them"),
        ("seed: [", " is no YAML: line 1: expected the node content, but found '<stream end>'"),
        ("seed: *a", " is no YAML: line 1: found undefined alias 'a'"),
        ("seed: \0", " is no YAML: special characters are not allowed"),
        (bytes(range(256)), " is no text file: byte 128 is not UTF-8"),
    ],
)
def test_a_recipe_that_cannot_be(tmp_path, text, message):
    with pytest.raises(ValueError, match="recipe") as error:
        read(tmp_path, text, TRAINING)
    assert str(error.value).startswith(f"recipe {str(tmp_path / 'recipe.yaml')!r}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="recipe"):
        parse_arguments([str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mixed_precision: no", {"mixed_precision": "no"}),
        ("base_learning_rate: 1e-4", {"base_learning_rate": 1e-4}),
        ("epochs: 3", {"epochs": 3.0}),
        ("flip: no\nprobe: off", ValueError),
        ("flip: no\nprobe: True", {"flip": False, "probe": True}),
        ("max-steps: ~", {}),
        ("image_size: 64\nreport_to: none", {"image_size": [64], "report_to": ["none"]}),
        ("seed: &a 1\npca_patches: *a", {"seed": 1, "pca_patches": 1}),
        ("output_dir: 2024-01-01\ntrain_split: 'null'", {"output_dir": "2024-01-01", "train_split": "null"}),
        ("autoencoder: {layers_per_block: 1, x: [1, 0.5, no, null]}",
         {"autoencoder": {"layers_per_block": 1, "x": [1, 0.5, False, None]}}),
        ("autoencoder: '{\"layers_per_block\": 1}'", {"autoencoder": {"layers_per_block": 1}}),
        ("# nothing yet", {}),
    ],
)  # fmt: skip
def test_what_a_recipe_says(tmp_path, text, expected):
    if expected is ValueError:
        with pytest.raises(ValueError, match="line 2: probe must be true or false, got off"):
            read(tmp_path, text, TRAINING)
    else:
        assert read(tmp_path, text, TRAINING) == expected


@pytest.mark.parametrize("path", sorted(recipe_path("photos").parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes(path):
    assert recipe_path(path.stem) == path
    model, data, train = parse_arguments([path.stem])
    assert (vars(model), data, train) == (vars(parse_arguments([str(path)])[0]), *parse_arguments([str(path)])[1:])
    for options in (model, data, train):
        validate(options)
    for name, value in yaml.safe_load(path.read_text()).items():
        found = {**vars(model), **vars(data), **vars(train)}[name]
        assert found == value or found == [value]


def test_recipes_are_found_in_the_package_and_in_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "PACKAGE", tmp_path / "ldae")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/photos.yaml").write_text("seed: 1")
    assert recipe_path("photos") == tmp_path / "recipes/photos.yaml"
    assert parse_arguments([])[2].seed == 1
    (tmp_path / "ldae/recipes").mkdir(parents=True)
    (tmp_path / "ldae/recipes/photos.yaml").write_text("seed: 2")
    assert parse_arguments([])[2].seed == parse_arguments(["photos"])[2].seed == 2
    assert parse_arguments(["recipes/photos.yaml"])[2].seed == 1
    for name, hint in (
        ("phots", "did you mean photos?"),
        ("there/photos.yaml", "did you mean photos?"),
        ("zzz", "shipped recipes are photos"),
        ("recipes", "it is a folder: a folder of images is given by --data"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            parse_arguments([name])
        assert str(error.value) == f"there is no recipe {name!r}; {hint}"
