"""Baselines are trained by the same loop and probed like l-DAE."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModel, ViTMAEModel, ViTModel
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEAttention

from experiments.baselines import moco_v3, supervised, vit_mae
from experiments.baselines.vit import vit_config
from ldae.features.encoders import Encoder
from ldae.options import parse_arguments
from modeling_ldae import sincos_positions
from train_ldae import train


def run_arguments(folder, *options: str):
    """Options of a tiny run on 8 images, which are put into `folder`/data/a and `folder`/data/b."""
    data = folder / "data"
    for i in range(8):
        (data / "ab"[i // 4]).mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (16, 16), (30 * i, 100, 255 - 30 * i)).save(data / "ab"[i // 4] / f"{i}.png")
    return parse_arguments(
        f"--data {data} --output_dir {folder / 'run'} --image_size 16 --patch_size 4 --hidden_size 32 --latent_dim 4 "
        "--num_hidden_layers 1 --num_attention_heads 2 --per_device_batch_size 4 --max_steps 2 --report_to none".split()
        + list(options)
    )


def copies(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_vit_mae_trains_in_the_same_loop(tmp_path):
    arguments = run_arguments(tmp_path, "--max_steps", "3", "--decoder_num_hidden_layers", "2")
    model = vit_mae.build(arguments[0])
    assert len(model.decoder.decoder_layers) == 2
    assert model.config._attn_implementation == "sdpa"
    before = copies(model)
    config = model.config
    assert (config.num_hidden_layers, config.decoder_num_hidden_layers, config.hidden_size) == (1, 2, 32)
    for positions in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        assert positions[0, 1:].std() > 0.1  # transformers leaves them at zero
    noise = model.sample_noise(3, generator=torch.Generator().manual_seed(0))["noise"]
    assert noise.shape == (3, 16)
    train(*arguments, model=model)
    encoder = AutoModel.from_pretrained(tmp_path / "run")
    assert isinstance(encoder, ViTMAEModel)
    assert not torch.equal(encoder.layers[0].mlp.fc1.weight, before["vit.layers.0.mlp.fc1.weight"])
    result = json.loads((tmp_path / "run/results/train.json").read_text())
    assert (result["config"]["model_type"], result["steps"]) == ("vit_mae", 3)


@pytest.mark.parametrize(("options", "masked"), [((), 0.75), (("--keep_ratio", "0.1"), 0.9)])
def test_vit_mae_masks_what_its_authors_do_or_all_but_what_is_kept(tmp_path, options, masked):
    model = vit_mae.build(run_arguments(tmp_path, *options)[0])
    output = model(torch.rand(2, 3, 16, 16))
    assert model.config.mask_ratio == pytest.approx(masked)
    assert output.mask.sum(dim=1).tolist() == [16 - int(16 * (1 - masked))] * 2


def test_baselines_take_the_attention_of_the_run(tmp_path):
    """In bf16 on a CPU it is written out, which is faster there; in the decoder, too."""
    arguments = run_arguments(tmp_path, "--attn_implementation", "eager")
    model = vit_mae.build(arguments[0])
    train(*arguments, model=model)
    attentions = [module for module in model.modules() if isinstance(module, ViTMAEAttention)]
    assert [attention.config._attn_implementation for attention in attentions] == ["eager"] * 2


@pytest.mark.parametrize("baseline", ["moco_v3", "supervised"])
def test_vit_baselines_train_in_the_same_loop(tmp_path, baseline):
    arguments = run_arguments(tmp_path, "--ema_decay", "0", "--learning_rate", "0.01")
    model = moco_v3.build(arguments[0]) if baseline == "moco_v3" else supervised.build(*arguments[:2])
    before = copies(model.vit)
    train(*arguments, model=model)
    encoder, info = AutoModel.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert isinstance(encoder, ViTModel)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"pooler"}
    saved, trained = encoder.state_dict(), model.vit.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in trained.items())
    unchanged = {name for name, value in before.items() if torch.equal(trained[name], value)}
    projection = {f"embeddings.patch_embeddings.projection.{name}" for name in ("weight", "bias")}
    assert unchanged == {"embeddings.position_embeddings"} | (projection if baseline == "moco_v3" else set())
    # the probes look at what was trained
    images = torch.rand(2, 3, 16, 16)
    expected = model.vit(images).last_hidden_state[:, 1:].mean(dim=1)
    torch.testing.assert_close(Encoder(encoder).pool(images), expected)


def test_the_vit_starts_from_fixed_positions_and_xavier_weights(tmp_path):
    vit = supervised.build(*run_arguments(tmp_path)[:2]).vit
    positions = vit.embeddings.position_embeddings
    assert torch.equal(positions[0], torch.cat([torch.zeros(1, 32), sincos_positions((4, 4), (4, 4), 32)]))
    for matrix in (vit.layers[0].mlp.fc1.weight, vit.embeddings.patch_embeddings.projection.weight.flatten(1)):
        bound = (6 / sum(matrix.shape)) ** 0.5
        assert 0.95 * bound < matrix.abs().max() <= bound


# ------------------------------------------------------------------------------------------------------------- MoCo v3


@pytest.fixture
def moco(tmp_path) -> moco_v3.MoCoV3:
    """A tiny MoCo v3 of which nothing has its initial value."""
    model = moco_v3.build(run_arguments(tmp_path)[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def algorithm_1(q: torch.Tensor, k: torch.Tensor, tau: float) -> float:
    """`ctr` of the paper's algorithm 1, number by number."""
    q, k = q.double(), k.double()
    total = 0.0
    for i in range(len(q)):
        logits = torch.stack([q[i] @ key / (q[i].norm() * key.norm() * tau) for key in k])
        total -= float(logits[i] - logits.exp().sum().log())
    return 2 * tau * total / len(q)


