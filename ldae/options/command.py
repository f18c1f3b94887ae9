"""The options of pre-training, from a command line or from Python: a recipe, and options that win over it."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ldae.data.sources import validate_output
from ldae.names import short_name
from ldae.options.model import ModelArguments
from ldae.options.parser import OptionParser, option_parser
from ldae.options.recipes import read_recipe, recipe_path, shipped_recipes
from ldae.options.training import DataArguments, TrainArguments
from ldae.tokenizers import trained_tokenizers
from tokenizers_ldae import TOKENIZERS

DEFAULT_RECIPE = "photos"
LENGTHS = {"epochs", "max_steps", "max_minutes"}  # of a run: one that is given replaces those of a recipe
# what a fitted tokenizer is made for: --init_from brings it along, in place of a recipe's
FITTED = {name.replace("_hw", "_size") for tokenizer in TOKENIZERS.values() for name in tokenizer.defined_by}


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[Any, DataArguments, TrainArguments]:
    """(ModelArguments, DataArguments, TrainArguments) of a command line: `[RECIPE] [--options]`. Options win.

    Without a recipe and without --data, the recipe `photos` is run. An option that says how long a run is, such as --epochs,
    replaces whatever a recipe says of it, and --init_from whatever it says of the tokenizer.

    Raises:
        SystemExit: with status 2 for an unknown option, or a value that it may not have. One line on stderr says what to do.
        FileNotFoundError: if the recipe is missing.
        ValueError: for a recipe that cannot be, or options that contradict each other.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    recipe = argv.pop(0) if argv and not argv[0].startswith("-") else None
    given = parser.given(argv)
    if recipe is None and "data" not in given:
        recipe = DEFAULT_RECIPE
    return _arguments(parser, recipe, given)


def parse_keywords(recipe: str | os.PathLike | None = None, **given: Any) -> tuple[Any, DataArguments, TrainArguments]:
    """(ModelArguments, DataArguments, TrainArguments) of a recipe, if one is named, and of keyword arguments, which win.

    Raises:
        TypeError: for an unknown option.
        ValueError: for a value that an option may not have; otherwise as `parse_arguments` does.
    """
    parser = _parser()
    return _arguments(parser, recipe, parser.keywords(given))


def _parser() -> OptionParser:
    return option_parser(
        DataArguments,
        TrainArguments,
        ModelArguments,
        usage="%(prog)s [RECIPE] [--option VALUE ...]",
        description="Pre-trains l-DAE (arXiv 2401.14404) on images. RECIPE is a YAML file of options, or the name of a shipped "
        f"one: {', '.join(shipped_recipes())}. Options win over it. Without a recipe and without --data, the recipe photos is "
        "run. Names of options may be written with - or _.",
    )


def _arguments(parser: OptionParser, recipe: str | os.PathLike | None, given: dict[str, Any]) -> tuple[Any, ...]:
    values = {} if recipe is None else read_recipe(recipe_path(recipe), parser.domains)
    yielding = set() if LENGTHS.isdisjoint(given) else LENGTHS
    if given.get("init_from") is not None:
        yielding = yielding | FITTED
    values = {name: value for name, value in values.items() if name not in yielding}
    data, train, model = parser.build({**values, **given})
    _validate_together(model, train)
    train.output_dir = train.output_dir or f"runs/ldae-{model.model_size}-{short_name(data.data)}"
    validate_output(train.output_dir, data.data)
    return model, data, train


def _validate_together(model: Any, train: TrainArguments) -> None:
    """Validates what no single option can say of itself."""
    if train.init_from is not None:
        for name in ("tokenizer", "class_conditional", "tokenizer_perceptual_weight", "tokenizer_adversarial_weight"):
            if getattr(train, name):
                raise ValueError(f"--{name} is what --init_from brings with it; give one of the two")
        return
    try:
        config = model.config()
    except StrictDataclassError as error:  # its cause is the sentence that names the field
        raise ValueError(str(error.__cause__ or error)) from error
    for name in ("tokenizer_perceptual_weight", "tokenizer_adversarial_weight"):
        if getattr(train, name) and config.tokenizer_class.trainer != "conv_autoencoder":
            raise ValueError(f"--{name} needs --tokenizer_type conv_vae, got {config.tokenizer_type!r}")
    if train.tokenizer and config.tokenizer_class.trainer is None:
        names = ", ".join(trained_tokenizers())
        raise ValueError(
            f"--tokenizer needs --tokenizer_type {names}, got {config.tokenizer_type!r}, which is not trained"
        )
