"""Encoders: the patch tokens of every kind of model against the model called by hand, the floor, digests."""

import copy

import pytest
import torch
from encoder_models import MAE, MEAN, STD, TIMM, TINY, ldae_model, randomise, timm_model
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)
from transformers.modeling_outputs import BaseModelOutput

from ldae import LDAEForImageClassification, LDAEForPreTraining, LDAEModel
from ldae.features.encoders import Encoder, evaluating, load_encoder


@pytest.fixture
def pixel_values():
    return torch.rand(3, 3, 16, 16) * 2 - 1


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# --------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("cls", [LDAEModel, LDAEForPreTraining, LDAEForImageClassification])
def test_ldae_gives_its_tokens(cls, pixel_values):
    model = ldae_model(cls)
    encoder, outputs = Encoder(model), model.base_model(pixel_values)
    assert torch.equal(encoder(pixel_values), outputs.last_hidden_state)
    torch.testing.assert_close(encoder.pool(pixel_values), outputs.pooler_output)
    assert (encoder.image_hw, encoder.num_channels) == ((16, 16), 3)


def test_vit_gives_patch_tokens_without_the_class_token(pixel_values):
    model = ViTModel(ViTConfig(**TINY)).eval()
    hidden = model(pixel_values).last_hidden_state
    assert hidden.shape[1] == 17
    assert torch.equal(Encoder(model)(pixel_values), hidden[:, 1:])
    torch.testing.assert_close(Encoder(model).pool(pixel_values), hidden[:, 1:].mean(dim=1))


def test_a_classifier_is_taken_without_its_head(pixel_values):
    model = ViTForImageClassification(ViTConfig(**TINY)).eval()
    assert torch.equal(Encoder(model)(pixel_values), Encoder(model.vit)(pixel_values))


def test_registers_are_left_out(pixel_values):
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY, num_register_tokens=3)).eval()
    hidden = model(pixel_values).last_hidden_state
    assert hidden.shape[1] == 1 + 3 + 16
    assert torch.equal(Encoder(model)(pixel_values), hidden[:, 4:])


def test_vit_mae_sees_every_patch_in_order(pixel_values):
    """A ViTMAE without masking is a ViT; masking by another order of the patches gives the same tokens in that order."""
    mae = ViTMAEForPreTraining(ViTMAEConfig(**TINY, **MAE)).eval()
    tokens = Encoder(mae)(pixel_values)
    assert mae.config.mask_ratio == 0.75  # put back
    assert torch.equal(tokens, Encoder(mae.vit)(pixel_values))
    mae.config.mask_ratio = 0.0
    noise = torch.rand(3, 16)
    shuffled = mae.vit(pixel_values, noise=noise).last_hidden_state[:, 1:]
    order = noise.argsort(dim=1)[:, :, None].expand(-1, -1, 32)
    torch.testing.assert_close(tokens.gather(1, order), shuffled, atol=1e-5, rtol=1e-4)


def test_vit_mae_puts_its_mask_ratio_back_after_an_error():
    mae = ViTMAEModel(ViTMAEConfig(**TINY))
    with pytest.raises(ValueError, match="image"):
        Encoder(mae)(torch.zeros(1, 3, 5, 5))
    assert mae.config.mask_ratio == 0.75


def test_feature_maps_become_tokens(pixel_values):
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).eval()
    hidden = model(pixel_values).last_hidden_state
    tokens = Encoder(model)(pixel_values)
    assert tokens.shape == (3, hidden.shape[2] * hidden.shape[3], 16)
    torch.testing.assert_close(tokens[:, 1], hidden[:, :, 0, 1])
    torch.testing.assert_close(Encoder(model).pool(pixel_values), hidden.mean(dim=(2, 3)))


def test_a_hierarchy_gives_all_its_tokens(pixel_values):
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    model = SwinModel(config).eval()
    hidden = model(pixel_values).last_hidden_state
    assert hidden.shape[1] == 16
    assert torch.equal(Encoder(model)(pixel_values), hidden)


