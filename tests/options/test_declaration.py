"""Options are declared once, and mean the same on the command line, in recipes and in Python."""

import dataclasses
import inspect
import math
from dataclasses import dataclass, fields

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_options import JSON, PARSER, TEXT, TRAINING, VALUES, Sample, command_line, quick, read, refused

from configuration_ldae import LDAEConfig
from ldae.options import (
    RUN_DEFINING,
    DataArguments,
    ModelArguments,
    TrainArguments,
    domains,
    model,
    option,
    option_parser,
    validate,
)
from ldae.probes import PROTOCOLS


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
        ("output_dir", ["a b\n"], ["", " ", "a\0b"]),  # no name of a file holds NUL
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


@pytest.mark.parametrize(
    "cls", [ModelArguments, DataArguments, TrainArguments, Sample, *filter(fields, PROTOCOLS.values())]
)
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
