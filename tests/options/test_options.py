"""Options: one declaration, which the command line, recipes and Python read."""

import dataclasses
import inspect
import json
import math
import subprocess
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configuration_ldae import LDAEConfig
from ldae.options import (
    RUN_DEFINING,
    TOKENIZER_TRAINING,
    DataArguments,
    ModelArguments,
    TrainArguments,
    domains,
    model,
    names_given,
    option,
    option_parser,
    parse_arguments,
    read_recipe,
    recipe_path,
    recipes,
    run_defining,
    validate,
)
from ldae.probes import PROTOCOLS

ROOT = Path(__file__).parents[2]


@dataclass
class Sample:
    """An option of each kind; VALUES says once more, and in another way, what they may be."""

    count: int = option(3, "How many.", minimum=1, maximum=9)
    seed: int = option(0, "Any integer.")
    ratio: float = option(0.5, "A part, in %.", minimum=0, exclusive_maximum=1)
    weight: float | None = option(None, "A weight.", exclusive_minimum=0, maximum=100)
    name: str = option("a", "A name.")
    flag: bool = option(True, "A switch.", group="Switches")
    kind: Literal["no", "bf16"] | None = option(None, "A choice.", group="Switches")
    sizes: list[int] = option([4, 5], "Sizes.", minimum=1)
    rates: list[float] = option([], "Rates.", exclusive_minimum=0)
    parts: list[str] = option(["x"], "Parts.", choices=("x", "y", "null"))
    settings: dict | None = option(None, "Settings.")
    title: ClassVar[str] = "Sample"


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(str.strip)
WORD = st.text("abc/ =-").map("q{}".format)  # no number, no truth value
NEGATIVE, BROKEN = st.floats(max_value=0, exclude_max=True), st.sampled_from([math.nan, math.inf, -math.inf])
JSON = st.recursive(st.booleans() | st.integers() | FLOATS | TEXT | st.none(), st.lists, max_leaves=5)
VALUES = {  # what each option may be, and what it may not
    "count": (st.integers(1, 9), st.integers(max_value=0) | st.integers(10) | st.floats() | st.booleans() | WORD),
    "seed": (st.integers(-(10**30), 10**30), st.floats() | st.booleans() | WORD),
    "ratio": (st.floats(0, 1, exclude_max=True), NEGATIVE | st.floats(1) | BROKEN | st.booleans() | WORD),
    "weight": (st.floats(0, 100, exclude_min=True), st.floats(max_value=0) | st.floats(100, exclude_min=True) | BROKEN),
    "name": (TEXT, st.lists(WORD, min_size=2)),
    "flag": (st.booleans(), st.integers(2) | st.floats() | WORD),
    "kind": (st.sampled_from(["no", "bf16"]), WORD | st.booleans() | st.integers()),
    "sizes": (
        st.lists(st.integers(1), min_size=1),
        st.lists(st.integers(1)).map(lambda sizes: [*sizes, 0]) | st.lists(FLOATS, min_size=1) | WORD,
    ),
    "rates": (st.lists(FLOATS.filter(lambda x: x > 0), min_size=1), st.lists(NEGATIVE, min_size=1) | WORD),
    "parts": (st.lists(st.sampled_from(["x", "y", "null"]), min_size=1), st.lists(WORD, min_size=1)),
    "settings": (st.dictionaries(TEXT, JSON), st.lists(st.integers(), min_size=1) | st.integers() | WORD),
}
PARSER = option_parser(Sample, description="")
TRAINING = option_parser(ModelArguments, DataArguments, TrainArguments, description="")
quick = settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=50)


def command_line(name: str, value) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def read(folder: Path, text: str | bytes, parser=PARSER) -> dict:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_recipe(path, parser.domains)


def refused(parser, arguments: list[str], capsys) -> str:
    """The one line that a command line ends with."""
    with pytest.raises(SystemExit) as error:
        parser.given(arguments)
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


# ------------------------------------------------------------------------------------ one meaning, said in three places


