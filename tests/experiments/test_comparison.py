"""Tables that compare encoders hold the numbers of their study and nothing else, and so do the documents."""

from pathlib import Path

import pytest

from experiments.comparison.tables import comparison, details, main
from ldae.report.results import save_result

ROOT = Path(__file__).parents[2]


def protocol(accuracy):
    return {"accuracy": accuracy, "standard_error": 0.8}


def run(folder, config, knn, linear, floor):
    save_result(folder / "results/train.json", {"kind": "train", "config": config, "seconds": 1206, "epochs": 6.54})
    probe = {"protocols": {"knn": protocol(knn), "linear-fast": protocol(linear)}}
    probe["floor"] = {"knn": protocol(floor), "linear-fast": protocol(floor + 1), "description": "untrained"}
    save_result(folder / "results/probe-x.json", {"kind": "probe", **probe})


def test_comparison(tmp_path):
    ldae = {"model_type": "ldae", "tokenizer_type": "pca", "latent_dim": 16, "latent_scaling": "component"}
    run(tmp_path / "a", ldae, 41.25, 55.0, 30.0)
    run(
        tmp_path / "b",
        {"model_type": "vit_mae", "architectures": ["ViTMAEBaseline"], "mask_ratio": 0.75},
        44.0,
        56.04,
        35.0,
    )
    run(tmp_path / "c", {"model_type": "vit", "architectures": ["Another"]}, 43.0, 54.0, 36.0)
    run(tmp_path / "d", {**ldae, "keep_ratio": 0.5, "loss_units": "latent"}, 42.0, 57.0, 30.0)
    save_result(tmp_path / "unfinished/results/train.json", {"kind": "train"})
    beyond = "50 % of the tokens, loss in latent units"  # what is not the paper's is named
    assert comparison(tmp_path).splitlines() == [
        "| encoder | minutes | epochs | k-NN | Linear (L-BFGS) |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| untrained ViT | – | 0 | 35.0 ± 0.8 | 36.0 ± 0.8 |",
        "| untrained l-DAE, d = 16 | – | 0 | 30.0 ± 0.8 | 31.0 ± 0.8 |",
        "| Another | 20.1 | 6.5 | 43.0 ± 0.8 | 54.0 ± 0.8 |",
        "| ViTMAE (transformers), 75 % masked | 20.1 | 6.5 | 44.0 ± 0.8 | 56.0 ± 0.8 |",
        "| l-DAE, d = 16, each component scaled | 20.1 | 6.5 | 41.2 ± 0.8 | 55.0 ± 0.8 |",
        f"| l-DAE, d = 16, each component scaled, {beyond} | 20.1 | 6.5 | 42.0 ± 0.8 | 57.0 ± 0.8 |",
    ]
    assert comparison(tmp_path, ["linear-fast"]).startswith("| encoder | minutes | epochs | Linear (L-BFGS) |\n")
    with pytest.raises(FileNotFoundError, match="no run"):
        comparison(tmp_path / "unfinished")


def test_details(tmp_path):
    figures = {**protocol(50.0), "seconds": 12.4, "description": "neighbours"}
    result = {"kind": "probe", "protocols": {"knn": figures, "few-shot": figures}, "floor": {"knn": protocol(30.0)}}
    save_result(tmp_path / "a/results/probe-x.json", result)
    assert details(tmp_path).splitlines() == [
        "| protocol | % | floor | seconds | what was done |",
        "| --- | ---: | ---: | ---: | --- |",
        "| `knn` | 50.0 ± 0.8 | 30.0 ± 0.8 | 12 | neighbours |",
        "| `few-shot` | 50.0 ± 0.8 | – | 12 | neighbours |",
    ]


def test_the_command_fills_the_marker_of_the_studys_name(tmp_path):
    run(tmp_path / "t", {"model_type": "vit", "architectures": ["Another"]}, 43.0, 54.0, 36.0)
    text = tmp_path / "README.md"
    text.write_text("before\n<!-- t -->\nold\n<!-- t -->\nafter\n")
    main([str(tmp_path / "t"), "--write", str(text), "--protocols", "knn"])
    table = comparison(tmp_path / "t", ["knn"])
    assert text.read_text() == f"before\n<!-- t -->\n{table}\n<!-- t -->\nafter\n"
