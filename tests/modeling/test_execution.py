"""The same numbers however a model is run: checkpointed, by other attention, compiled, exported."""

import pytest
import torch
from naive_method import draw
from torch.testing import assert_close

from ldae import LDAEModel


def test_gradient_checkpointing_changes_no_gradient(tiny_model, images):
    gradients = []
    for checkpointing in (False, True):
        model, calls = tiny_model().train(), []
        if checkpointing:
            model.gradient_checkpointing_enable()  # the training script calls it too; transformers 5.17 knows no other
        for layer in [*model.ldae.layers, *model.decoder.layers]:
            layer.mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(images(model.config), **draw(model)).loss.backward()
        assert len(calls) == (6 if checkpointing else 3)  # each of the three blocks is run again
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name in gradients[0]:
        assert_close(gradients[1][name], gradients[0][name], msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_attention_implementations_agree_with_eager(tiny_model, images, attention):
    outputs = {}
    for name in ("eager", attention):
        model = tiny_model(hidden_size=32)  # flex_attention wants heads of at least 16
        model.set_attn_implementation(name)
        assert model.ldae.layers[0].attention.config._attn_implementation == name
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # to compile flex_attention takes a minute
            outputs[name] = model(images(model.config), **draw(model))
    assert_close(outputs[attention].reconstruction, outputs["eager"].reconstruction, atol=1e-5, rtol=1e-5)


def test_attention_weights_come_from_eager(tiny_model, images):
    model = tiny_model()
    model.set_attn_implementation("eager")
    output = model(images(model.config), **draw(model), output_attentions=True)
    assert [weights.shape for weights in output.attentions] == [(2, 2, 6, 6)] * 2
    assert_close(output.attentions[0].sum(dim=-1), torch.ones(2, 2, 6))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(tiny_model, images, training):
    model = tiny_model().train(training)
    x, drawn = images(model.config), draw(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(x, **drawn).loss, model(x, **drawn).loss)


@pytest.mark.parametrize("options", [{}, {"interpolate_pos_encoding": True}], ids=["native", "any-size"])
def test_exports_with_dynamic_batch_and_size(tiny_model, images, options):
    model = tiny_model(LDAEModel)
    x = images(model.config)
    Dim = torch.export.Dim
    dynamic = {0: Dim("batch")}
    if options:
        dynamic |= {2: 4 * Dim("rows", max=64), 3: 4 * Dim("columns", max=64)}
    shapes = {"pixel_values": dynamic, **dict.fromkeys(options)}
    exported = torch.export.export(model, (), {"pixel_values": x, **options}, dynamic_shapes=shapes).module()
    other = torch.randn(5, 3, *((20, 8) if options else (8, 12)))
    output = exported(pixel_values=other, **options)
    assert_close(output.last_hidden_state, model(other, **options).last_hidden_state, atol=1e-5, rtol=1e-5)