@pytest.mark.parametrize("name", VALUES)
@quick
@given(data=st.data())
def test_a_value_within_bounds_is_the_same_from_a_recipe_and_from_a_command_line(tmp_path, name, data):
    value = data.draw(VALUES[name][0])
    (typed,) = PARSER.parse_args_into_dataclasses(command_line(name, value))
    (written,) = PARSER.build(read(tmp_path, yaml.safe_dump({name: value})))
    assert typed == written == dataclasses.replace(Sample(), **{name: value})
    assert type(getattr(typed, name)) is type(getattr(written, name)) is type(value)
    validate(typed)


@pytest.mark.parametrize("name", VALUES)
@quick
@given(data=st.data())
def test_a_value_out_of_bounds_is_refused_everywhere(tmp_path, capsys, name, data):
    value = data.draw(VALUES[name][1])
    err = refused(PARSER, command_line(name, value), capsys)
    assert name in err or "unexpected argument" in err
    with pytest.raises(ValueError, match=rf"recipe\.yaml', line 1: {name} must be .*, got "):
        read(tmp_path, yaml.safe_dump({name: value}, default_flow_style=True))
    with pytest.raises(ValueError, match=f"--{name} must be "):
        validate(dataclasses.replace(Sample(), **{name: value}))


def within(domain) -> st.SearchStrategy:
    """Values of an option of train_ldae.py."""
    if domain.choices:
        one = st.sampled_from(domain.choices)
    elif domain.type is int:
        one = st.integers(domain.minimum, domain.maximum)
    elif domain.type is float:
        low = domain.minimum if domain.exclusive_minimum is None else domain.exclusive_minimum
        exclusive = {"exclude_min": domain.exclusive_minimum is not None} if low is not None else {}
        high = domain.exclusive_maximum
        exclusive |= {"exclude_max": True} if high is not None else {}
        one = st.floats(low, high, allow_nan=False, allow_infinity=False, **exclusive)
    else:
        one = {str: TEXT, bool: st.booleans(), dict: st.dictionaries(TEXT, JSON)}[domain.type]
    return st.lists(one, min_size=1) if domain.many else one


@pytest.mark.parametrize("name", TRAINING.domains)
@settings(quick, max_examples=8)
@given(data=st.data())
def test_every_option_of_training_reads_recipes_as_the_command_line(tmp_path, name, data):
    value = data.draw(within(TRAINING.domains[name]))
    if not (isinstance(value, list) and any(str(part).startswith("-") for part in value)):  # argparse's own limit
        assert TRAINING.given(command_line(name, value)) == {name: value}
    assert read(tmp_path, yaml.safe_dump({name: value}), TRAINING) == {name: value}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        *((name, ["x", None], ["", " "]) for name in ("output_dir", "init_from", "tokenizer", "hub_model_id")),
        ("report_to", [["none"]], [[""], []]),
        ("per_device_batch_size", [1], [0, -1, 1.5]),
        ("gradient_accumulation_steps", [1], [0]),
        ("keep_checkpoints", [1], [0]),
        ("logging_steps", [1], [0]),
        ("max_steps", [1, None], [0]),
        ("epochs", [1e-9, 3], [0, -1.0, math.inf, math.nan, "3"]),
        ("max_minutes", [1e-9, None], [0]),
        ("base_learning_rate", [1e-9], [0]),
        ("learning_rate", [1e-9, None], [0, -1]),
        ("tokenizer_epochs", [1e-9], [0]),
        ("tokenizer_learning_rate", [1e-9], [0]),
        ("tokenizer_kl_weight", [1e-9, None], [0]),
        ("tokenizer_discriminator_width", [1], [0]),
        ("tokenizer_discriminator_start", [0], [-1]),
        ("tokenizer_perceptual_weight", [0], [-1e-9]),
        ("tokenizer_adversarial_weight", [0], [-1e-9]),
        ("weight_decay", [0], [-1e-9]),
        ("max_grad_norm", [0], [-1e-9]),
        ("checkpointing_steps", [0], [-1]),
        ("knn_steps", [0], [-1]),
        ("image_steps", [0], [-1]),
        ("warmup_ratio", [0, 0.99], [1, -1e-9]),
        ("ema_decay", [0, 0.99], [1, -1e-9]),
        ("adam_beta1", [0, 0.99], [1, -1e-9]),
        ("adam_beta2", [0, 0.99], [1, -1e-9]),
        ("seed", [0, 2**32 - 1], [-1, 2**32]),  # numpy's
        ("probe", [True], [1, None]),
        ("report_to", [["none"]], [[], "none", [1]]),
        ("mixed_precision", ["no", None], [False, "fp8"]),
    ],
)
def test_bounds_of_training(name, good, bad):
    for value in good:
        validate(dataclasses.replace(TrainArguments(), **{name: value}))
    for value in bad:
        with pytest.raises(ValueError, match=f"^--{name} must be .*, got "):
            validate(dataclasses.replace(TrainArguments(), **{name: value}))


