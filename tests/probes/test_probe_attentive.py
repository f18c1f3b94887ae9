"""Attentive probes: their arithmetic against plain transcriptions, and what they find that the average does not show."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from ldae.features.extraction import Features
from ldae.options import option_parser
from ldae.probes import LinearFast, attentive
from ldae.probes.attentive import Attentive, AttentiveEfficient, AttentiveHeads, ManyQueries, OneQuery
from ldae.probes.protocol import held_out_mask
from ldae.probes.subject import Subject

QUICK = (
    Attentive(attentive_epochs=12, attentive_rates=[3e-3, 1e-2], attentive_batch_size=64),
    AttentiveEfficient(
        attentive_efficient_queries=4,
        attentive_efficient_epochs=12,
        attentive_efficient_rates=[1e-2, 3e-2],
        attentive_efficient_batch_size=64,
    ),
)
both = pytest.mark.parametrize("probe", QUICK, ids=lambda probe: probe.name)


@dataclass
class Stub:
    train: Features
    validation: Features
    seed: int = 0
    num_classes: int = 4
    device: torch.device = torch.device("cpu")
    progress, is_main_process, progress_bar = False, True, Subject.progress_bar

    def features(self, split: str, tokens: bool = False) -> Features:
        return getattr(self, split)


def needles(n: int, seed: int, num_tokens: int = 16, width: int = 16) -> Features:
    """Noise, in which one token at a random place carries a mark, which all classes share, and the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    tokens = 2 * torch.randn(n, num_tokens, width, generator=generator)
    needle = torch.zeros(n, width)
    needle[:, 0] = 12
    needle[torch.arange(n), 1 + labels] = 4
    tokens[torch.arange(n), torch.randint(num_tokens, (n,), generator=generator)] = needle
    return Features(tokens.mean(1), labels, tokens=tokens.half())


@pytest.fixture
def subject():
    return Stub(needles(500, 1), needles(300, 2))


@pytest.fixture
def trained(recorded):
    return recorded(attentive, "AttentiveHeads")


