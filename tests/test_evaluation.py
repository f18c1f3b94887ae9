"""Features, k-NN and the linear probe, against scikit-learn and models called by hand."""

import copy

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from transformers import (
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from ldae import LDAEConfig, LDAEForImageClassification, LDAEForPreTraining, LDAEModel
from ldae.data import Pictures, to_pixel_values
from ldae.evaluation import (
    Features,
    evaluate_features,
    extract_features,
    knn_accuracy,
    linear_accuracy,
    pool_features,
    probe,
    untrained,
)
from ldae.metrics import Accuracy

TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def ldae_model(cls=LDAEModel):
    """A tiny l-DAE all of whose weights matter (adaLN-Zero's start at zero)."""
    torch.manual_seed(0)
    model = cls(LDAEConfig(**TINY, latent_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        model.base_model.tokenizer.V.copy_(torch.linalg.qr(torch.randn(48, 8))[0].T)
        model.base_model.tokenizer.U.copy_(model.base_model.tokenizer.V.T)
    return model


def blobs(n, seed, num_classes=4, width=12, spread=2.5):
    """Overlapping classes in features of very different scales."""
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=generator)
    features = centres[labels] + spread * torch.randn(n, width, generator=generator) + 1
    return Features(features * torch.logspace(-3, 2, width), labels)


@pytest.fixture
def pictures(tmp_path):
    """Seven noise pictures of two classes; the fourth is no picture."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    paths[3].write_bytes(b"no picture")
    examples = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(path)} for path in paths], "label": [0, 1, 0, 1, 0, 1, 1]},
        features=datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["a", "b"])),
    )
    return Pictures(examples, (16, 16))


# --------------------------------------------------------------------------------------------------------------- metric


def test_accuracy_in_percent_with_its_standard_error():
    result = Accuracy().compute(predictions=[0, 1, 1, 0], references=torch.tensor([0, 1, 0, 0]))
    assert result == {"accuracy": 75.0, "standard_error": pytest.approx(100 * (0.75 * 0.25 / 4) ** 0.5)}


def test_accuracy_adds_batches():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 0], references=[0, 1])
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute()["accuracy"] == pytest.approx(200 / 3)


def test_accuracy_writes_no_files(tmp_path):
    Accuracy(cache_dir=str(tmp_path)).compute(predictions=[0], references=[0])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# -------------------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("cls", [LDAEModel, LDAEForPreTraining, LDAEForImageClassification])
def test_ldae_gives_the_mean_of_its_tokens(cls):
    model, pixel_values = ldae_model(cls).eval(), torch.rand(3, 3, 16, 16) * 2 - 1
    expected = model.base_model(pixel_values).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(pool_features(model, pixel_values), expected)


def test_vit_pools_patch_tokens_without_the_class_token():
    torch.manual_seed(0)
    model, pixel_values = ViTModel(ViTConfig(**TINY)).eval(), torch.randn(2, 3, 16, 16)
    hidden = model(pixel_values).last_hidden_state
    assert hidden.shape[1] == 17
    torch.testing.assert_close(pool_features(model, pixel_values), hidden[:, 1:].mean(dim=1))


def test_a_classifier_is_taken_without_its_head():
    torch.manual_seed(0)
    model, pixel_values = ViTForImageClassification(ViTConfig(**TINY)).eval(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(pool_features(model, pixel_values), pool_features(model.vit, pixel_values))


def test_registers_are_left_out():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY, num_register_tokens=3)).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    hidden = model(pixel_values).last_hidden_state
    assert hidden.shape[1] == 1 + 3 + 16
    torch.testing.assert_close(pool_features(model, pixel_values), hidden[:, 4:].mean(dim=1))


def test_vit_mae_sees_every_patch_in_order():
    """A ViTMAE without masking is a ViT: the same weights in a ViT give the same features."""
    torch.manual_seed(0)
    mae = ViTMAEForPreTraining(
        ViTMAEConfig(**TINY, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    ).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    pooled = pool_features(mae, pixel_values)
    assert mae.config.mask_ratio == 0.75  # put back
    mae.config.mask_ratio = 0.0
    noise = torch.rand(2, 16)  # another order of the tokens: the same mean
    torch.testing.assert_close(pooled, mae.vit(pixel_values, noise=noise).last_hidden_state[:, 1:].mean(dim=1))
    torch.testing.assert_close(pooled, pool_features(mae.vit, pixel_values))


def test_feature_maps_are_pooled_over_height_and_width():
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    expected = model(pixel_values).last_hidden_state.flatten(2).mean(dim=2)
    torch.testing.assert_close(pool_features(model, pixel_values), expected)


def test_a_model_of_more_than_pictures_is_refused():
    class Text(torch.nn.Module):
        config = ViTConfig(**TINY)
        dtype = torch.float32

        def forward(self, pixel_values):
            return {"logits": pixel_values}

    model = Text()
    model.base_model = model
    with pytest.raises(ValueError, match="last_hidden_state"):
        pool_features(model, torch.zeros(1, 3, 16, 16))


# ----------------------------------------------------------------------------------------------------------- extraction


def test_features_equal_the_model_called_by_hand(pictures):
    model = ldae_model().train()
    model.layers[0].eval()
    features = extract_features(model, pictures, batch_size=2)
    raw = torch.stack([pictures[0, i]["pixel_values"] for i in (0, 1, 2, 4, 5, 6)])
    with torch.no_grad():
        expected = model.eval()(to_pixel_values(raw)).pooler_output
    torch.testing.assert_close(features.features, expected)
    assert features.labels.tolist() == [0, 1, 0, 0, 1, 1]
    assert not features.features.requires_grad


def test_training_modes_are_restored(pictures):
    model = ldae_model().train()
    model.layers[0].eval()
    extract_features(model, pictures, indices=[0])
    assert model.training
    assert model.layers[1].training
    assert not model.layers[0].training


def test_unreadable_pictures_are_named_and_left_out(pictures):
    features = extract_features(ldae_model(), pictures, batch_size=1)  # the unreadable one alone in its batch
    assert len(features) == 6
    assert len(features.bad) == 1
    assert "3.png" in features.bad[0]


def test_indices_take_a_part(pictures):
    model = ldae_model()
    everything, part = extract_features(model, pictures), extract_features(model, pictures, indices=[4, 0])
    torch.testing.assert_close(part.features, everything.features[[3, 0]])  # 3: the unreadable one is left out


def test_mean_and_std_of_a_foreign_model_are_honoured(pictures):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**TINY)).eval()
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    features = extract_features(model, pictures, indices=[0, 1], mean=mean, std=std)
    raw = torch.stack([pictures[0, i]["pixel_values"] for i in (0, 1)]) / 255
    by_hand = (raw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(features.features, pool_features(model, by_hand), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------ protocols


@pytest.mark.parametrize("k", [1, 20])
def test_knn_equals_scikit_learn(k):
    train, validation = blobs(400, 1), blobs(300, 2)
    peer = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    predictions = peer.fit(train.features, train.labels).predict(validation.features)
    expected = 100 * np.mean(predictions == validation.labels.numpy())
    assert 30 < expected < 95  # a test that could tell
    assert knn_accuracy(train, validation, k=k)["accuracy"] == pytest.approx(expected)


def test_knn_weights_by_similarity():
    """One close neighbour outvotes two far ones, unless the temperature makes them equal."""
    angles = torch.tensor([0.1, 1.0, 1.1])
    train = Features(torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0, 1, 1]))
    query = Features(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert knn_accuracy(train, query, k=3, temperature=0.07)["accuracy"] == 100
    assert knn_accuracy(train, query, k=3, temperature=100.0)["accuracy"] == 0


def test_k_is_at_most_the_number_of_training_pictures():
    assert knn_accuracy(blobs(5, 1), blobs(9, 2), k=20)["settings"]["k"] == 5


def test_linear_equals_scikit_learn_on_standardised_features():
    train, validation = blobs(600, 1), blobs(500, 2)
    result = linear_accuracy(train, validation)
    mean, variance = train.features.mean(0), train.features.var(0, correction=0)
    standardised = [
        ((part.features - mean) / (variance + 1e-5).sqrt()).double().numpy() for part in (train, validation)
    ]
    peer = LogisticRegression(C=1 / (result["settings"]["l2"] * 600), tol=1e-8, max_iter=2000)
    expected = 100 * peer.fit(standardised[0], train.labels).score(standardised[1], validation.labels)
    assert 30 < expected < 95
    assert result["accuracy"] == pytest.approx(expected, abs=0.21)  # one picture of 500 on the boundary


def test_linear_has_batch_norm(monkeypatch):
    """BatchNorm makes the probe blind to the features' scales; scikit-learn without it is not."""
    monkeypatch.setattr("ldae.evaluation.MAX_ITERATIONS", 100)
    train, validation = blobs(600, 1), blobs(500, 2)
    factor = torch.logspace(1, -1, 12)
    scaled = [Features(part.features * factor, part.labels) for part in (train, validation)]
    with_norm = linear_accuracy(train, validation)
    # the smallest features have deviation 2.5e-3, whose square is below BatchNorm's epsilon
    big = [Features(part.features * 1e3, part.labels) for part in (train, validation)]
    big_scaled = [Features(part.features * 1e3, part.labels) for part in scaled]
    assert linear_accuracy(*big)["accuracy"] == pytest.approx(linear_accuracy(*big_scaled)["accuracy"], abs=0.21)
    C = 1 / (with_norm["settings"]["l2"] * len(train))
    raw = LogisticRegression(C=C, max_iter=5000).fit(train.features.double(), train.labels)
    difference = 100 * raw.score(validation.features.double(), validation.labels) - with_norm["accuracy"]
    assert abs(difference) > 2


def test_the_choice_of_l2_never_sees_validation():
    train, validation = blobs(300, 1), blobs(300, 2)
    permuted = Features(
        validation.features, validation.labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    )
    one, other = linear_accuracy(train, validation), linear_accuracy(train, permuted)
    assert one["settings"] == other["settings"]
    assert one["accuracy"] != other["accuracy"]


def test_the_choice_of_l2_is_the_best_on_held_out_pictures():
    """With few pictures and many useless features, weak penalties overfit; the choice must see that."""
    torch.manual_seed(0)
    labels = torch.arange(120) % 2
    features = torch.randn(120, 100)
    features[:, 0] += 3 * labels
    settings = linear_accuracy(Features(features, labels), Features(features, labels))["settings"]
    held_out = settings["held_out_accuracy"]
    assert held_out[f"{settings['l2']:g}"] == max(held_out.values())
    assert len(set(held_out.values())) > 1


def test_linear_is_deterministic():
    train, validation = blobs(300, 1), blobs(300, 2)
    assert linear_accuracy(train, validation, seed=3) == linear_accuracy(train, validation, seed=3)


def test_protocols_refuse_what_they_cannot_use():
    train, validation = blobs(20, 1), blobs(20, 2)
    without = Features(train.features, torch.full((20,), -1))
    with pytest.raises(ValueError, match="no labels"):
        knn_accuracy(without, validation)
    broken = Features(validation.features * float("nan"), validation.labels)
    with pytest.raises(ValueError, match="validation features are not all finite"):
        linear_accuracy(train, broken)
    empty = Features(torch.empty(0, 0), torch.empty(0, dtype=torch.long), ["x.png: broken"])
    with pytest.raises(ValueError, match=r"x\.png"):
        knn_accuracy(train, empty)
    with pytest.raises(ValueError, match="attentive"):
        evaluate_features(train, validation, ["attentive"])


# ---------------------------------------------------------------------------------------------------------------- floor


def test_untrained_keeps_the_tokenizer_and_nothing_else():
    model = ldae_model(LDAEForPreTraining)
    before = copy.deepcopy(model.state_dict())
    floor = untrained(model)
    assert type(floor) is LDAEForPreTraining
    for name, buffer in model.ldae.tokenizer.named_buffers():
        assert torch.equal(buffer, floor.ldae.tokenizer.get_buffer(name))
    assert not torch.equal(floor.ldae.embeddings.projection.weight, model.ldae.embeddings.projection.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_untrained_keeps_fixed_positions_but_nothing_that_a_user_froze():
    config = ViTMAEConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = ViTMAEModel(config).requires_grad_(False)
    model.embeddings.position_embeddings.fill_(0.5)
    floor = untrained(model, seed=1)
    assert torch.equal(floor.embeddings.position_embeddings, model.embeddings.position_embeddings)
    assert not torch.equal(floor.layers[0].mlp.fc1.weight, model.layers[0].mlp.fc1.weight)


def test_untrained_is_seeded_and_leaves_the_global_generator_alone():
    model = ldae_model()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    weights = [untrained(model, seed).embeddings.projection.weight for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_probe_gives_the_encoder_beside_its_floor(pictures):
    model = ldae_model()
    floor = untrained(model)
    result = probe(model, floor, pictures, pictures, k=3, data_name="noise")
    assert result["kind"] == "probe"
    data = result["data"]
    assert (data["name"], data["num_train"], data["num_validation"], data["num_classes"]) == ("noise", 6, 6, 2)
    features, floor_features = extract_features(model, pictures), extract_features(floor, pictures)
    assert result["protocols"]["knn"] == knn_accuracy(features, features, k=3)
    assert result["protocols"]["linear"] == linear_accuracy(features, features)
    assert result["floor"]["knn"] == knn_accuracy(floor_features, floor_features, k=3)
    assert result["floor"]["description"]