@pytest.mark.parametrize("name", ["num_workers", "pca_patches"])
def test_bounds_of_data(name):
    validate(DataArguments(**{name: 0}))
    with pytest.raises(ValueError, match=f"--{name} must be an integer of at least 0, got -1"):
        validate(DataArguments(**{name: -1}))


@pytest.mark.parametrize("cls", [ModelArguments, DataArguments, TrainArguments, Sample, *PROTOCOLS.values()])
def test_defaults_are_within_bounds(cls):
    assert domains(cls)
    validate(cls())


def test_an_option_needs_one_type():
    @dataclass
    class Two:
        either: int | str = option(1, "Two types.")

    with pytest.raises(TypeError, match="'either' must have one type"):
        option_parser(Two, description="")


def test_every_field_of_the_configuration_is_an_option():
    fields = {name for name in LDAEConfig.__annotations__ if not name.startswith("_")}
    known = domains(ModelArguments)
    assert fields | {"model_size"} == set(known)
    assert (known["image_size"].type, known["image_size"].many) == (int, True)
    assert (known["sigma_max"].type, known["layer_norm_eps"].type, known["qkv_bias"].type) == (float, float, bool)
    assert known["latent_scaling"].choices == ("none", "global", "component")
    assert not any(known[name].many for name in fields - {"image_size", "patch_size"})


def test_options_are_found_in_a_docstring_without_indentation(monkeypatch):
    """Python 3.13 takes the indentation off docstrings, and Python 3.11 leaves it."""
    monkeypatch.setattr(LDAEConfig, "__doc__", inspect.cleandoc(LDAEConfig.__doc__))
    assert set(domains(model._model_arguments())) == set(domains(ModelArguments))


def test_options_that_define_the_run():
    assert set(RUN_DEFINING) == {
        "data", "held_out", "train_split", "crop", "flip", "per_device_batch_size", "gradient_accumulation_steps",
        "base_learning_rate",
        "learning_rate", "warmup_ratio", "adam_beta1", "adam_beta2", "weight_decay", "max_grad_norm", "ema_decay", "seed",
        "class_conditional", "tokenizer", "tokenizer_kl_weight", "tokenizer_perceptual_weight",
        "tokenizer_adversarial_weight", "tokenizer_lpips_net", "tokenizer_discriminator_start",
        "tokenizer_discriminator_width", "tokenizer_epochs", "tokenizer_learning_rate",
    }  # fmt: skip
    assert run_defining(TOKENIZER_TRAINING) == tuple(name for name in RUN_DEFINING if name.startswith("tokenizer"))