@pytest.mark.parametrize("width", [192, 64, 10])
def test_one_query_is_multihead_attention(width):
    torch.manual_seed(0)
    head, tokens = OneQuery(width, 5), torch.randn(3, 7, width)
    nn.init.normal_(head.query)
    head.classifier = nn.Identity()
    reference = nn.MultiheadAttention(width, head.num_heads, bias=False, batch_first=True)
    query = nn.Parameter(head.query.detach().clone())
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([torch.eye(width), head.key.weight, head.value.weight]))
        reference.out_proj.weight.copy_(head.out.weight)
    assert head.num_heads == max(1, width // 64)
    expected = reference(query.expand(3, 1, width), tokens, tokens)[0][:, 0]
    torch.testing.assert_close(head(tokens), expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(3, width)
    (head(tokens) * weights).sum().backward()
    (expected * weights).sum().backward()
    _, key, value = reference.in_proj_weight.grad.chunk(3)
    for got, want in (
        (head.query.grad, query.grad),
        (head.key.weight.grad, key),
        (head.value.weight.grad, value),
        (head.out.weight.grad, reference.out_proj.weight.grad),
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_many_queries_are_efficient_probing():
    torch.manual_seed(0)
    head, tokens = ManyQueries(12, 5, 4).double(), torch.randn(3, 7, 12, dtype=torch.float64)
    nn.init.normal_(head.queries)
    pooled = torch.zeros(3, 12, dtype=torch.float64)
    for b in range(3):
        values = tokens[b] @ head.value.weight.T  # (7, 12)
        for m in range(4):
            attention = torch.softmax(tokens[b] @ head.queries[m] / 12**0.5, dim=0)
            pooled[b, 3 * m : 3 * m + 3] = sum(attention[n] * values[n, 3 * m : 3 * m + 3] for n in range(7))
    expected = pooled @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(head(tokens), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("width", "asked", "got"), [(192, 32, 32), (100, 32, 25), (7, 32, 7), (13, 4, 1)])
def test_the_queries_divide_the_width(width, asked, got):
    assert len(ManyQueries(width, 2, asked).queries) == got


def test_heads_share_one_batch_norm_over_all_tokens():
    torch.manual_seed(0)
    heads, tokens = AttentiveHeads([OneQuery(8, 3), OneQuery(8, 3)], 8), 5 + 3 * torch.randn(6, 4, 8)
    flat = tokens.flatten(0, 1)
    normal = (tokens - flat.mean(0)) / (flat.var(0, correction=0) + 1e-6).sqrt()
    expected = torch.stack([head(normal) for head in heads.heads])
    torch.testing.assert_close(heads(tokens), expected, atol=1e-5, rtol=1e-4)


@both
def test_finds_the_token_that_tells_the_class(probe, subject):
    result = probe.measure(subject)
    average = LinearFast().measure(subject)
    assert result["accuracy"] > 90
    assert average["accuracy"] < result["accuracy"] - 20
    assert len(result["predictions"]) == 300


@both
def test_neither_validation_nor_held_out_images_reach_the_choice(probe, subject, trained, state):
    probe = replace(probe, **{f"{probe.prefix}_epochs": 3})
    chosen = probe.measure(subject)["settings"]
    assert probe.measure(replace(subject, validation=needles(40, 5)))["settings"] == chosen
    held_out = held_out_mask(500, 0)
    poisoned = copy.deepcopy(subject.train)
    poisoned.labels[held_out] = (poisoned.labels[held_out] + 1) % 4
    poisoned.tokens[held_out] = 50
    probe.measure(replace(subject, train=poisoned))
    choosing, again, poisoned = trained[0], trained[2], trained[4]
    assert torch.equal(state(choosing), state(again))
    assert torch.equal(state(choosing), state(poisoned))
    right = 100 * (choosing.predict(subject.train.tokens[held_out], 64) == subject.train.labels[held_out]).float().mean(
        1
    )
    assert list(chosen["held_out_accuracy"].values()) == pytest.approx(right.tolist())
    assert chosen["rate"] == getattr(probe, f"{probe.prefix}_rates")[int(right.argmax())]
    assert len(trained[1].heads) == 1


@both
def test_the_same_seed_gives_the_same_and_the_global_generator_is_left_alone(probe, subject, trained, state):
    probe = replace(probe, **{f"{probe.prefix}_epochs": 2})
    before = torch.get_rng_state()
    probe.measure(subject)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    probe.measure(subject)
    probe.measure(replace(subject, seed=1))
    assert torch.equal(state(trained[1]), state(trained[3]))
    assert not torch.equal(state(trained[1]), state(trained[5]))


@both
def test_other_processes_give_nothing(probe, subject):
    with pytest.raises(ValueError, match="at least 3"):
        probe.measure(replace(subject, train=needles(2, 1)))
    subject.features = lambda split, tokens: None
    assert probe.measure(subject) is None


@both
def test_too_many_tokens_are_refused(probe):
    probe.check_memory(1000, 64, 192)
    with pytest.raises(
        ValueError, match=rf"1331167 images x 196 tokens x 768 .* = 373.2 GiB.*--{probe.prefix}_max_gib"
    ):
        probe.check_memory(1331167, 196, 768)


@both
@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("batch_size", 1), ("weight_decay", -1.0), ("rates", []), ("rates", [0.0]), ("max_gib", 0.0)],
)
def test_impossible_options_are_refused(probe, name, value):
    with pytest.raises(ValueError, match=f"--{probe.prefix}_{name} must"):
        replace(probe, **{f"{probe.prefix}_{name}": value}).check()


def test_no_query_is_refused():
    with pytest.raises(ValueError, match="--attentive_efficient_queries must"):
        AttentiveEfficient(attentive_efficient_queries=0).check()


def test_one_command_line_takes_both():
    parser = option_parser(Attentive, AttentiveEfficient, description="")
    one, many = parser.parse_args_into_dataclasses(["--attentive_rates", "0.1", "--attentive_efficient_queries", "8"])
    assert (one.attentive_rates, many.attentive_efficient_rates) == ([0.1], [3e-3, 1e-2, 3e-2, 0.1])
    assert many.attentive_efficient_queries == 8
