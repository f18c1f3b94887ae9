"""Progress bars: where they are shown, and that there is never one inside another."""

import io
import re
import sys
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from PIL import Image
from transformers.utils import logging

import probe_ldae
from ldae import LDAEForPreTraining
from ldae.mistakes import run_command
from ldae.probes import PROTOCOLS
from ldae.progress import progress_bar

PROTOCOLS_WITH_BARS = sorted(
    set(PROTOCOLS) - {"knn", "knn-whitened"}
)  # they fit nothing and go through nothing step by step
FEW = [
    "--linear_epochs=2", "--attentive_epochs=2", "--attentive_efficient_epochs=2", "--few_shot_shots=1", "--few_shot_draws=2",
    "--linear_fast_iterations=5", "--finetune_epochs=1", "--finetune_batch_size=8",
]  # fmt: skip


class Terminal(io.StringIO):
    """A stderr that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch):
    """shown(work): the names of the bars that a terminal shows while something is done, and all that it was sent."""

    def show(work: Callable[[], Any]) -> tuple[set[str], str]:
        with monkeypatch.context() as patch:  # here, since pytest puts its own stderr in place before a test's call
            patch.setattr(sys, "stderr", Terminal())
            work()
            text = sys.stderr.getvalue()
        return bars(text), text

    yield show
    enable_progress_bars()
    logging.enable_progress_bar()


@pytest.fixture
def command(tmp_path, tiny_model):
    """The options of a probe of a tiny l-DAE by all protocols, on six images of two classes for each split."""
    tiny_model(LDAEForPreTraining).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    datasets.disable_progress_bars()
    yield [
        "--model", str(tmp_path / "model"), "--data", str(tmp_path / "images"), "--device", "cpu",
        "--features_cache", "none", "--protocols", *PROTOCOLS, *FEW,
    ]  # fmt: skip
    datasets.enable_progress_bars()


def bars(text: str) -> set[str]:
    """The names of the bars in a text, but for transformers' own."""
    return set(re.findall(r"([\w -]+): +\d+%", text)) - {"Loading weights", "Writing model shards"}


def test_a_probe_shows_one_bar_at_a_time(shown, command):
    """Of extracting features and of every protocol. A bar inside another would move the cursor up."""
    names, text = shown(lambda: probe_ldae.main([*command, "--sweep"]))
    assert names == {"features", "sweep", *PROTOCOLS_WITH_BARS}
    assert "\x1b[A" not in text


@pytest.mark.parametrize("disable", [logging.disable_progress_bar, disable_progress_bars], ids=["transformers", "hub"])
def test_a_probe_shows_no_bars_where_libraries_show_none(shown, command, disable):
    disable()
    names, _ = shown(lambda: probe_ldae.main([*command, "--no_baseline"]))
    assert not names


def test_a_probe_shows_no_bars_without_a_terminal(command, capsys):
    probe_ldae.main([*command, "--no_baseline"])
    assert not bars(capsys.readouterr().err)


@pytest.mark.parametrize("disabled", [False, True])
def test_a_command_hides_the_bars_of_libraries_and_keeps_ours_as_they_were(shown, monkeypatch, disabled):
    monkeypatch.setattr(sys, "argv", ["probe_ldae.py"])
    if disabled:
        disable_progress_bars()
    names, _ = shown(lambda: run_command(lambda: list(progress_bar(range(2), desc="ours"))))
    assert not logging.is_progress_bar_enabled()
    assert names == (set() if disabled else {"ours"})