def test_contrastive_loss_is_algorithm_1():
    q, k = torch.randn(5, 7), 3 * torch.randn(5, 7)
    assert moco_v3.contrastive_loss(q, k).item() == pytest.approx(algorithm_1(q, k, 0.2), rel=1e-6)


def test_keys_of_all_processes_are_negatives(monkeypatch):
    q, k = torch.randn(6, 7), torch.randn(6, 7)
    monkeypatch.setattr(moco_v3.dist, "world_size", lambda: 2)
    monkeypatch.setattr(moco_v3.dist, "gather", lambda keys: torch.nn.functional.normalize(k).split(3))
    losses = []
    for rank in (0, 1):
        monkeypatch.setattr(moco_v3.dist, "rank", lambda rank=rank: rank)
        losses.append(moco_v3.contrastive_loss(q.split(3)[rank], k.split(3)[rank]).item())
    assert sum(losses) / 2 == pytest.approx(algorithm_1(q, k, 0.2), rel=1e-6)


def test_loss_is_symmetrised(moco):
    images, seeds = 2 * torch.rand(4, 3, 16, 16) - 1, moco.sample_noise(4)["seeds"]
    first, second = moco_v3.two_views(images, seeds)
    loss = moco.train()(images, seeds).loss.item()
    with torch.no_grad():  # the momentum encoder has been moved, and in training mode batch statistics count
        q1, q2, k1, k2 = moco.query(first), moco.query(second), moco.key(first), moco.key(second)
    assert loss == pytest.approx(algorithm_1(q1, k2, 0.2) + algorithm_1(q2, k1, 0.2), rel=1e-5)


def test_momentum_encoder_moves_once_in_a_training_forward_only(moco):
    images = 2 * torch.rand(4, 3, 16, 16) - 1
    pairs = [(moco.vit, moco.momentum_vit), (moco.projector, moco.momentum_projector)]
    pairs = [pair for modules in pairs for pair in zip(*(m.parameters() for m in modules), strict=True)]
    expected = [0.99 * k + 0.01 * q for q, k in pairs]
    before = copies(moco)
    moco.eval()(images)
    assert all(torch.equal(value, before[name]) for name, value in moco.state_dict().items())
    moco.train()(images)
    for (_, k), value in zip(pairs, expected, strict=True):
        torch.testing.assert_close(k, value, rtol=0, atol=1e-6)