@pytest.mark.parametrize("kind", TIMM)
def test_timm(kind):
    model, pixel_values = timm_model(kind), torch.rand(2, 3, 32, 32) * 2 - 1
    encoder = Encoder(model, (32, 32))
    hidden = model.timm_model.forward_features(pixel_values)
    if kind == "cnn":
        expected = torch.stack([hidden[:, :, i, j] for i in range(hidden.shape[2]) for j in range(hidden.shape[3])], 1)
    elif kind == "swin":
        expected = torch.stack([hidden[:, i, j] for i in range(hidden.shape[1]) for j in range(hidden.shape[2])], 1)
    else:
        assert hidden.shape[1] == 16 + {"vit": 1, "registers": 5}[kind]
        expected = hidden[:, -16:]
    assert torch.equal(encoder(pixel_values), expected)
    depths = encoder.depths(pixel_values)
    assert len(depths) == TIMM[kind][2]
    if kind != "cnn":
        torch.testing.assert_close(model.timm_model.norm(depths[-1]), expected)
    if kind == "swin":
        assert [x.shape[1] for x in depths] == [64, 16, 4]


@pytest.mark.parametrize("training", [True, False])
def test_the_shape_of_the_tokens_is_found_without_a_trace(training):
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).train(training)
    before = copy.deepcopy(model.state_dict())
    encoder = Encoder(model, (32, 48))
    assert (encoder.token_shape, encoder.width) == ((4 * 6, 16), 16)
    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # BatchNorm's statistics


