"""The benchmarks' counts and tables; no test measures time."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import command, export, features, growth, loader, paper, pca, startup, step
from benchmarks.contenders import Contender, Step, contenders, flops_per_image
from benchmarks.device import MatrixProducts, peak_flops
from ldae import LDAEConfig, LDAEModel
from ldae.data.photos import load_photos
from ldae.options.declaration import domains
from ldae.report.results import environment
from tokenizers_ldae import patchify

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
    found = flops_per_image(Contender(family, attention, keep_ratio), CONFIG)
    expected = block_flops(3, int(64 * keep_ratio), 96) + block_flops(2, 64, 96)
    assert expected < found < 1.2 * expected  # the rest: embeddings, modulation, the class token, the tokenizer


def test_every_contender_is_named_once():
    chosen = contenders(["sdpa", "eager"], keep_ratio=0.5, compiled=True)
    names = [contender.name for contender in chosen]
    assert len(set(names)) == len(names) == 2 * (2 * 2 * 2 + 1)
    assert "l-DAE, sdpa, 50 % of the tokens, compiled" in names


@pytest.mark.parametrize("family", ["l-DAE", "ViTMAE"])
def test_contenders_of_one_configuration_keep_their_own_attention(family):
    steps = [Step(Contender(family, attention), CONFIG, 2, CPU, bf16=False) for attention in ("sdpa", "eager")]
    assert [step.model.config._attn_implementation for step in steps] == ["sdpa", "eager"]


def test_replayed_products_are_those_of_the_step():
    with MatrixProducts() as counted:
        Step(Contender("l-DAE", "eager"), CONFIG, 2, CPU, bf16=False)()
    products = counted.replay(CPU)
    with MatrixProducts() as replayed:
        products()
    assert replayed.seen == counted.seen


def test_contenders_of_pca_find_the_same_variances():
    images = torch.randn(300, 3, 16, 16, generator=torch.Generator().manual_seed(0)).cumsum(3).tanh()
    config = LDAEConfig(image_size=16, patch_size=8)
    patches = patchify(images, config.patch_hw).flatten(0, 1).numpy()
    wide = patches.astype(np.float64)
    exact = np.linalg.svd(wide - wide.mean(0), compute_uv=False) ** 2 / len(wide)
    np.testing.assert_allclose(pca.exact_variances(patches), exact, rtol=1e-9)
    for name, fit in pca.contenders(images, patches, config, 64).items():
        np.testing.assert_allclose(fit(), exact, rtol=1e-5, err_msg=name)


def test_pca_is_measured_for_each_size_of_the_patches(monkeypatch):
    monkeypatch.setattr(pca, "load_examples", lambda *names: load_photos("validation").select(range(8)))
    arguments = pca.PCASpeedArguments(image_size=32, patch_sizes=[4, 8], num_patches=1000, rounds=2)
    *_, result = pca.measure(arguments)
    lines = pca.table({**result, **environment(), "arguments": vars(arguments)}).splitlines()
    titles = [line.split(" | ")[0] for line in lines if " patches of " in line]
    assert titles == ["| 1,024 patches of 4 px, D = 48", "| 1,008 patches of 8 px, D = 192"]
    ours = [line.split(" | ") for line in lines if line.startswith("| ldae |")]
    assert [cells[2] for cells in ours] == ["1.00", "1.00"]  # beside itself


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
    with pytest.raises(SystemExit, match="130"):
        command.run(step.StepArguments, measure, str)
    result = json.loads(path.read_text())
    assert (result["measured"], result["arguments"]["batch_size"]) == (1, 3)
    with pytest.raises(SystemExit, match="2"):
        command.run(step.StepArguments, measure, str)
    assert "pass --overwrite" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["step", "--table", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="2"):
        command.run(step.StepArguments, measure, str)
    assert f"there is no file {tmp_path / 'none.json'}" in capsys.readouterr().err
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        command.run(step.StepArguments, measure, str)
    assert "is no result of a benchmark" in capsys.readouterr().err


def test_a_plot_is_drawn_for_the_page_only(tmp_path, monkeypatch):
    """A new measurement leaves the page and its plot alone."""
    drawn, page = [], tmp_path / "page.md"
    page.write_text("<!-- new -->\n<!-- new -->\n")
    run = partial(
        command.run, step.StepArguments, lambda arguments: iter([{}]), lambda result: "text", page, drawn.append
    )
    for name in ("output", "table"):
        assert not drawn
        assert "text" not in page.read_text()
        monkeypatch.setattr("sys.argv", ["step", f"--{name}", str(tmp_path / "new.json")])
        run()
    assert len(drawn) == 1
    assert "text" in page.read_text()


@pytest.mark.parametrize("benchmark", [export, features, growth, loader, pca, startup, step])
def test_numbers_of_a_benchmark_are_bounded(benchmark):
    (options,) = [cls for cls in command.FileArguments.__subclasses__() if cls.__module__ == benchmark.__name__]
    for option, domain in domains(options).items():
        if domain.type in (int, float):
            assert domain.bounds, option


def test_table_of_a_gpu_shows_utilization():
    result = json.loads(Path(step.__file__).with_name("results").joinpath("step.json").read_text())
    ours = {"seconds": [0.2, 0.2], "median": 0.2, "quartiles": [0.2, 0.2], "parameters": 1e6, "peak_memory": 2**20}
    ours["contender"] = {"compiled": False, "keep_ratio": 1.0}
    theirs = {**ours, "seconds": [0.4, 0.4], "median": 0.4, "quartiles": [0.4, 0.4], "flops": 80e12}
    result |= {"device": "NVIDIA H200", "peak_flops": 1000e12, "measured_flops": 800e12}
    slower = {**theirs, "flops": 100e12}  # has no column of its own
    result["contenders"] = {"l-DAE, sdpa": {**ours, "flops": 100e12}, "l-DAE, eager": slower, "DiT": theirs}
    result["arguments"]["batch_size"] = 64
    lines = step.table(result).splitlines()
    assert "TFLOP/s, of 1000 published" in lines[0]
    assert lines[-3:] == [
        "| l-DAE, sdpa | 1.0 M | 200 (200 to 200) | 320 | 1 | 50% | 62% | 1.00 |",
        "| l-DAE, eager | 1.0 M | 400 (400 to 400) | 160 | 1 | 25% | 31% | 0.50 |",
        "| DiT | 1.0 M | 400 (400 to 400) | 160 | 1 | 20% | 25% | 0.50 |",
    ]


def test_growth_of_known_power_laws(tmp_path):
    rows = [
        {"value": x, "seconds": [1.0, 0.001 * x**2, 0.0], "flops": x**1.5, "peak_memory": x * 2**20} for x in (4, 8, 16)
    ]
    result = {
        "quantities": {"tokens": rows}, "processes": {"1": 2.0, "2": 2.5}, "arguments": {"batch_size": 8}, "precision": "float32",
        "hardware": {"processor": "P"}, "date": "2026-11-26T00:00:00",
    }  # fmt: skip
    text = growth.table(result)
    assert "| tokens | 4, 8, 16 | 16, 64, 256 | 4, 8, 16 | 2.00 | 1.50 | 1.00 |" in text
    assert "take 1.25 times as long" in text
    assert "see 1.60 times as many" in text
    assert growth.draw(result, tmp_path / "growth.png").stat().st_size > 1000


def test_startup_is_set_beside_the_import_of_vit():
    seconds = {startup.PEER: [[2.0, 3.0], [4.0, 5.0], [3.0, 4.0]], "import ldae": [[3.0, 9.0], [4.0, 8.0], [3.0, 7.0]]}
    result = {"seconds": seconds, "hardware": {"processor": "P"}, "arguments": {"rounds": 3}, "date": "2026-11-26"}
    assert "| import ldae | 3.0 | 1.00 | 8.0 |" in startup.table(result)


def test_startup_counts_a_commands_own_time():
    processor, clock = startup.seconds_of([sys.executable, "-c", "import time; time.sleep(0.3)"])
    assert 0 < processor < clock
    assert clock > 0.3


def test_hours_on_paper_are_those_of_the_measured_images_a_second():
    size = {"image_size": 16, "patch_size": 8}
    flops = 32 * flops_per_image(Contender("l-DAE"), LDAEConfig.from_size("tiny", latent_dim=16, **size))
    result = {"contenders": {"l-DAE, sdpa, compiled": {"flops": flops, "median": 0.5}}, "arguments": size}
    images_a_second = 8 * 32 / 0.5
    assert paper.hours("tiny", result, 3) == pytest.approx(3 * 1_281_167 / images_a_second / 3600)


@pytest.mark.slow
def test_folded_forms_are_measured_on_what_they_give(tiny_model, tmp_path):
    """k-NN is asked of the features of l-DAE and of its graph in int8, and every form is timed."""
    tiny_model(LDAEModel, image_size=8).save_pretrained(tmp_path)
    arguments = export.ExportSpeedArguments(model=str(tmp_path), batch_sizes=[1, 2], rounds=1)
    speed, result = export.measure(arguments)
    assert speed["seconds"].keys() == {"1", "2"}
    assert 1 / 13 < result["accuracy"][export.OURS] < 1  # of 13 photographs
    assert abs(result["accuracy"][export.OURS] - result["accuracy"][export.INT8]) < 0.05
    assert 0.99 < result["least_cosine"] < 1
    text = export.table({**result, **environment(), "arguments": vars(arguments)})
    assert f"| {export.OWN} |" in text
    assert "k-NN on the photographs is right for" in text


def test_folded_forms_are_timed_in_bf16_without_accuracies(tiny_model, tmp_path):
    tiny_model(LDAEModel, image_size=8).save_pretrained(tmp_path)
    arguments = export.ExportSpeedArguments(model=str(tmp_path), batch_sizes=[2], rounds=1, dtype="bfloat16")
    (result,) = export.measure(arguments)
    assert set(result["seconds"]["2"]) == {export.OURS, export.IJEPA, export.TIMM, export.OWN, export.BARE}
    text = export.table({**result, **environment(), "arguments": vars(arguments)})
    assert "bfloat16" in text
    assert "k-NN" not in text
