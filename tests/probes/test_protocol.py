"""What every protocol shares: how it is found, its options and result, and its predictions as text."""

import dataclasses

import numpy as np
import pytest
import torch
from blobs import blobs, subject_of

import ldae.probes
import probe_ldae
from ldae.options import option
from ldae.probes import PROTOCOLS, Knn, LinearFast, Protocol, pack, register_protocol, unpack
from ldae.probes.few_shot import FewShot
from ldae.probes.retrieval import Retrieval

NEW = """
from dataclasses import dataclass

from ldae.options import option
from ldae.probes.protocol import Protocol, register_protocol


@register_protocol
@dataclass
class {cls}(Protocol):
    name = "{name}"
    title = "New"
    {option}: int = option(3, "new: a number.", minimum=2)

    @property
    def description(self):
        return "nothing"

    def measure(self, subject):
        return None
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose modules belong to `ldae.probes` too; protocols that a test registers are forgotten afterwards."""
    known = dict(PROTOCOLS)
    monkeypatch.setattr(ldae.probes, "__path__", [*ldae.probes.__path__, str(tmp_path)])
    yield tmp_path
    PROTOCOLS.clear()
    PROTOCOLS.update(known)


# ------------------------------------------------------------------------------------------------------------- registry


def test_a_protocol_is_one_file(folder, capsys):
    (folder / "new_in_a_test.py").write_text(NEW.format(cls="New", name="new", option="new_number"))
    before = list(PROTOCOLS)
    ldae.probes.discover()
    assert list(PROTOCOLS) == [*before, "new"]  # columns of tables keep their order
    _, (protocol,) = probe_ldae.parse_arguments(["--model", "x", "--protocols", "new", "--new_number", "5"])
    assert (protocol.name, protocol.new_number) == ("new", 5)
    with pytest.raises(SystemExit):
        probe_ldae.parse_arguments(["--model", "x", "--protocols", "new", "--new_number", "1"])
    assert "--new_number: must be an integer of at least 2, got '1'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--new_number must be an integer of at least 2, got 1"):
        type(protocol)(new_number=1).check()
    with pytest.raises(SystemExit):
        probe_ldae.parse_arguments(["--help"])
    assert "new: a number. (at least 2; default: 3)" in " ".join(capsys.readouterr().out.split())


def test_protocols_have_the_order_of_tables():
    order = [
        "knn",
        "knn-whitened",
        "linear",
        "linear-fast",
        "attentive",
        "attentive-efficient",
        "finetune",
        "few-shot",
        "retrieval",
    ]
    assert list(PROTOCOLS) == order


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("knn", "knn_number", "the name 'knn' of Other is that of Knn"),
        ("other", "number", "options of Other must begin with 'other_', got 'number'"),
    ],
)
def test_a_protocol_that_would_hide_another_is_not_registered(folder, name, number, message):
    with pytest.raises(ValueError, match=message):
        exec(NEW.format(cls="Other", name=name, option=number), {})
    assert PROTOCOLS["knn"] is Knn
    assert "other" not in PROTOCOLS


def test_a_protocol_whose_options_would_be_lost_is_not_registered(folder):
    class Forgotten(Protocol):
        name = "forgotten"
        forgotten_number: int = option(3, "forgotten: a number.")

    with pytest.raises(TypeError, match="put @dataclass below @register_protocol"):
        register_protocol(Forgotten)


# ------------------------------------------------------------------------------------------------ options and results


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Knn, {"knn_k": 0}),
        (Knn, {"knn_temperature": 0.0}),
        (LinearFast, {"linear_fast_l2": []}),
        (LinearFast, {"linear_fast_l2": [1e-3, -1e-3]}),
        (LinearFast, {"linear_fast_iterations": 0}),
        (FewShot, {"few_shot_shots": []}),
        (FewShot, {"few_shot_shots": [1, 0]}),
        (FewShot, {"few_shot_draws": 0}),
        (FewShot, {"few_shot_l2": -1.0}),
        (FewShot, {"few_shot_l2": float("nan")}),
        (Retrieval, {"retrieval_k": []}),
        (Retrieval, {"retrieval_k": [0]}),
    ],
)
def test_impossible_options_are_named(cls, options):
    cls().check()
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"--{name} ") as error:
        cls(**options).check()
    assert str(value) in str(error.value)


@pytest.mark.parametrize("cls", [Knn, LinearFast, FewShot, Retrieval])
def test_options_of_a_protocol(cls):
    """Options say what they do, bear the protocol's name, and are those that a result reports."""
    prefix = cls.name.replace("-", "_")
    for field in dataclasses.fields(cls):
        assert field.name.startswith(prefix + "_")
        assert field.metadata["help"].startswith(f"{cls.name}: ")
    small = {"few_shot_draws": 2} if cls is FewShot else {}
    validation = blobs(50, 2)
    subject = subject_of(blobs(150, 1), validation)
    result = cls(**small)(subject)
    assert {field.name for field in dataclasses.fields(cls)} <= set(result["settings"])
    assert result["description"] == cls(**small).description
    assert result["seconds"] > 0
    assert {cls.metric, "standard_error"} <= result.keys()
    if "predictions" in result:  # they are those that the accuracy counts
        right = unpack(result["predictions"]) == validation.labels.numpy()
        assert result["accuracy"] == pytest.approx(100 * right.mean())
        assert torch.equal(subject.labels, validation.labels)
    assert ("predictions" in result) == (cls in (Knn, LinearFast))
    if cls in (Knn, LinearFast):
        assert subject.predictions[cls.name].shape == (50,)


@pytest.mark.parametrize("cls", [Knn, LinearFast, FewShot, Retrieval])
def test_other_processes_measure_nothing(cls):
    subject = subject_of(blobs(50, 1), blobs(50, 2))
    subject.known = {"train": None, "validation": None}
    assert cls()(subject) is None


# ---------------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [([], "uint8"), ([0, 255, 3], "uint8"), ([0, 256], "uint16"), ([65535], "uint16"), ([65536], "uint32")],
)
def test_class_numbers_come_back_from_text(numbers, dtype):
    text = pack(torch.tensor(numbers, dtype=torch.long))
    got = unpack(text)
    assert (got.tolist(), got.dtype) == (numbers, dtype)
    assert text.isascii()
    assert pack(np.array(numbers, dtype=np.int64)) == text


def test_packed_class_numbers_are_small():
    assert len(pack(torch.arange(10_000) // 1000)) < 300
    assert len(pack(torch.randint(200, (10_000,)))) < 14_000  # 8 bits a number, and a third more as base64


def test_numbers_below_0_are_no_classes():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        pack(torch.tensor([0, -1]))
