"""Generates wrong inputs by the thousand, and counts how commands end.

python -m tests.stress.inputs --output runs/inputs.json

An input that happens to be right may work. One that is surely wrong must be refused: what works in spite of it is silent.
"""

import io
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ldae.features.command import FeatureArguments
from ldae.options import option
from ldae.options.declaration import domains
from ldae.options.model import ModelArguments
from ldae.options.training import DataArguments, TrainArguments
from ldae.report.tables import markdown
from tests.stress import command
from tests.stress.material import MODEL, RUN, write_images, write_parquet
from tests.stress.processes import Outcome, run, warm_up

TEXTS = [
    "", " ", "nan", "inf", "-1", "0", "1e400", "-1e-9", "3", "0.5", "99999999999999999999", "abc", "None", "null", "../..",
    "é\u202e", "[1, 2]", "{}", "true", "/dev/null", "/dev/zero", "/proc/self/mem", "0x10", "1_0", "x" * 5000,
]  # fmt: skip
VALUES: list[Any] = [
    None, -1, 0, 1, 3, 10**9, 10**30, 0.5, -0.5, float("nan"), float("inf"), "", "x", "true", "/etc/passwd", [], [1, 2], [0, 0],
    {}, {"a": 1}, True, False,
]  # fmt: skip
LEFT_ALONE = {  # what would reach for the network, other folders, or run for hours though it is right
    "output_dir", "hub_model_id", "push_to_hub", "hub_private", "max_minutes", "init_from", "tokenizer_lpips_weights",
    "num_workers", "report_to",
}  # fmt: skip
WRONG = ("traceback", "hang", "crash", "unclear", "silent")


@dataclass(kw_only=True)
class InputArguments(command.FileArguments):
    """Try inputs that are wrong."""

    count: int = option(3000, "Inputs, shared between all kinds.", minimum=10)
    kinds: list[str] = option([], "Only these kinds, beside those that the JSON file has; by default all.")
    seed: int = option(0, "Seed of the inputs.")


@dataclass
class Trial:
    """One input, or several that one command meets.

    Args:
        what: in words.
        outcome: how the command ended.
        inputs: how many there were.
        silent: whether it went on though the input is surely wrong, or did not though it should have.
    """

    what: str
    outcome: Outcome
    inputs: int = 1
    silent: bool = False

    @property
    def kind(self) -> str:
        return "silent" if self.silent else self.outcome.kind


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A file's content: cut, with bytes changed, with a piece twice, with another beginning, or empty."""
    at, size = chance.randrange(len(content)), chance.randrange(1, 64)
    return chance.choice(
        [
            content[:at],
            content[:at] + chance.randbytes(size) + content[at + size :],
            content[:at] + content[max(0, at - size) :],
            chance.randbytes(size) + content[size:],
            b"",
            content[at:],
        ]
    )


