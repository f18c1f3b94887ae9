"""The stage of a run that trains the tokenizer before the l-DAE: `train_ldae.py --tokenizer_type patch_vae`."""

from dataclasses import replace
from pathlib import Path

from accelerate.utils import set_seed

from ldae.data.sources import count_classes, load_train
from ldae.tokenizers import build, trained_tokenizers
from ldae.training.checkpoints import Checkpoints, read_state, validate_unchanged


def stage(model_args, data_args, train_args):
    """The options and the model of the training that a tokenizer needs before the l-DAE's; None where it needs none.

    Raises:
        ValueError: for options of the l-DAE with which its own training, after the tokenizer's, could not start.
    """
    needed = (
        not (train_args.init_from or train_args.tokenizer) and model_args.config().tokenizer_class.trainer is not None
    )
    if train_args.tokenizer_only and not needed:
        raise ValueError(
            f"tokenizer_only needs tokenizer_type {', '.join(trained_tokenizers())}, and neither --init_from nor --tokenizer"
        )
    if not needed:
        return None
    checkpoints = Checkpoints(Path(train_args.output_dir).expanduser() / "checkpoints")
    folder = train_args.output_dir if train_args.tokenizer_only else f"{train_args.output_dir}-tokenizer"
    # before its tokenizer is trained on, or another one
    if train_args.resume and (last := checkpoints.last()) is not None:
        given = {name: value for name, value in vars(train_args).items() if name.startswith("tokenizer_")}
        given |= {} if train_args.tokenizer_only else {"tokenizer": str(Path(folder).expanduser())}
        validate_unchanged(read_state(last)["options"], given)
    if data_args.streaming:
        raise ValueError(
            "--streaming reads no stream to its end, which a tokenizer's training does: give --tokenizer FOLDER"
        )
    if train_args.class_conditional:
        count_classes(load_train(data_args))
    set_seed(train_args.seed)  # the autoencoder's initial weights are drawn here
    own = replace(
        train_args,
        output_dir=folder,
        epochs=train_args.tokenizer_epochs,
        max_steps=None,
        max_minutes=None,
        base_learning_rate=train_args.tokenizer_learning_rate,
        learning_rate=None,
        probe=False,
        knn_steps=0,
        image_steps=0,
        class_conditional=False,
        push_to_hub=False,
        gradient_checkpointing=False,
        torch_compile=False,
    )
    return model_args, data_args, own, build(model_args.config(), train_args)
