"""Runs that start from the weights of another, whole and not contradicted."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TINY, train

from ldae import LDAEForPreTraining
from ldae.features.encoders import load_encoder
from ldae.options import parse_arguments
from ldae.training.models import build_model


def test_a_run_without_a_model_is_no_start(folder, tmp_path):
    (tmp_path / "stopped/checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"--init_from: '.*stopped' holds no config.json, .* at its end"):
        train(folder, tmp_path / "second", "--init_from", str(tmp_path / "stopped"))


def test_init_from_starts_a_new_run_from_weights(folder, tmp_path):
    first = train(folder, tmp_path / "first")
    second = train(
        folder, tmp_path / "second", "--init_from", str(first), "--learning_rate", "1e-12", "--ema_decay", "0"
    )
    a, b = (load_file(path / "model.safetensors") for path in (first, second))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    assert torch.equal(a["ldae.tokenizer.V"], b["ldae.tokenizer.V"])


def test_the_tokenizer_that_comes_along_wins_over_a_recipes(tmp_path):
    """The recipe `photos` has 32 dimensions; asked for on purpose, they would contradict the folder's 8."""
    given = [*TINY, "--latent_dim", "8", "--output_dir", str(tmp_path / "run")]
    LDAEForPreTraining(parse_arguments(["photos", *given])[0].config()).save_pretrained(tmp_path / "start")
    begun = ["photos", "--init_from", str(tmp_path / "start"), "--output_dir", str(tmp_path / "run")]
    model_args, _, train_args = parse_arguments(begun)
    config = build_model(model_args, train_args, None).config
    assert (config.latent_dim, config.keep_ratio) == (8, 0.5)  # the latter is the recipe's
    model_args, _, train_args = parse_arguments([*begun, "--latent_dim", "32"])
    with pytest.raises(ValueError, match="--latent_dim 32 contradicts --init_from, whose tokenizer has 8"):
        build_model(model_args, train_args, None)


def test_weights_stored_in_bf16_are_trained_in_float32(folder, tmp_path):
    """In bf16 most steps, and all of a slow average, would be lost to rounding."""
    first = train(folder, tmp_path / "first")
    LDAEForPreTraining.from_pretrained(first, dtype=torch.bfloat16).save_pretrained(tmp_path / "stored")
    assert {x.dtype for n, x in load_file(tmp_path / "stored/model.safetensors").items() if "tokenizer" not in n} == {
        torch.bfloat16
    }
    model_args, _, train_args = parse_arguments(["--data", "photos", *TINY, "--init_from", str(tmp_path / "stored")])
    assert {x.dtype for x in build_model(model_args, train_args, None).parameters()} == {torch.float32}
    assert {x.dtype for x in load_encoder(str(tmp_path / "stored")).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--latent_scaling global", "--latent_scaling global contradicts --init_from, whose tokenizer has component"),
        ("--patch_size 2 8", r"--patch_size \(2, 8\) contradicts --init_from, whose tokenizer has \(4, 4\)"),
        ("--prediction latent", "--init_from: decoder.*is .*, the configuration needs"),
        ("--subtract_mean False", "--subtract_mean False contradicts --init_from"),
        ("--num_hidden_layers 3", "--init_from: .* lacks .* of the weights of LDAEForPreTraining, such as .*layers"),
        ('--autoencoder {"layers_per_block":1}', None),  # a recipe's, for tokenizers of other rungs
    ],
)
def test_what_contradicts_the_weights_is_refused(tmp_path, options, message):
    given = ["--data", "photos", *TINY]
    LDAEForPreTraining(parse_arguments(given)[0].config()).save_pretrained(tmp_path)
    model_args, _, train_args = parse_arguments([*given, "--init_from", str(tmp_path), *options.split()])
    if message is None:
        assert build_model(model_args, train_args, None).config.latent_dim == model_args.latent_dim
        return
    with pytest.raises(ValueError, match=message):
        build_model(model_args, train_args, None)


@pytest.mark.parametrize(("layers", "refused"), [(1, False), (2, True)])
def test_a_convolutional_tokenizers_own_architecture_may_be_given_again(tmp_path, layers, refused):
    """A recipe's, which is a part of what the folder holds."""
    given = ["--data", "photos", *TINY]
    rung = ["--tokenizer_type=conv_vae", "--input_space=latent", "--prediction=noise", "--autoencoder"]
    small = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    LDAEForPreTraining(parse_arguments([*given, *rung, json.dumps(small)])[0].config()).save_pretrained(tmp_path)
    again = json.dumps({"block_out_channels": [8, 8], "layers_per_block": layers})
    model_args, _, train_args = parse_arguments([*given, "--init_from", str(tmp_path), "--autoencoder", again])
    if refused:
        with pytest.raises(ValueError, match="--autoencoder: layers_per_block 2 contradicts --init_from"):
            build_model(model_args, train_args, None)
    else:
        assert build_model(model_args, train_args, None).config.autoencoder["norm_num_groups"] == 4


def test_a_damaged_folder_is_refused(folder, tmp_path):
    output = train(folder, tmp_path / "run")
    path = output / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"--init_from: .*run' is damaged: model.safetensors is not what was written"):
        train(folder, tmp_path / "next", "--init_from", str(output))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"--model: .* is damaged: model.safetensors is not what was written"):
        load_encoder(str(output))