class Kinds:
    """What is tried: each method makes one trial."""

    def __init__(self, root: Path, chance: random.Random):
        self.root, self.chance = root, chance
        self.data = ["--data", str(root / "data")]
        self.options = {name: cls for cls in (ModelArguments, DataArguments, TrainArguments) for name in domains(cls)}
        self.number = 0

    def fresh(self) -> Path:
        """A path that is not there."""
        self.number += 1
        return self.root / f"trial-{self.number}"

    def train(self, *argv: str) -> Outcome:
        folder = self.fresh()
        outcome = run("train_ldae", [*argv, "--output_dir", str(folder)])
        shutil.rmtree(folder, ignore_errors=True)
        return outcome

    def embed(self, model: Path, data: Path) -> Outcome:
        folder = self.fresh()
        outcome = run(
            "ldae.features.command", ["--model", str(model), "--data", str(data), "--output_dir", str(folder)]
        )
        shutil.rmtree(folder, ignore_errors=True)
        return outcome

    def options_of_training(self) -> Trial:
        """An option of train_ldae.py with a strange text."""
        name = self.chance.choice(sorted(set(self.options) - LEFT_ALONE))
        text = self.chance.choice(TEXTS)
        outcome = self.train(*self.data, *MODEL, *RUN, "--held_out=0", f"--{name}={text}")
        return Trial(f"--{name}={text[:40]!r}", outcome)

    def pairs_of_options(self) -> Trial:
        """Two options of train_ldae.py, each with a value that it may have alone."""
        argv = []
        for name in self.chance.sample(sorted(set(self.options) - LEFT_ALONE - {"epochs", "max_steps", "data"}), 2):
            domain = domains(self.options[name])[name]
            lowest = domain.minimum if domain.minimum is not None else 0
            texts = [str(choice) for choice in domain.choices] or {
                bool: ["true", "false"],
                int: [str(int(lowest)), "1", "2", "3"],
                float: ["0", "0.25", "1", "2"],
                str: ["train", "class_conditional"],
                dict: ["{}"],
            }[domain.type]
            argv.append(f"--{name}={self.chance.choice(texts)}")
        return Trial(" ".join(argv), self.train(*self.data, *MODEL, *RUN, "--held_out=0", *argv))

    def options_of_features(self) -> Trial:
        """An option of ldae-features with a strange text."""
        name = self.chance.choice([f.name for f in fields(FeatureArguments) if f.name not in LEFT_ALONE | {"model"}])
        text = self.chance.choice(TEXTS)
        folder = self.fresh()
        argv = ["--model", str(self.root / "model"), *self.data, "--output_dir", str(folder), f"--{name}={text}"]
        outcome = run("ldae.features.command", argv)
        shutil.rmtree(folder, ignore_errors=True)
        return Trial(f"ldae-features --{name}={text[:40]!r}", outcome)

    def mistyped_options(self) -> Trial:
        """An option whose name is not one."""
        name = self.chance.choice(sorted(self.options))
        at = self.chance.randrange(len(name))
        wrong = name[:at] + self.chance.choice("qxz") + name[at + self.chance.randrange(2) :]
        outcome = self.train(*self.data, *MODEL, *RUN, f"--{wrong}=1")
        return Trial(f"--{wrong}", outcome, silent=outcome.kind == "worked")

    def recipes(self) -> Trial:
        """A recipe that is damaged, or of which a key has a strange value."""
        path = self.root / "recipe.yaml"
        if self.chance.random() < 0.5:
            content = (Path(__file__).resolve().parents[2] / "recipes" / "photos.yaml").read_bytes()
            path.write_bytes(damaged(content, self.chance))
        else:
            name = self.chance.choice(sorted(set(self.options) - LEFT_ALONE))
            path.write_text(yaml.safe_dump({name: self.chance.choice(VALUES)}))
        outcome = self.train(str(path), *self.data, *MODEL, *RUN, "--held_out=0")
        return Trial(f"recipe {path.read_bytes()[:80]!r}", outcome)

    def images(self) -> Trial:
        """Twenty damaged images among forty good ones, none of which may be missed, and for which the run must work."""
        data = self.fresh()
        data.mkdir()
        good = sorted((self.root / "data" / "train").rglob("*.png"))
        for index, path in enumerate(good):
            shutil.copy(path, data / f"good-{index}.png")
        for index in range(20):
            buffer, kind = io.BytesIO(), self.chance.choice(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
            with Image.open(self.chance.choice(good)) as image:
                image.resize((64, 48)).save(buffer, kind)
            (data / f"bad-{index}.{kind.lower()}").write_bytes(damaged(buffer.getvalue(), self.chance))
        outcome = self.train("--data", str(data), *MODEL, *RUN, "--held_out=0", "--per_device_batch_size=16")
        silent = outcome.kind == "refused" or any(f"Skipping {data}/good" in line for line in outcome.text.splitlines())
        shutil.rmtree(data)
        return Trial("damaged images", outcome, 20, silent)

    def configurations(self) -> Trial:
        """A model's config.json with a strange value."""
        model = shutil.copytree(
            self.root / "model", self.fresh(), ignore=shutil.ignore_patterns("checkpoints", "digests*")
        )
        config = json.loads((model / "config.json").read_text())
        name, value = self.chance.choice(sorted(config)), self.chance.choice(VALUES)
        (model / "config.json").write_text(json.dumps({**config, name: value}))
        outcome = self.embed(model, self.root / "few")
        shutil.rmtree(model)
        return Trial(f"config.json: {name} = {value!r}", outcome)

    def model_files(self) -> Trial:
        """A damaged file of a model."""
        model = shutil.copytree(self.root / "model", self.fresh(), ignore=shutil.ignore_patterns("checkpoints"))
        if whole := self.chance.random() < 0.5:
            (model / "digests.sha256").unlink()
        path = model / self.chance.choice(["config.json", "model.safetensors", "preprocessor_config.json"])
        before = path.read_bytes()
        path.write_bytes(damaged(before, self.chance))
        changed = path.read_bytes() != before
        outcome = self.embed(model, self.root / "few")
        shutil.rmtree(model)
        without = "without digests, " if whole else ""
        return Trial(
            f"{without}damaged {path.name}", outcome, silent=changed and not whole and outcome.kind == "worked"
        )

    def tables(self) -> Trial:
        """A damaged parquet file."""
        data = self.fresh()
        data.mkdir()
        content = (self.root / "tables" / "train-00000-of-00001.parquet").read_bytes()
        (data / "train-00000-of-00001.parquet").write_bytes(damaged(content, self.chance))
        outcome = self.train("--data", str(data), *MODEL, *RUN, "--held_out=0")
        shutil.rmtree(data)
        return Trial("damaged parquet", outcome)


KINDS: dict[str, tuple[str, Callable[[Kinds], Trial], float]] = {  # the part of all inputs
    "options of training": ("one strange value", Kinds.options_of_training, 0.25),
    "pairs of options of training": ("values that each may have alone", Kinds.pairs_of_options, 0.1),
    "options of ldae-features": ("one strange value", Kinds.options_of_features, 0.05),
    "names of options": ("mistyped", Kinds.mistyped_options, 0.05),
    "recipes": ("damaged, or a strange value", Kinds.recipes, 0.1),
    "images": ("damaged", Kinds.images, 0.25),
    "config.json": ("a strange value", Kinds.configurations, 0.1),
    "files of a model": ("damaged, with and without digests", Kinds.model_files, 0.06),
    "parquet files": ("damaged", Kinds.tables, 0.04),
}


def measure(given: InputArguments) -> Iterator[dict]:
    """Makes trials of each kind until its part of the inputs is tried."""
    found = command.earlier(given.output, "kinds") if given.kinds else {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_images(root / "data")
        write_parquet(root / "data", root / "tables")
        (root / "few").mkdir()
        for path in sorted((root / "data" / "train").rglob("*.png"))[:4]:
            shutil.copy(path, root / "few")
        model = root / "model"
        warm_up("train_ldae", ["--data", str(root / "data"), *MODEL, *RUN, "--output_dir", str(model)])
        embed = ["--model", str(model), "--data", str(root / "few"), "--output_dir", str(root / "warm")]
        warm_up("ldae.features.command", embed)
        for name, (_, make, part) in KINDS.items():
            if given.kinds and name not in given.kinds:
                continue
            kinds = Kinds(root, random.Random(f"{given.seed} {name}"))
            ends: Counter[str] = Counter()
            faults: list[dict[str, str]] = []
            inputs = 0
            while inputs < part * given.count:
                trial = make(kinds)
                inputs += trial.inputs
                ends[trial.kind] += trial.inputs
                if trial.kind in WRONG:
                    faults.append({"input": trial.what, "end": trial.kind, "said": trial.outcome.text[-1500:]})
                    print(f"{name}: {trial.kind}: {trial.what}", flush=True)
            found[name] = {"inputs": inputs, "ends": dict(ends), "faults": faults}
            print(f"{name}: {dict(ends)}", flush=True)
            yield {"benchmark": "inputs", "kinds": found}


def table(result: dict) -> str:
    """The counts, a row to each kind."""
    rows = []
    for name, count in result["kinds"].items():
        ends = count["ends"]
        rows.append(
            {
                "inputs": f"{name}: {KINDS[name][0]}",
                "tried": count["inputs"],
                "refused in one line": ends.get("refused", 0),
                "worked": ends.get("worked", 0),
                "tracebacks": ends.get("traceback", 0),
                "hangs": ends.get("hang", 0),
                "silent": ends.get("silent", 0),
                "other": ends.get("crash", 0) + ends.get("unclear", 0),
            }
        )
    numbers = list(rows[0])[1:]
    rows.append({"inputs": "all", **{key: sum(row[key] for row in rows) for key in numbers}})
    return markdown(rows)


if __name__ == "__main__":
    command.run(InputArguments, measure, table)