# ------------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max-stps 3", "unknown option --max_stps; did you mean --max_steps?"),
        ("--hiden_size=64", "unknown option --hiden_size; did you mean --hidden_size?"),
        ("-epochs 3", "unknown option -epochs; did you mean --epochs?"),
        ("--qqq", "unknown option --qqq; --help lists the options"),
        ("--epoch 3", "unknown option --epoch; did you mean --epochs?"),  # no abbreviations
        ("--max_steps 0", "argument --max_steps: must be an integer of at least 1, got '0'"),
        ("--max_steps 2.5", "argument --max_steps: must be an integer of at least 1, got '2.5'"),
        ("--learning_rate -1e-4", "argument --learning_rate: must be a number greater than 0, got '-1e-4'"),
        ("--learning_rate", "argument --learning_rate: expected one argument"),
        ("--warmup_ratio 1.5", "argument --warmup_ratio: must be a number of at least 0 and less than 1, got '1.5'"),
        ("--latent_scaling all", "argument --latent_scaling: must be one of none, global, component, got 'all'"),
        ("--flip maybe", "argument --flip/--no_flip: must be true or false, got 'maybe'"),
        ("--no-flip true", "argument --no_flip: takes no value, got True; leave it out"),
        ("--autoencoder [1]", "argument --autoencoder: must be a JSON object, got '[1]'"),
        ("--image_size 32 x", "argument --image_size: must be one or more integers, got 'x'"),
        ("--epochs 3 photos", "unexpected argument 'photos'; usage: "),
    ],
)
def test_a_mistake_is_answered_by_one_line(capsys, arguments, message):
    assert f": error: {message}" in refused(TRAINING, arguments.split(), capsys)
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["--data", "x", *arguments.split()])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--flip", True),
        ("--flip true", True),
        ("--flip=no", False),
        ("--flip False", False),
        ("--no_flip", False),
        ("--no-flip", False),
        ("--no_flip --flip", True),
    ],
)
def test_switches(arguments, expected):
    assert TRAINING.given(arguments.split()) == {"flip": expected}


def test_a_missing_option_is_named(capsys):
    @dataclass
    class Required:
        model: str = option(MISSING, "A model.")
        lists: list[int] = option([1], "Numbers.")

    parser = option_parser(Required, description="")
    assert "the following arguments are required: --model" in refused(parser, ["--lists", "1"], capsys)
    assert "unknown option --modle; did you mean --model?" in refused(parser, ["--modle", "x"], capsys)
    assert parser.parse_args_into_dataclasses(["--model", "x"])[0] == Required("x", [1])


def test_names_given():
    assert names_given(["--max-steps=3", "x-y", "--no_flip", "--sizes", "-1"]) == {"max_steps", "no_flip", "sizes"}


def test_help_shows_each_option_once_in_its_group(capsys):
    with pytest.raises(SystemExit, match="0"):
        PARSER.given(["--help"])
    out = capsys.readouterr().out
    sample, switches = out.split("\nSample:\n")[1].split("\nSwitches:\n")
    for name in PARSER.domains:
        part = switches if name in ("flag", "kind") else sample
        assert part.count(f"\n  --{name}") + part.startswith(f"  --{name}") == 1
        assert out.count(f"--{name}") == 1
    text = " ".join(out.split())
    for part in (
        "--count N How many. (at least 1 and at most 9; default: 3)",
        "--ratio X A part, in %. (at least 0 and less than 1; default: 0.5)",
        "--weight X A weight. (greater than 0 and at most 100) ",
        "--flag, --no_flag A switch. (default: True)",
        "--kind {no,bf16} A choice.",
        "--sizes N [N ...] Sizes. (at least 1; default: 4 5)",
        "--rates X [X ...] Rates. (greater than 0) --parts",
    ):
        assert part in text
    assert "None" not in text


def test_help_of_training(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(["--help"])
    out = capsys.readouterr().out
    titles = [line.rstrip(":") for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:4] == ["options", "Model", "Data", "Run"]
    assert len(titles) == len(set(titles)) == 9
    text = " ".join(out.split())
    for part in ("equation 4", "number means square. (default: 224)", "--probe, --no_probe"):
        assert part in text  # the configuration's own texts and defaults
    assert "None)" not in text


# --------------------------------------------------------------------------------------------------------------- recipes


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


# ------------------------------------------------------------------------------------------- the arguments of a training


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
