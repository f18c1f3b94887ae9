"""The model on a GPU: every kind of attention, compiled blocks and sharding agree with the plain model."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldae import LDAEForPreTraining, LDAEModel
from ldae.optimization import compile_blocks
from ldae.training.checkpoints import full_state

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def loss_and_gradients(model: nn.Module, pixel_values: torch.Tensor, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """The training loss under autocast to `dtype`, and all gradients as one vector."""
    device = pixel_values.device
    noise = model.sample_noise(len(pixel_values), generator=torch.Generator(device).manual_seed(0))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = model(pixel_values, **noise).loss
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return loss.item(), torch.cat([g.flatten() for g in gradients if g is not None])


@pytest.fixture
def model(tiny_model, device):
    """model(attention): the same weights, with heads of 8 numbers as the flash kernel wants them."""

    def make(attention: str) -> LDAEForPreTraining:
        made = tiny_model(image_size=32, patch_size=4).to(device)
        made.set_attn_implementation(attention)
        return made.train()

    return make


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", [*KERNELS, "default"])
def test_sdpa_agrees_with_attention_written_out(model, images, device, dtype, tolerance, kernel):
    if (kernel, dtype) == ("flash", torch.float32):
        dtype, tolerance = torch.float16, 1e-2  # the flash kernel takes 16 bits only
    reference = model("eager")
    pixel_values = images(reference.config, 4).to(device)
    loss, gradients = loss_and_gradients(reference, pixel_values, torch.float32)
    with sdpa_kernel([KERNELS[kernel]] if kernel in KERNELS else list(KERNELS.values())):
        found_loss, found_gradients = loss_and_gradients(model("sdpa"), pixel_values, dtype)
    assert found_loss == pytest.approx(loss, rel=tolerance)
    assert relative_error(found_gradients, gradients) < tolerance


def test_features_agree_with_the_cpu(tiny_model, images, device):
    encoder = tiny_model(LDAEModel)
    pixel_values = images(encoder.config, 4)
    with torch.inference_mode():
        expected = encoder(pixel_values).pooler_output
        found = encoder.to(device)(pixel_values.to(device)).pooler_output.cpu()
    assert relative_error(found, expected) < 1e-4


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_blocks_agree_with_eager_ones(model, images, device, dtype):
    plain, compiled = model("sdpa"), model("sdpa")
    compile_blocks(compiled)
    pixel_values = images(plain.config, 4).to(device)
    loss, gradients = loss_and_gradients(plain, pixel_values, dtype)
    found_loss, found_gradients = loss_and_gradients(compiled, pixel_values, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert found_loss == pytest.approx(loss, rel=tolerance)
    assert relative_error(found_gradients, gradients) < tolerance


@pytest.fixture
def process_group(tmp_path, device):
    """This process as a group of one."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_model_trains_and_is_saved_as_the_whole_one(model, images, device, process_group):
    whole = model("sdpa")
    sharded = copy.deepcopy(whole)
    for layer in [*sharded.ldae.layers, *sharded.decoder.layers]:
        fully_shard(layer)
    fully_shard(sharded)
    pixel_values = images(whole.config, 4).to(device)
    losses = []
    for trained in (whole, sharded):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        for step in range(3):
            noise = trained.sample_noise(4, generator=torch.Generator(device).manual_seed(step))
            loss = trained(pixel_values, **noise).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5)
    expected, found = full_state(whole), full_state(sharded)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-4), name
