"""The paper's linear probe on features that are made up: what it learns, from what, and what it chooses."""

import sys
from dataclasses import dataclass, field, replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from tqdm import tqdm

from ldae.features.extraction import Features
from ldae.options import option_parser
from ldae.probes import linear
from ldae.probes.heads import choose_learning_rate
from ldae.probes.linear import Linear
from ldae.probes.protocol import held_out_mask
from ldae.probes.subject import Subject

QUICK = Linear(linear_epochs=8, linear_batch_size=64, linear_rates=[0.01, 0.1, 1.0])


@dataclass
class Stub:
    """A subject whose random crops all have the features of the centre crops."""

    train: Features
    validation: Features
    seed: int = 0
    num_classes: int = 3
    device: torch.device = torch.device("cpu")
    views: list = field(default_factory=list)
    progress, is_main_process, progress_bar = False, True, Subject.progress_bar

    def features(self, split: str) -> Features:
        return getattr(self, split)

    def view(self, number: int, keep: bool = True, bar: tqdm | None = None) -> Features:
        self.views.append((number, keep))
        return self.train


def blobs(n: int, seed: int, noise: float = 1.0, width: int = 12) -> Features:
    """Three Gaussian classes with correlated features."""
    centres, mix = (torch.randn(s, width, generator=torch.Generator().manual_seed(1)) for s in (3, width))
    mix = torch.eye(width) + 0.2 * mix
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    features = (centres[labels] + noise * torch.randn(n, width, generator=generator)) @ mix
    return Features(features, labels)


@pytest.fixture
def subject():
    return Stub(blobs(400, 2), blobs(300, 3))


@pytest.fixture
def groups(recorded):
    """The groups of heads that a probe makes: the choosing one, the final one."""
    return recorded(linear, "Heads")


def test_agrees_with_scikit_learn(subject):
    result = replace(QUICK, linear_epochs=60, linear_rates=[1.0]).measure(subject)
    mean, std = subject.train.features.mean(0), subject.train.features.std(0)
    reference = LogisticRegression(C=1e4, max_iter=2000).fit(
        (subject.train.features - mean) / std, subject.train.labels
    )
    predictions = torch.from_numpy(reference.predict((subject.validation.features - mean) / std))
    assert (result["predictions"] == predictions).float().mean() > 0.97
    right = float((result["predictions"] == subject.validation.labels).float().mean())
    assert 60 < result["accuracy"] < 100
    assert result["accuracy"] == pytest.approx(100 * right)


def test_the_scale_of_a_feature_does_not_matter_with_batch_norm(subject, monkeypatch):
    scale = torch.logspace(-2, 3, 12)
    scaled = Stub(*(Features(f.features * scale, f.labels) for f in (subject.train, subject.validation)))
    probe = replace(QUICK, linear_epochs=30, linear_rates=[0.1])
    predictions = [probe.measure(some)["predictions"] for some in (subject, scaled)]
    assert (predictions[0] == predictions[1]).float().mean() > 0.99
    monkeypatch.setattr(nn, "BatchNorm1d", lambda *args, **kwargs: nn.Identity())
    predictions = [probe.measure(some)["predictions"] for some in (subject, scaled)]
    assert (predictions[0] == predictions[1]).float().mean() < 0.95


def test_batch_norm_is_maes(subject, groups):
    QUICK.measure(subject)
    for heads in groups:
        assert (heads.norm.affine, heads.norm.eps, heads.norm.momentum) == (False, 1e-6, 0.1)
    held_out = held_out_mask(400, 0)
    torch.testing.assert_close(groups[0].norm.running_mean, subject.train.features[~held_out].mean(0), atol=0.5, rtol=0)
    assert groups[0].norm.num_batches_tracked == 8 * 5
    assert groups[1].norm.num_batches_tracked == 8 * 7  # 400 = 6 x 64 + 16


def test_the_rate_is_the_best_on_held_out_images(subject, groups):
    settings = QUICK.measure(subject)["settings"]
    held_out = held_out_mask(400, 0)
    features, labels = subject.train.features[held_out], subject.train.labels[held_out]
    right = 100 * (groups[0].predict(features) == labels).float().mean(dim=1)
    assert list(settings["held_out_accuracy"]) == ["0.01", "0.1", "1"]
    assert list(settings["held_out_accuracy"].values()) == pytest.approx(right.tolist())
    assert settings["rate"] == QUICK.linear_rates[int(right.argmax())]
    assert settings["held_out"] == 0.2


def test_neither_validation_nor_held_out_labels_reach_the_choosing_heads(subject, groups, state):
    chosen = QUICK.measure(subject)["settings"]
    other = Stub(subject.train, Features(torch.randn(50, 12), torch.randint(3, (50,))))
    assert QUICK.measure(other)["settings"] == chosen
    held_out = held_out_mask(400, 0)
    poisoned = Features(subject.train.features.clone(), subject.train.labels.clone())
    poisoned.labels[held_out] = (poisoned.labels[held_out] + 1) % 3
    poisoned.features[held_out] *= 100
    QUICK.measure(Stub(poisoned, subject.validation))
    assert torch.equal(state(groups[0]), state(groups[2]))
    assert torch.equal(state(groups[0]), state(groups[4]))
    assert not torch.equal(state(groups[1]), state(groups[5]))  # the final heads do learn from them


