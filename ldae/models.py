"""The model that a training run starts with."""

from dataclasses import replace

import datasets

from configuration_ldae import LDAEConfig
from modeling_ldae import LDAEForPreTraining

from . import tokenizers
from .data import count_classes


def build_model(model_args, train_args, examples: datasets.Dataset | datasets.IterableDataset) -> LDAEForPreTraining:
    """A new model of the options, with its trained tokenizer where it has one; or `--init_from`'s weights.

    Args:
        examples: the training pictures, whose classes `--class_conditional` counts.
    """
    attention = train_args.attn_implementation
    if source := train_args.init_from:
        config = LDAEConfig.from_pretrained(source, **model_args.overrides())
        return LDAEForPreTraining.from_pretrained(source, config=config, attn_implementation=attention)
    if train_args.class_conditional:
        model_args = replace(model_args, num_classes=count_classes(examples))
    config = model_args.config()
    if config.tokenizer_type == "conv_vae":
        config = tokenizers.with_autoencoder(config, train_args.tokenizer)
    model = LDAEForPreTraining._from_config(config, attn_implementation=attention)
    if config.tokenizer_type in tokenizers.TRAINED:
        tokenizers.load_into(model.ldae.tokenizer, train_args.tokenizer, model.config)
    return model
