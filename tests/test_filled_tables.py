"""Every table between markers of a document is what its command makes of the results that are kept, so no figure is typed."""

import json
import re
from functools import cache, partial
from pathlib import Path

import pytest

from benchmarks import export, features, growth, loader, paper, pca, startup, step
from experiments import search, segmentation
from experiments.ablation import report
from experiments.comparison import paired, tables
from ldae.files import read_json
from tests import versions
from tests.stress import damage, inputs, kills

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
COLUMNS = ("knn", "linear", "linear-fast", "attentive", "finetune")  # as in experiments/comparison/imagenette64.sh
SPEED = {
    "export": export, "export-bf16": export, "features": features, "growth": growth, "loader": loader, "pca": pca,
    "startup": startup, "step": step, "step-bf16": step, "step-gpu-base": step, "step-gpu-half-large": step,
}  # fmt: skip


of_paper = cache(paper.table)


def of_speed(name):
    return SPEED[name].table(read_json(ROOT / "benchmarks" / "results" / f"{name}.json"))


def of_stress(script, name):
    return script.table(read_json(ROOT / "tests" / "stress" / "results" / f"{name}.json"))


@cache
def of_ablation(*studies):
    study, *also = (RESULTS.relative_to(ROOT) / f"{name}.jsonl" for name in studies)  # which the page names
    return report.tables(study, also)


def of_search(place):
    results = [read_json(file) for file in sorted((ROOT / "docs" / "search").glob("*.json"))]
    return search.table(results).split("\n\n")[place]


TABLES = {
    "CONTRIBUTING.md": {"versions": lambda: versions.table(json.loads(versions.FILE.read_text()))},
    "benchmarks/README.md": {"paper": of_paper, **{name: partial(of_speed, name) for name in SPEED}},
    "docs/ablation-20-epochs.md": {
        name: lambda name=name: of_ablation("ablation-20-epochs")[name]
        for name in ("setting", "facts", "claims", "table 2", "table 3", "branches")
    },
    "docs/ablation.md": {
        name: lambda name=name: of_ablation("ablation", "crops")[name]
        for name in ("setting", "facts", "claims", "table 1", "table 2", "table 3", "branches", "timesteps", "blocks")
    },
    "docs/comparison.md": {
        "imagenette64": lambda: tables.comparison(RESULTS / "imagenette64.jsonl", COLUMNS),
        **{
            name: partial(paired.table, RESULTS / f"{name}.jsonl", *given)
            for name, given in {
                "tiny-imagenet64": ["mae-decoder1"],
                "tiny-imagenet64-60min": ["mae-decoder1"],
                "tiny-imagenet64-bf16": ["mae-decoder1-mask85-lr2e-3", ["mae-decoder1-mask85"]],
                "tiny-imagenet64-30min-bf16": ["mae-decoder1"],
            }.items()
        },
    },
    "docs/defaults.md": {
        "latents64": lambda: tables.comparison(RESULTS / "latents64.jsonl"),
        "photos": lambda: tables.comparison(RESULTS / "photos.jsonl"),
        "photos-components": lambda: paired.table(RESULTS / "photos-components.jsonl", "d16"),
    },
    "docs/dense.md": {"segmentation": lambda: segmentation.table(RESULTS / "segmentation.jsonl")},
    "docs/probes.md": {"probes64": lambda: tables.details(RESULTS / "probes64.jsonl")},
    "docs/reliability.md": {
        name: partial(of_stress, script, name)
        for name, script in {"damage": damage, "inputs": inputs, "kills": kills}.items()
    },
    "docs/search.md": {"search": partial(of_search, 0), "copies": partial(of_search, 1)},
    "model_cards/README.md": {"paper": of_paper},
}


def marked(page):
    return re.findall(r"^<!-- ([\w -]+) -->\n(.*?)\n<!-- \1 -->$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_every_marked_table_is_known():
    pages = (
        page for place in ("*", "benchmarks/*", "docs/**/*", "model_cards/**/*") for page in ROOT.glob(f"{place}.md")
    )
    found = {str(page.relative_to(ROOT)): {name for name, _ in marked(page)} for page in pages}
    assert {page: names for page, names in found.items() if names} == {page: set(TABLES[page]) for page in TABLES}


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, names in TABLES.items() for name in names])
def test_a_table_is_what_its_results_give(page, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert dict(marked(ROOT / page))[name] == TABLES[page][name]()