def test_images_are_standardised_as_the_processor_says(pixel_values):
    model = ViTModel(ViTConfig(**TINY)).eval()
    by_hand = ((pixel_values + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    expected = model(by_hand).last_hidden_state[:, 1:]
    torch.testing.assert_close(Encoder(model, mean=MEAN, std=STD)(pixel_values), expected)
    torch.testing.assert_close(
        Encoder(model, mean=MEAN)(pixel_values), Encoder(model, mean=MEAN, std=[1.0] * 3)(pixel_values)
    )
    torch.testing.assert_close(
        Encoder(model, mean=[0.5] * 3, std=[0.5] * 3)(pixel_values), Encoder(model)(pixel_values), atol=1e-5, rtol=1e-4
    )


class Other(ResNetModel):
    """Gives something else than feature maps."""

    def forward(self, pixel_values):
        return self.gives


def test_a_model_of_more_than_images_is_refused(pixel_values):
    model = Other(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    model.gives = {"logits": pixel_values}
    with pytest.raises(ValueError, match="last_hidden_state"):
        Encoder(model)(pixel_values)


def test_tokens_without_a_patch_size_are_refused(pixel_values):
    model = Other(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    model.gives = BaseModelOutput(last_hidden_state=torch.zeros(3, 17, 32))
    with pytest.raises(ValueError, match="patch_size"):
        Encoder(model)(pixel_values)


# --------------------------------------------------------------------------------------------------------------- depths


@pytest.mark.parametrize("cls", [ViTModel, LDAEModel])
def test_depths_are_the_hidden_states(cls, pixel_values):
    model = ldae_model() if cls is LDAEModel else randomise(ViTModel(ViTConfig(**TINY)))
    first = 0 if cls is LDAEModel else 1
    expected = model(pixel_values, output_hidden_states=True).hidden_states[-2:]
    depths = Encoder(model).depths(pixel_values)
    assert len(depths) == 2
    assert not torch.equal(*depths)
    for got, hidden in zip(depths, expected, strict=True):
        torch.testing.assert_close(got, hidden[:, first:])
    torch.testing.assert_close(model.layernorm(depths[-1]), Encoder(model)(pixel_values))


def test_depths_of_vit_mae_and_no_hooks_left(pixel_values):
    encoder = Encoder(ViTMAEModel(ViTMAEConfig(**TINY)).eval())
    assert [tuple(x.shape) for x in encoder.depths(pixel_values)] == [(3, 16, 32)] * 2
    with pytest.raises(ValueError, match="image"):
        encoder.depths(torch.zeros(1, 3, 5, 5))
    assert not any(block._forward_hooks for block in encoder.blocks)


# ---------------------------------------------------------------------------------------------------------------- modes


def test_modes_are_restored_one_by_one():
    model = ldae_model().train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]

    def use():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert [module.training for module in model.modules()] == modes


# ---------------------------------------------------------------------------------------------------------------- floor


def test_untrained_keeps_the_tokenizer_and_nothing_else():
    encoder = Encoder(ldae_model(LDAEForPreTraining), name="mine", mean=[0.1], std=[0.2])
    before = copy.deepcopy(encoder.model.state_dict())
    floor = encoder.untrained()
    assert type(floor.model) is LDAEModel
    assert (floor.name, floor.image_hw, floor.mean, floor.std) == ("mine", (16, 16), [0.1], [0.2])
    for name, buffer in encoder.model.tokenizer.named_buffers():
        assert torch.equal(buffer, floor.model.tokenizer.get_buffer(name))
    assert not torch.equal(floor.model.embeddings.projection.weight, encoder.model.embeddings.projection.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.model.state_dict().items())


def test_untrained_keeps_fixed_positions_but_nothing_that_a_user_froze():
    model = ViTMAEModel(ViTMAEConfig(**TINY)).requires_grad_(False)
    model.embeddings.position_embeddings.fill_(0.5)
    floor = Encoder(model).untrained(seed=1).model
    assert torch.equal(floor.embeddings.position_embeddings, model.embeddings.position_embeddings)
    assert not torch.equal(floor.layers[0].mlp.fc1.weight, model.layers[0].mlp.fc1.weight)


def test_untrained_is_seeded_and_leaves_the_global_generator_alone():
    encoder = Encoder(ldae_model())
    state = torch.get_rng_state()
    weights = [encoder.untrained(seed).model.embeddings.projection.weight for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_untrained_timm():
    encoder = Encoder(timm_model("vit"), (32, 32))
    floors = [encoder.untrained(seed) for seed in (1, 1, 2)]
    assert floors[0].digest() == floors[1].digest()
    assert len({encoder.digest(), floors[0].digest(), floors[2].digest()}) == 3


# --------------------------------------------------------------------------------------------------------------- digest


def test_digest_tells_what_is_computed_apart():
    model = ldae_model()
    digest = Encoder(model, name="one").digest()
    assert Encoder(copy.deepcopy(model), name="another").digest() == digest
    others = [
        Encoder(model, (32, 32)),
        Encoder(model, num_channels=1),
        Encoder(model, mean=MEAN),
        Encoder(model, std=STD),
    ]
    weight, buffer, config, dtype = (copy.deepcopy(model) for _ in range(4))
    weight.layers[0].mlp.fc1.bias.data[0] += 1e-3
    buffer.tokenizer.scale[0] += 1e-3
    config.config.layer_norm_eps *= 2
    others += [Encoder(x) for x in (weight, buffer, config, dtype.bfloat16())]
    assert len({digest, *(encoder.digest() for encoder in others)}) == 1 + len(others)


@pytest.mark.parametrize("cls", [LDAEModel, LDAEForPreTraining])
def test_digest_is_the_same_after_saving(cls, tmp_path):
    model = ldae_model(cls)
    model.save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path)).digest() == load_encoder(str(tmp_path)).digest() == Encoder(model).digest()


def test_digest_is_the_same_without_a_pooler(tmp_path):
    """transformers fills a missing pooler, which is not used here, with random numbers."""
    ViTForImageClassification(ViTConfig(**TINY)).save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path)).digest() == load_encoder(str(tmp_path)).digest()
