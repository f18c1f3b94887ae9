"""The l-DAE that a run starts with: a new one, or one with the weights of an earlier run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configuration_ldae import LDAEConfig
from ldae import tokenizers
from ldae.data.sources import count_classes
from ldae.loading import load_config, load_model, validate_folder, validate_weights
from ldae.mistakes import reading
from modeling_ldae import LDAEForPreTraining

if TYPE_CHECKING:
    import datasets


def build_model(
    model_args,
    train_args,
    examples: datasets.Dataset | datasets.IterableDataset,
    attn_implementation: str | None = None,
) -> LDAEForPreTraining:
    """A new model of the options, with its trained tokenizer where it has one; or `--init_from`'s weights.

    Args:
        examples: the training images, whose classes `--class_conditional` counts.
        attn_implementation: transformers' name of the attention; None: its own choice.

    Raises:
        ValueError: for options that contradict `--init_from`'s tokenizer, or ask for weights that it has not; for damaged
            folders and weights that are not finite.
    """
    attention: dict[str, Any] = {"attn_implementation": attn_implementation}
    if source := train_args.init_from:
        return load_model(source, "--init_from", config=_changed(source, model_args.overrides()), **attention)
    if train_args.class_conditional:
        model_args = replace(model_args, num_classes=count_classes(examples))
    config = model_args.config()
    trained = config.tokenizer_class.trainer is not None
    if trained:
        validate_folder(train_args.tokenizer, "--tokenizer")
        with reading("--tokenizer", train_args.tokenizer):
            config = tokenizers.configure(config, train_args.tokenizer)
    with reading("--attn_implementation", attn_implementation) if attn_implementation else nullcontext():
        model = LDAEForPreTraining._from_config(config, **attention)
    if trained:
        with reading("--tokenizer", train_args.tokenizer):
            tokenizers.load(model.ldae.tokenizer, train_args.tokenizer, model.config)
        validate_weights(model, train_args.tokenizer, "--tokenizer")
    return model


def _changed(source: str, given: dict[str, Any]) -> LDAEConfig:
    """The configuration of a folder or Hub id with other options, none of which changes its fitted tokenizer."""
    parts = given.pop("autoencoder", {})
    there = load_config(source, "--init_from")
    with reading("--init_from", source):
        config = LDAEConfig.from_pretrained(Path(source).expanduser(), **given)
    names = there.tokenizer_class.defined_by
    pairs = {name.replace("_hw", "_size"): (getattr(config, name), getattr(there, name)) for name in names}
    if "autoencoder_config" in names:
        pairs |= {f"autoencoder: {name}": (value, there.autoencoder_config.get(name)) for name, value in parts.items()}
    for name, (asked, was) in pairs.items():
        if asked != was:
            raise ValueError(f"--{name} {asked} contradicts --init_from, whose tokenizer has {was}; leave it out")
    return config
