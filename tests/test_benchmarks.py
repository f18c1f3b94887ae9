"""The benchmarks' counts and tables; no test measures time."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import command, step
from benchmarks.contenders import Contender, Step, contenders, flops_per_image
from benchmarks.device import MatrixProducts, peak_flops
from ldae import LDAEConfig

CPU = torch.device("cpu")
CONFIG = LDAEConfig(
    image_size=32, patch_size=4, hidden_size=96, num_hidden_layers=3, num_attention_heads=2, latent_dim=8,
    decoder_num_hidden_layers=2,
)  # fmt: skip


def block_flops(blocks: int, tokens: int, width: int) -> int:
    """Forward and backward of transformer blocks on one image: 12 E² weights for each token, and two products of attention."""
    return 3 * 2 * blocks * (12 * width**2 * tokens + 2 * tokens**2 * width)


@pytest.mark.parametrize("keep_ratio", [1.0, 0.25])
@pytest.mark.parametrize("family", ["l-DAE", "ViTMAE"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_are_those_of_the_blocks(family, attention, keep_ratio):
    found = flops_per_image(Contender(family, attention, keep_ratio), CONFIG, CPU)
    expected = block_flops(3, int(64 * keep_ratio), 96) + block_flops(2, 64, 96)
    assert expected < found < 1.2 * expected  # the rest: embeddings, modulation, the class token, the tokenizer


def test_every_contender_is_named_once():
    chosen = contenders(["sdpa", "eager"], keep_ratio=0.5, compiled=True)
    names = [contender.name for contender in chosen]
    assert len(set(names)) == len(names) == 2 * (2 * 2 * 2 + 1)
    assert "l-DAE, sdpa, 50 % of the tokens, compiled" in names


def test_replayed_products_are_those_of_the_step():
    with MatrixProducts() as counted:
        Step(Contender("l-DAE", "eager"), CONFIG, 2, CPU, bf16=False)()
    products = counted.replay(CPU)
    with MatrixProducts() as replayed:
        products()
    assert replayed.seen == counted.seen


def test_only_known_gpus_have_a_published_rate(monkeypatch):
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA T4": None}
    for name, rate in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == rate
    assert peak_flops(CPU) is None


def test_a_benchmark_that_is_stopped_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    def measure(arguments):
        yield {"measured": 1}
        raise KeyboardInterrupt

    path = tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["step", "--batch_size", "3", "--output", str(path)])
    with pytest.raises(KeyboardInterrupt):
        command.run(step.StepArguments, measure, str)
    result = json.loads(path.read_text())
    assert (result["measured"], result["arguments"]["batch_size"]) == (1, 3)
    with pytest.raises(SystemExit, match="2"):
        command.run(step.StepArguments, measure, str)
    assert "pass --overwrite" in capsys.readouterr().err


def test_table_of_a_gpu_shows_utilization():
    result = json.loads(Path(step.__file__).with_name("results").joinpath("step.json").read_text())
    ours = {"seconds": [0.2, 0.2], "median": 0.2, "quartiles": [0.2, 0.2], "parameters": 1e6, "peak_memory": 2**20}
    theirs = {**ours, "seconds": [0.4, 0.4], "median": 0.4, "quartiles": [0.4, 0.4], "flops": 80e12}
    result |= {"device": "NVIDIA H200", "peak_flops": 1000e12, "measured_flops": 800e12}
    result["contenders"] = {"l-DAE, sdpa": {**ours, "flops": 100e12}, "DiT": theirs}
    result["arguments"]["batch_size"] = 64
    lines = step.table(result).splitlines()
    assert "TFLOP/s, of 1000 published" in lines[0]
    assert lines[-2:] == [
        "| l-DAE, sdpa | 1.0 M | 200 (200 to 200) | 320 | 1 | 50% | 62% | 1.00 |",
        "| DiT | 1.0 M | 400 (400 to 400) | 160 | 1 | 20% | 25% | 0.50 |",
    ]