def test_gradients_reach_what_is_trained(moco):
    moco.train()(2 * torch.rand(4, 3, 16, 16) - 1).loss.backward()
    without = {name for name, parameter in moco.named_parameters() if parameter.grad is None}
    fixed = ("momentum_", "vit.embeddings.patch_embeddings", "vit.embeddings.position_embeddings")
    assert without == {name for name, _ in moco.named_parameters() if name.startswith(fixed)}
    assert all(parameter.grad.any() for parameter in moco.parameters() if parameter.grad is not None)


def test_views_depend_on_their_seeds_alone():
    images, seeds = 2 * torch.rand(3, 3, 16, 24) - 1, torch.tensor([[1, 2], [3, 4], [5, 6]])
    state = torch.random.get_rng_state()
    views = moco_v3.two_views(images, seeds)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    again = moco_v3.two_views(images.flip(0), seeds.flip(0))
    other = moco_v3.two_views(images, seeds + 10)
    for view, same, different in zip(views, again, other, strict=True):
        assert view.shape == images.shape
        assert -1 <= view.min() < -0.5 < 0.5 < view.max() <= 1
        assert torch.equal(view, same.flip(0))
        assert not torch.equal(view, different)
    assert not torch.equal(*views)


def test_moco_refuses_to_move_its_momentum_encoder_several_times_a_step(monkeypatch):
    monkeypatch.setattr("sys.argv", ["moco_v3", "--gradient_accumulation_steps", "2"])
    with pytest.raises(ValueError, match=r"--gradient_accumulation_steps must be 1, .* got 2"):
        moco_v3.main()


def test_moco_refuses_images_without_colours(tmp_path):
    with pytest.raises(ValueError, match="num_channels must be 3"):
        moco_v3.build(run_arguments(tmp_path, "--num_channels", "1")[0])


# ---------------------------------------------------------------------------------------------------------- supervised


def test_supervised_counts_the_classes_of_the_training_images(tmp_path):
    """A validation folder of any name holds none of them."""
    model_args, data_args, _ = run_arguments(tmp_path, "--validation_split", "eval")
    for name in "abc":
        (tmp_path / f"set/train/{name}").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / f"set/train/{name}/1.png")
    (tmp_path / "data").rename(tmp_path / "set/eval")
    data_args.data = str(tmp_path / "set")
    assert supervised.build(model_args, data_args).config.num_labels == 3


def test_supervised_learns_labels(tmp_path):
    arguments = run_arguments(tmp_path, "--max_steps", "30", "--learning_rate", "0.01", "--no_flip", "--no_probe")
    model = supervised.build(*arguments[:2])
    assert model.classifier.out_features == 2
    train(*arguments, model=model)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/losses.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]


def test_supervised_loss_smooths_labels_and_leaves_out_missing_ones(tmp_path):
    model = supervised.Supervised(vit_config(run_arguments(tmp_path)[0], num_labels=3))
    images, labels = torch.rand(3, 3, 16, 16), torch.tensor([2, -1, 0])
    output = model(images, labels=labels)
    log_p = output.logits.double().log_softmax(dim=1)
    each = [-(0.9 * log_p[i, labels[i]] + 0.1 * log_p[i].mean()) for i in (0, 2)]
    assert output.loss.item() == pytest.approx(sum(each).item() / 2, rel=1e-5)


def test_supervised_refuses_data_without_labels(tmp_path):
    arguments = run_arguments(tmp_path)
    arguments[1].data = str(tmp_path / "data/a")
    with pytest.raises(ValueError, match="--data has no labels"):
        train(*arguments, model=supervised.build(*arguments[:2]))
    assert not (tmp_path / "run").exists()