def test_a_head_does_not_depend_on_the_other_rates(subject, groups):
    QUICK.measure(subject)
    replace(QUICK, linear_rates=[0.1]).measure(subject)
    torch.testing.assert_close(groups[1].heads[1].weight, groups[3].heads[0].weight)


def test_the_same_seed_gives_the_same_and_the_global_generator_is_left_alone(subject, groups, state):
    before = torch.get_rng_state()
    QUICK.measure(subject)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    QUICK.measure(subject)
    QUICK.measure(replace(subject, seed=1))
    assert torch.equal(state(groups[1]), state(groups[3]))
    assert not torch.equal(state(groups[1]), state(groups[5]))


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        (0, [(0, False), (1, False), (2, False), (3, False), (4, False)]),
        (2, [(0, True), (1, True), (0, True), (1, True), (0, True)]),
        (5, [(0, False), (1, False), (2, False), (3, False), (4, False)]),
    ],
)
def test_epochs_take_the_views_in_turn(subject, views, expected):
    replace(QUICK, linear_epochs=5, linear_views=views).measure(subject)
    assert subject.views == expected


def test_other_processes_take_part_in_every_pass_and_give_nothing(subject):
    asked = []
    subject.features = lambda split: asked.append(split)
    subject.view = lambda number, keep, bar: asked.append(number)
    assert replace(QUICK, linear_epochs=3).measure(subject) is None
    assert asked == ["train", "validation", 0, 1, 2]


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_every_optimizer_learns_by_its_own_grid(subject, optimizer):
    probe = Linear(linear_epochs=10, linear_batch_size=64, linear_optimizer=optimizer)
    probe.check()
    subject.predictions = {}
    result = probe(subject)
    assert result["accuracy"] > 70
    assert len(result["settings"]["held_out_accuracy"]) == len(linear.RATES[optimizer])
    assert optimizer in result["description"]


def test_lars_adapts_the_rate_of_matrices_only(subject, groups):
    replace(QUICK, linear_optimizer="lars").measure(subject)
    for group in groups[0].optimizer.param_groups:
        assert group["always_adapt"] == (group["params"][0].ndim == 2)


def test_a_rate_at_the_edge_is_told(subject, capsys):
    settings = replace(QUICK, linear_epochs=2, linear_rates=[1e-7, 0.1]).measure(subject)["settings"]
    assert settings["rate_at_edge"]
    assert "--linear_rates" in capsys.readouterr().err
    for accuracies, rate in (({0.3: 50.0, 0.1: 60.0, 1.0: 60.0, 0.01: 10.0}, 0.1), ({0.1: 50.0}, 0.1)):
        settings = choose_learning_rate(accuracies, "linear_rates")
        assert settings["rate"] == rate  # the smallest of equals
        assert "rate_at_edge" not in settings
    assert "linear_rates" not in capsys.readouterr().err


@pytest.mark.parametrize(("count", "num_batches"), [(65, 1), (66, 2), (3, 1)])
def test_a_last_batch_of_one_image_is_left_out(count, num_batches, subject, groups):
    """BatchNorm has no variance of one image."""
    subject.train = blobs(count, 2)
    assert len(replace(QUICK, linear_epochs=1).measure(subject)["predictions"]) == 300
    assert groups[1].norm.num_batches_tracked == num_batches


def test_too_few_images_are_named(subject):
    subject.train = blobs(2, 2)
    with pytest.raises(ValueError, match="at least 3 training images, got 2"):
        QUICK.measure(subject)


def test_views_of_other_images_are_refused(subject):
    subject.view = lambda number, keep, bar: blobs(399, 2)
    with pytest.raises(ValueError, match="random crops"):
        QUICK.measure(subject)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("linear_epochs", 0),
        ("linear_batch_size", 1),
        ("linear_warmup_epochs", -1),
        ("linear_weight_decay", -0.1),
        ("linear_views", -1),
        ("linear_momentum", 1.0),
        ("linear_rates", [0.1, 0.0]),
        ("linear_optimizer", "adam"),
    ],
)
def test_impossible_options_are_refused(name, value):
    with pytest.raises(ValueError, match=f"--{name} must"):
        Linear(**{name: value}).check()


def test_lars_without_timm_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ImportError, match="pip install timm"):
        Linear(linear_optimizer="lars").check()


def test_command_line():
    parser = option_parser(Linear, description="")
    assert parser.parse_args_into_dataclasses([])[0] == Linear()
    (probe,) = parser.parse_args_into_dataclasses(["--linear_optimizer", "lars", "--linear_rates", "0.1", "1"])
    assert (probe.linear_optimizer, probe.rates) == ("lars", [0.1, 1.0])
    assert "per 256 images" in parser.format_help()
