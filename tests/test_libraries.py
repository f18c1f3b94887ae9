"""What other libraries do with our models: peft's masks, quantization, ONNX, DataParallel, other models' backbones."""

import copy
import subprocess
import sys
from contextlib import nullcontext

import onnxruntime
import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from ldae import LDAEBackbone, LDAEForImageClassification, LDAEForPreTraining, LDAEModel
from moments_ldae import PatchMoments

HEADS = [LDAEModel, LDAEForPreTraining, LDAEForImageClassification, LDAEBackbone]


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_of_nothing_changes_nothing(tiny_model, images, cls, attention):
    """peft's PeftModelForFeatureExtraction passes on masks and inputs that are None."""
    model = tiny_model(cls)
    model.set_attn_implementation(attention)
    x, drawn = images(model.config), {}
    if cls is LDAEForPreTraining:
        drawn = model.sample_noise(2, generator=torch.Generator().manual_seed(2))
    expected = model(x, **drawn).to_tuple()
    for mask in (None, torch.ones(2, 6)):
        found = model(x, attention_mask=mask, input_ids=None, inputs_embeds=None, **drawn).to_tuple()
        assert_close(found, expected)


def test_lora_of_peft(tiny_model, images):
    peft = pytest.importorskip("peft")
    model = tiny_model(LDAEModel)
    expected = model(images(model.config)).pooler_output
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["qkv"]))
    found = adapted(pixel_values=images(model.config)).pooler_output
    assert_close(found, expected)  # an adapter starts at nothing
    found.sum().backward()
    assert {name.split(".")[-3] for name, p in adapted.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_patches_are_as_if_they_were_not_there(tiny_model, images, attention):
    model = tiny_model(LDAEModel)
    model.set_attn_implementation(attention)
    x, keep = images(model.config), torch.tensor([[0, 2, 3], [1, 4, 5]])
    mask = torch.zeros(2, 6).scatter(1, keep, 1)
    masked, dropped = model(x, attention_mask=mask), model(x, keep=keep)
    assert_close(masked.last_hidden_state.gather(1, keep[..., None].expand(-1, -1, 16)), dropped.last_hidden_state)
    assert_close(masked.pooler_output, dropped.pooler_output)
    both = model(x, keep=keep, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]))
    assert_close(both.pooler_output[0], dropped.pooler_output[0])
    assert_close(both.pooler_output[1], model(x[1:], keep=keep[1:, :2]).pooler_output[0])


def test_no_patch_of_a_reconstruction_sees_a_masked_one(tiny_model, images):
    model = tiny_model()
    drawn = model.sample_noise(2, generator=torch.Generator().manual_seed(2))
    x, mask = images(model.config), torch.tensor([[1, 1, 1, 1, 1, 0]] * 2)
    other = x.clone()
    other[:, :, -4:, -4:] *= -1  # the last patch
    changed = (
        model(x, attention_mask=mask, **drawn).reconstruction
        - model(other, attention_mask=mask, **drawn).reconstruction
    ).abs()
    assert changed[:, :, -4:, -4:].max() > 1e-3
    changed[:, :, -4:, -4:] = 0
    assert changed.max() < 1e-6


# ------------------------------------------------------------------------------------------ quantization, export, devices


def test_dynamic_quantization(tiny_model, images):
    model = tiny_model(LDAEModel)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    x = images(model.config, 4)
    expected, found = model(x).pooler_output, quantized(x).pooler_output
    assert not torch.equal(expected, found)
    assert torch.cosine_similarity(expected, found).min() > 0.98


