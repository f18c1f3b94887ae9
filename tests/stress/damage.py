"""Damages every file of a checkpoint, of a finished folder and of a cache in several ways, and uses them.

python -m tests.stress.damage --output runs/damage.json
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ldae.report.tables import markdown
from tests.stress import command
from tests.stress.kills import features, results, trained
from tests.stress.material import MODEL, RUN, write_images
from tests.stress.processes import Outcome, run, warm_up


@dataclass(kw_only=True)
class DamageArguments(command.FileArguments):
    """Damage files."""


def flip(path: Path, at: float):
    """Flips a bit, at this part of the file."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def replace_by_folder(path: Path):
    """Puts an empty folder in a file's place."""
    path.unlink()
    path.mkdir()


A_FOLDER = "a folder in its place"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit flipped near its beginning": lambda path: flip(path, 0.02),
    "a bit flipped in its middle": lambda path: flip(path, 0.5),
    "a bit flipped at its end": lambda path: flip(path, 1),
    "its second half missing": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
    A_FOLDER: replace_by_folder,
}


@dataclass
class Target:
    """Files that are damaged, and the command that meets them.

    Args:
        files: of a folder: those that are damaged, one at a time.
        argv: of a folder.
        right: (outcome, folder) -> whether the command did what it should.
    """

    made: Path
    files: Callable[[Path], list[Path]]
    module: str
    argv: Callable[[Path], list[str]]
    right: Callable[[Outcome, Path, Path], bool]


def targets(root: Path) -> dict[str, Target]:
    """What is damaged, in folders below `root` that are made here."""
    data = ["--data", str(root / "data")]

    def train(folder: Path) -> list[str]:
        return [*data, *MODEL, *RUN, "--output_dir", str(folder), "--resume"]

    def embed(folder: Path) -> list[str]:
        return ["--model", str(root / "run"), *data, "--output_dir", str(folder), "--shard_size=10", "--batch_size=5"]

    def probe(folder: Path) -> list[str]:
        cache = ["--features_cache", str(folder / "cache")]
        return ["--model", str(root / "run"), *data, "--output_dir", str(folder / "results"), *cache, "--overwrite"]

    whole = {"run": trained, "features": features, "probe": results}
    for module, name, argv in (
        ("train_ldae", "run", train),
        ("ldae.features.command", "features", embed),
        ("probe_ldae", "probe", probe),
    ):
        outcome = run(module, argv(root / name))
        assert outcome.kind == "worked", outcome.text
    expected = {name: read(root / name) for name, read in whole.items()}

    def newest(folder: Path) -> Path:
        return sorted((folder / "checkpoints").iterdir())[-1]

    def checkpoint(folder: Path) -> list[Path]:
        return sorted(path for path in newest(folder).iterdir() if path.is_file())

    def model_files(folder: Path) -> list[Path]:
        return [folder / name for name in ("config.json", "model.safetensors", "preprocessor_config.json")]

    def fell_back(outcome: Outcome, folder: Path, file: Path) -> bool:
        return outcome.kind == "worked" and newest_name in outcome.text and trained(folder) == expected["run"]

    newest_name = newest(root / "run").name
    return {
        "the newest checkpoint, on resuming": Target(root / "run", checkpoint, "train_ldae", train, fell_back),
        "a model, on use": Target(
            root / "run",
            model_files,
            "ldae.features.command",
            lambda folder: ["--model", str(folder), *data, "--output_dir", str(folder / "features")],
            lambda outcome, folder, file: outcome.kind == "refused" and file.name in outcome.text,
        ),
        "shards of features, on going on": Target(
            root / "features",
            lambda folder: sorted(folder.glob("*.parquet")),
            "ldae.features.command",
            embed,
            lambda outcome, folder, file: outcome.kind == "worked" and features(folder) == expected["features"],
        ),
        "a cache of features, on probing": Target(
            root / "probe",
            lambda folder: sorted(path for path in (folder / "cache").rglob("*") if path.is_file()),
            "probe_ldae",
            probe,
            lambda outcome, folder, file: outcome.kind == "worked" and results(folder) == expected["probe"],
        ),
    }


def measure(given: DamageArguments) -> Iterator[dict]:
    """Damages one file in one way at a time, in a copy of the folder."""
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_images(root / "data")
        warm_up("train_ldae", ["--data", str(root / "data"), *MODEL, *RUN, "--output_dir", str(root / "warm")])
        for name, target in targets(root).items():
            count = found[name] = {"files": len(target.files(target.made)), "damages": 0, "right": 0, "faults": []}
            for index, file in enumerate(target.files(target.made)):
                for way, damage in DAMAGE.items():
                    folder = root / "damaged"
                    shutil.rmtree(folder, ignore_errors=True)
                    shutil.copytree(target.made, folder)
                    damage(target.files(folder)[index])
                    outcome = run(target.module, target.argv(folder))
                    right = target.right(outcome, folder, file)
                    if way == A_FOLDER:  # whose content may be wanted: it may also be refused by name
                        right = right or (outcome.kind == "refused" and file.name in outcome.text)
                    count["damages"] += 1
                    count["right"] += right
                    if not right:
                        count["faults"].append(f"{file.name}, {way}: {outcome.kind}: {outcome.text[-1000:]}")
            print(f"{name}: {count['right']} of {count['damages']} right", flush=True)
            print("\n".join(count["faults"]), flush=True)
            yield {"benchmark": "damage", "targets": found}


def table(result: dict) -> str:
    """The counts, a row to each target."""
    return markdown(
        [
            {"damaged": name, "files": count["files"], "ways and files": count["damages"], "right": count["right"]}
            for name, count in result["targets"].items()
        ]
    )


if __name__ == "__main__":
    command.run(DamageArguments, measure, table)
