"""An l-DAE to start with: new, or with all of its weights."""

from dataclasses import replace
from pathlib import Path

import datasets

from configuration_ldae import LDAEConfig
from modeling_ldae import LDAEForPreTraining

from . import tokenizers
from .data import count_classes

FITTED = (
    "tokenizer_type",
    "latent_dim",
    "latent_scaling",
    "subtract_mean",
    "autoencoder",
)  # what a fitted tokenizer is


def build_model(model_args, train_args, examples: datasets.Dataset | datasets.IterableDataset) -> LDAEForPreTraining:
    """A new model of the options, with its trained tokenizer where it has one; or `--init_from`'s weights.

    Args:
        examples: the training pictures, whose classes `--class_conditional` counts.

    Raises:
        ValueError: for options that contradict `--init_from`'s tokenizer, or ask for weights that it has not.
    """
    attention = {"attn_implementation": train_args.attn_implementation}
    if source := train_args.init_from:
        folder, given = Path(source).expanduser(), model_args.overrides()
        there = LDAEConfig.from_pretrained(folder)
        for name in FITTED:
            if given.get(name, getattr(there, name)) != getattr(there, name):
                raise ValueError(
                    f"--{name} {given[name]} contradicts --init_from, whose tokenizer has {getattr(there, name)}: leave it out"
                )
        return load_model(source, "--init_from", config=LDAEConfig.from_pretrained(folder, **given), **attention)
    if train_args.class_conditional:
        model_args = replace(model_args, num_classes=count_classes(examples))
    config = model_args.config()
    if config.tokenizer_type == "conv_vae":
        config = tokenizers.with_autoencoder(config, train_args.tokenizer)
    model = LDAEForPreTraining._from_config(config, **attention)
    if config.tokenizer_type in tokenizers.TRAINED:
        tokenizers.load_into(model.ldae.tokenizer, train_args.tokenizer, model.config)
    return model


def load_model(source: str, name_of_option: str = "--model", **kwargs) -> LDAEForPreTraining:
    """An l-DAE, encoder and decoder, of a folder or Hub id.

    Args:
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: if weights are missing, which transformers would replace by random ones.
    """
    path = Path(source).expanduser()
    model, loaded = LDAEForPreTraining.from_pretrained(path, output_loading_info=True, **kwargs)
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"{name_of_option}: {source!r} lacks {len(missing)} of the l-DAE's weights, such as {missing[0]}"
        )
    return model
