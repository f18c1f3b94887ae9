"""Kills every stage at random moments by SIGKILL, goes on, and compares the end with that of a run that nobody has stopped.

python -m tests.stress.kills --output runs/kills.json
"""

import copy
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ldae.options import option
from ldae.report.tables import markdown
from tests.experiments.ablation_stand_in import TINY
from tests.hub.hub_stand_in import HubStandIn, Repository
from tests.stress import command
from tests.stress.material import MODEL, RUN, write_images, write_parquet
from tests.stress.processes import run, warm_up

# what differs between two equal runs in two folders
UNLIKE = {"seconds", "date", "commit", "images_per_second", "arguments", "hardware", "model"}
LONG = 900  # seconds, after which what is not killed hangs
MOST = 5  # kills of one run, which then may end


@dataclass(kw_only=True)
class KillArguments(command.FileArguments):
    """Kill runs at random moments."""

    kills: int = option(60, "Kills of each stage.", minimum=1)
    stages: list[str] = option([], "Only these stages, beside those that the JSON file has; by default all.")
    seed: int = option(0, "Seed of the moments.")


@dataclass
class Stage:
    """What is killed.

    Args:
        module: whose `main` it is.
        argv: of a folder, in which it goes on if it is there.
        result: of a folder: what must be the same.
        prepared: whether the folder is one in which the stage has ended already.
        reset: before each run.
        whole: after each kill, given the result: whether nothing is half-written for others to see.
        part: of the kills of other stages, for one that takes long.
    """

    module: str
    argv: Callable[[Path], list[str]]
    result: Callable[[Path], Any]
    prepared: bool = False
    reset: Callable[[], object] = lambda: None
    whole: Callable[[Any], bool] = lambda expected: True
    part: float = 1


def same(value: Any) -> Any:
    """A result without what differs between two equal runs."""
    if isinstance(value, dict):
        return {name: same(part) for name, part in value.items() if name not in UNLIKE}
    return [same(part) for part in value] if isinstance(value, list) else value


def trained(folder: Path) -> dict[str, Any]:
    """The weights of a run and of its tokenizer, what was recorded of every step, and its results."""
    weights = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
        if "checkpoints" not in path.parts
    }
    lines = {
        str(path.relative_to(folder)): [same(json.loads(line)) for line in path.read_text().splitlines()]
        for path in sorted(folder.rglob("*.jsonl"))
    }
    return {"weights": weights, "lines": lines, "results": results(folder)}


def results(folder: Path) -> dict[str, Any]:
    """The results files of a folder."""
    return {
        str(path.relative_to(folder)): same(json.loads(path.read_text()))
        for path in sorted(folder.rglob("results/*.json"))
    }


def features(folder: Path) -> dict[str, Any]:
    """The rows of all shards."""
    return {path.name: pq.read_table(path).to_pydict() for path in sorted(folder.glob("*.parquet"))}


