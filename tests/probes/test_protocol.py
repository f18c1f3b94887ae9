"""What every protocol shares: how it is found, and its predictions as text."""

import numpy as np
import pytest
import torch

import ldae.probes
import probe_ldae
from ldae.options import option
from ldae.probes import PROTOCOLS, Knn, Protocol, pack, register_protocol, unpack

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
    order = ["knn", "linear", "linear-fast", "attentive", "attentive-efficient", "finetune", "few-shot", "retrieval"]
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