def test_onnx_of_any_size(tiny_model, images, tmp_path):
    model, path = tiny_model(LDAEModel), tmp_path / "model.onnx"
    dim = torch.export.Dim
    sizes = {0: dim("batch"), 2: 4 * dim("rows", max=64), 3: 4 * dim("columns", max=64)}
    options = {"pixel_values": images(model.config), "interpolate_pos_encoding": True}
    shapes = {"pixel_values": sizes, "interpolate_pos_encoding": None}
    torch.onnx.export(model, (), path, kwargs=options, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for height, width in ((8, 12), (20, 8), (4, 64)):
        x = torch.rand(3, 3, height, width) * 2 - 1
        tokens, pooled = session.run(None, {"pixel_values": x.numpy()})
        expected = model(x, interpolate_pos_encoding=True)
        assert_close(torch.from_numpy(tokens), expected.last_hidden_state, atol=1e-5, rtol=1e-5)
        assert_close(torch.from_numpy(pooled), expected.pooler_output, atol=1e-5, rtol=1e-5)


def replica(model):
    """A copy as torch.nn.parallel.replicate makes it on another GPU: tensors are attributes, and there are no parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, made in copies.items():
        for name, child in module._modules.items():
            made._modules[name] = copies[child]
            setattr(made, name, copies[child])
        for name, parameter in module._parameters.items():
            setattr(made, name, None if parameter is None else parameter * 1)
        for name, buffer in module._buffers.items():
            made._buffers[name] = buffer * 1
    return copies[model]


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("training", [True, False])
def test_replicas_of_data_parallel(tiny_model, images, cls, training):
    model = tiny_model(cls, keep_ratio=0.5).train(training)
    drawn = {"generator": torch.Generator().manual_seed(2)} if cls is LDAEForPreTraining else {}
    found = replica(model)(images(model.config), **drawn).to_tuple()
    drawn = {"generator": torch.Generator().manual_seed(2)} if drawn else {}
    assert_close(found, model(images(model.config), **drawn).to_tuple())


class NoFloat64(TorchDispatchMode):
    """Refuses tensors in float64 on the device "meta", which stands for Apple's MPS."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (tensor.device.type, tensor.dtype) == ("meta", torch.float64):
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return output


@pytest.mark.parametrize("fields", [{}, {"tokenizer_type": "pixels", "latent_dim": 48}, {"loss_units": "latent"}])
def test_tokenizers_are_fitted_on_devices_without_float64(tiny_model, images, fields):
    model = tiny_model(**fields)
    x = images(model.config, 20)
    with NoFloat64():
        model.ldae.tokenizer.to("meta").fit([x], model.config)
        moments = PatchMoments(48, "meta")
        moments.update(torch.eye(48))
    assert_close(moments.variance(), torch.full((48,), 1 / 48 - 1 / 48**2, dtype=torch.float64))


def test_the_network_needs_no_float64_on_its_device(tiny_model, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no device "meta"
    model = tiny_model().to("meta")
    drawn = {"noise": torch.empty(2, 6, 8, device="meta"), "timesteps": torch.zeros(2, dtype=torch.long, device="meta")}
    with NoFloat64():
        model(torch.empty(2, 3, 8, 12, device="meta"), **drawn).loss.backward()
        other_size = model.ldae(torch.empty(2, 3, 16, 8, device="meta"), interpolate_pos_encoding=True)
    assert other_size.pooler_output.shape == (2, 16)


# ------------------------------------------------------------------------------------------------------ as a backbone


def backbone_config(tiny_config, **fields):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return tiny_config(image_size=32, num_hidden_layers=4, out_features=stages, **fields)


def test_tokens_in_place_of_feature_maps(tiny_model, images):
    maps = tiny_model(LDAEBackbone, out_features=["stage1", "stage2"])
    tokens = tiny_model(LDAEBackbone, out_features=["stage1", "stage2"], reshape_hidden_states=False)
    x = images(maps.config)
    for a, b in zip(maps(x).feature_maps, tokens(x).feature_maps, strict=True):
        assert b.shape == (2, 1 + 6, 16)
        assert torch.equal(a.flatten(2).transpose(1, 2), b[:, 1:])
        assert_close(b[:, 0], b[:, 1:].mean(dim=1))
    assert_close(tokens(x).feature_maps[-1][:, 0], tokens.ldae(x).pooler_output)


@pytest.mark.parametrize("model_type", ["dpt", "depth_anything", "upernet"])
def test_models_that_take_a_backbone(tiny_config, tmp_path, model_type):
    """They train, and what they save loads to the same outputs."""
    sizes = {"neck_hidden_sizes": [8, 8, 8, 8], "reassemble_factors": [4, 2, 1, 0.5], "fusion_hidden_size": 8}
    if model_type == "dpt":
        nested = backbone_config(tiny_config, reshape_hidden_states=False)
        config = DPTConfig(backbone_config=nested, hidden_size=16, **sizes)
        model = DPTForDepthEstimation(config)
    elif model_type == "depth_anything":
        nested = backbone_config(tiny_config, reshape_hidden_states=False)
        config = DepthAnythingConfig(
            backbone_config=nested, reassemble_hidden_size=16, patch_size=4, head_hidden_size=8, **sizes
        )
        model = DepthAnythingForDepthEstimation(config)
    else:
        nested = backbone_config(tiny_config)
        config = UperNetConfig(
            backbone_config=nested, hidden_size=8, num_labels=3, auxiliary_in_channels=16, pool_scales=[1, 2]
        )
        model = UperNetForSemanticSegmentation(config)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    output = model.eval()(x)[0]
    assert len(output) == 2
    output.square().mean().backward()
    assert model.backbone.ldae.embeddings.projection.weight.grad.any()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(x)[0], output)


@pytest.mark.slow
@pytest.mark.parametrize("imported", [True, False])
def test_a_model_with_our_backbone_opens_where_ldae_is_imported(tiny_config, tmp_path, imported):
    """docs/dense.md and docs/design.md say so. Once transformers runs code of a nested configuration, they must say that."""
    config = UperNetConfig(backbone_config=backbone_config(tiny_config), hidden_size=8, use_auxiliary_head=False)
    UperNetForSemanticSegmentation(config).save_pretrained(tmp_path)
    code = "import ldae\n" * imported + (
        "from transformers import UperNetForSemanticSegmentation\n"
        f"UperNetForSemanticSegmentation.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode == 0) == imported
    assert imported or done.stderr.endswith("KeyError: 'ldae'\n")


def test_mask2former_takes_the_backbone(tiny_config):
    """A training step: its loss of two masks reaches the encoder."""
    config = Mask2FormerConfig(
        backbone_config=backbone_config(tiny_config), feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=3,
        encoder_feedforward_dim=8, dim_feedforward=8, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        num_labels=2, train_num_points=16,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    left = torch.zeros(2, 32, 32)
    left[0, :, :16] = left[1, :, 16:] = 1
    labels = [torch.tensor([0, 1])] * 2
    output = model(torch.rand(2, 3, 32, 32) * 2 - 1, mask_labels=[left] * 2, class_labels=labels)
    assert torch.isfinite(output.loss).all()
    output.loss.backward()
    weight = next(p for name, p in model.named_parameters() if name.endswith("ldae.embeddings.projection.weight"))
    assert weight.grad.any()
