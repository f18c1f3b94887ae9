"""Parameter groups, learning rates, the length of a run, and what is compiled."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from transformers import (
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
    get_cosine_schedule_with_warmup,
)

from ldae import LDAEModel
from ldae.features.encoders import Encoder
from ldae.optimization import Length, compile_blocks, layer_decay_groups, learning_rate, parameter_groups

VIT = {
    "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 16,
}  # fmt: skip


def by_name(model, groups):
    """name -> (lr_scale, weight_decay), every parameter once."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], (group["lr_scale"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.parametrize("options", [{}, {"class_token": False, "reg_tokens": 2, "pre_norm": True}])
def test_layer_decay_is_timms(options):
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=3, embed_dim=24, num_classes=5, global_pool="token" if not options else "avg",
        fc_norm=False, **options,
    )  # fmt: skip
    theirs = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.8)
    ours = layer_decay_groups(model, list(model.blocks), model.head, 0.05, 0.8)
    assert by_name(model, ours) == by_name(model, theirs)


def model_and_parts(name, tiny_model):
    """A model, and names of its parameters: before the blocks, the last block's, after."""
    if name == "ldae":
        model = tiny_model(LDAEModel)
        return model, ("embeddings.projection.weight", "timestep_embedding.fc1.weight"), "layers.1.mlp.fc1.weight"
    model = ViTModel(ViTConfig(**VIT)) if name == "vit" else ViTMAEModel(ViTMAEConfig(**VIT))
    before = ("embeddings.patch_embeddings.projection.weight", "embeddings.cls_token")
    return model, before, "layers.2.mlp.fc1.weight"


@pytest.mark.parametrize("name", ["ldae", "vit", "vitmae"])
def test_layer_decay_of_other_models(name, tiny_model):
    model, before, last = model_and_parts(name, tiny_model)
    blocks = Encoder(model).blocks
    both = nn.ModuleDict({"encoder": model, "head": nn.Linear(16, 3)})
    found = by_name(both, layer_decay_groups(both, blocks, both["head"], 0.05, 0.5))
    assert set(found) == {name for name, parameter in both.named_parameters() if parameter.requires_grad}
    depth = len(blocks)
    for parameter in before:
        assert found[f"encoder.{parameter}"] == (0.5 ** (depth + 1), 0 if "token" in parameter else 0.05)
    assert found[f"encoder.{last}"] == (0.5, 0.05)
    assert found[f"encoder.{last.replace(str(depth - 1), '0', 1)}"] == (0.5**depth, 0.05)
    assert found["encoder.layernorm.weight"] == (0.5, 0)
    assert (found["head.weight"], found["head.bias"]) == ((1, 0.05), (1, 0))


def test_positions_in_an_embedding_do_not_decay():
    model = nn.ModuleDict({"positions": nn.Embedding(4, 2), "block": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    found = by_name(model, layer_decay_groups(model, [model["block"]], model["head"], 0.1, 1.0))
    assert {name for name, (_, decay) in found.items() if decay} == {"block.weight", "head.weight"}


def test_frozen_parameters_are_in_no_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    assert layer_decay_groups(model, [model[0]], model[1], 0.1, 0.5) == []
    assert not any(group["params"] for group in parameter_groups(model, 0.1))


def test_learning_rate():
    rates = [learning_rate(progress, 2.0, 0.1) for progress in (0, 0.05, 0.1, 0.55, 1, 2)]
    assert rates == pytest.approx([0, 1, 2, 1, 0, 0])


def test_learning_rate_is_the_half_cycle_cosine_of_transformers():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 20, 100)
    for step in range(100):
        assert learning_rate(step / 100, 0.3, 0.2) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_a_run_is_as_far_as_its_steps_or_its_clock():
    assert Length(10).progress(5, 1e9) == 0.5
    assert Length(10, 2).progress(5, 90) == 0.75
    assert Length(10, 2).progress(9, 90) == 0.9


@pytest.mark.parametrize(("name", "expected"), [("ldae", 3), ("vitmae", 5), ("linear", 1)])
def test_blocks_are_compiled_one_by_one_and_models_without_blocks_whole(name, expected, tiny_model, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    if name == "ldae":
        model = tiny_model()
        blocks = [*model.ldae.layers, *model.decoder.layers]
    elif name == "vitmae":
        model = ViTMAEForPreTraining(ViTMAEConfig(**VIT, decoder_hidden_size=16, decoder_num_hidden_layers=2))
        blocks = [*model.vit.layers, *model.decoder.decoder_layers]
    else:
        blocks = [model := nn.Linear(2, 2)]
    compile_blocks(model)
    assert len(compiled) == expected
    assert all(a is b for a, b in zip(compiled, blocks, strict=True))