def differences(found: Any, expected: Any, place: str = "") -> list[str]:
    """Where two results differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        parts = sorted(found.keys() | expected.keys())
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
        parts = list(found)
    else:
        return [] if found == expected else [f"{place}: {str(found)[:200]}, not {str(expected)[:200]}"]
    return [line for part in parts for line in differences(found.get(part), expected.get(part), f"{place}/{part}")]


def stages(root: Path, hub: HubStandIn) -> dict[str, Stage]:
    """All stages, whose images and model lie in `root`."""
    data = ["--data", str(root / "data")]

    def train(*options: str) -> Callable[[Path], list[str]]:
        return lambda folder: [*data, *MODEL, *RUN, "--output_dir", str(folder), "--resume", *options]

    autoencoder = ("--tokenizer_type=patch_ae", "--prediction=latent", "--input_space=latent", "--tokenizer_epochs=1")
    return {
        "training": Stage("train_ldae", train(), trained),
        "training, in two micro-batches": Stage("train_ldae", train("--gradient_accumulation_steps=2"), trained),
        "training from a stream": Stage("train_ldae", train("--streaming", "--data", str(root / "tables")), trained),
        "PCA": Stage("train_ldae", train("--max_steps=1", "--held_out=0"), trained),
        "a tokenizer, then training": Stage("train_ldae", train(*autoencoder), trained),
        "a finished run, resumed": Stage("train_ldae", train(), trained, prepared=True),
        "features": Stage(
            "ldae.features.command",
            lambda folder: [
                "--model", str(root / "model"), *data, "--output_dir", str(folder), "--shard_size=5", "--batch_size=5",
            ],
            features,
        ),
        "probe": Stage(
            "probe_ldae",
            lambda folder: [
                "--model", str(root / "model"), *data, "--output_dir", str(folder / "results"), "--features_cache",
                str(folder / "cache"), "--protocols", "knn", "linear-fast", "retrieval", "finetune", "--finetune_epochs=1",
            ],
            results,
        ),
        "upload": push(root, hub),
        "ablation": Stage(
            "experiments.ablation.run",
            lambda folder: [
                str(root / "recipe.yaml"), "--output_dir", str(folder), "--rungs", "patch-pca", "l-dae", "--seeds", "0",
                "--", *TINY, "--max_steps=8", "--checkpointing_steps=2",
            ],
            trained,
            part=0.25,
        ),
    }  # fmt: skip


def push(root: Path, hub: HubStandIn) -> Stage:
    """The upload of another model to a repository, which holds the old one or the new one whole."""
    name, before = "org/model", Repository()

    def files(folder: Path | None = None) -> dict[str, bytes]:
        return dict(hub.repositories[name].files)

    def reset():
        hub.repositories[name] = copy.deepcopy(before)

    def whole(expected: dict[str, bytes]) -> bool:
        return files() in (before.files, expected)

    def argv(folder: Path) -> list[str]:
        if not before.commits:
            command = ["--model", str(root / "older"), "--hub_model_id", name]
            assert (outcome := run("ldae.hub.command", command)).kind == "worked", outcome.text
            before.__dict__.update(copy.deepcopy(hub.repositories[name]).__dict__)
        return ["--model", str(root / "model"), "--hub_model_id", name]

    return Stage("ldae.hub.command", argv, files, reset=reset, whole=whole)


def kill(stage: Stage, root: Path, whole: Path, duration: float, expected: Any, moments: random.Random) -> dict:
    """Makes one run, killed up to `MOST` times; counts the kills, and says what is wrong with its end, if anything."""
    folder = root / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    if stage.prepared:
        shutil.copytree(whole, folder)
    stage.reset()
    kills, halves = 0, 0
    for _ in range(MOST):
        outcome = run(stage.module, stage.argv(folder), kill_after=moments.uniform(0, duration))
        if outcome.kind != "killed":
            break
        kills += 1
        halves += not stage.whole(expected)
    else:
        outcome = run(stage.module, stage.argv(folder), limit=LONG)
    fault = None
    if halves:
        fault = "something was half-written"
    elif outcome.kind != "worked":
        fault = f"{outcome.kind} {outcome.status}: {outcome.text[-2000:]}"
    elif stage.result(folder) != expected:
        fault = f"another result: {differences(stage.result(folder), expected)[:5]}"
    return {"kills": kills, "fault": fault}


def measure(given: KillArguments) -> Iterator[dict]:
    """Makes runs of each stage until enough of them were killed."""
    found = command.earlier(given.output, "stages") if given.stages else {}
    with ExitStack() as open_:
        root = Path(open_.enter_context(tempfile.TemporaryDirectory()))
        write_images(root / "data")
        moments = random.Random(given.seed)
        write_parquet(root / "data", root / "tables")
        (root / "recipe.yaml").write_text(f"data: {root / 'data'}\n")
        model = ["--data", str(root / "data"), *MODEL, *RUN, "--output_dir"]
        warm_up("train_ldae", [*model, str(root / "model")])
        run("train_ldae", [*model, str(root / "older"), "--seed=1"])
        hub = open_.enter_context(HubStandIn(root / "hf"))
        hub.here(open_.enter_context(pytest.MonkeyPatch.context()))
        for name, stage in stages(root, hub).items():
            if given.stages and name not in given.stages:
                continue
            whole = root / f"alone-{len(found)}"
            warm_up(stage.module, stage.argv(whole))
            shutil.rmtree(whole, ignore_errors=True)
            stage.reset()
            reference = run(stage.module, stage.argv(whole), limit=LONG)
            assert reference.kind == "worked", reference.text
            expected, duration = stage.result(whole), reference.seconds
            count: dict[str, Any] = {"kills": 0, "runs": 0, "equal": 0, "seconds": duration, "faults": []}
            found[name] = count
            while count["kills"] < stage.part * given.kills:
                trial = kill(stage, root, whole, duration, expected, moments)
                count["kills"] += trial["kills"]
                count["runs"] += 1
                count["equal"] += trial["fault"] is None
                count["faults"] += [trial["fault"]] if trial["fault"] else []
            print(f"{name}: {count['kills']} kills, {count['equal']} of {count['runs']} runs equal", flush=True)
            yield {"benchmark": "kills", "stages": found}


def table(result: dict) -> str:
    """The counts, a row to each stage."""
    rows = [
        {"killed": name, "kills": count["kills"], "runs": count["runs"], "the same end": count["equal"]}
        for name, count in result["stages"].items()
    ]
    rows.append({"killed": "all", **{key: sum(row[key] for row in rows) for key in ("kills", "runs", "the same end")}})
    return markdown(rows)


if __name__ == "__main__":
    command.run(KillArguments, measure, table)
