"""The distributions: what a user has who installs the wheel, away from the checkout, and what the source holds."""

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
SCRIPTS = ("ldae-train", "ldae-probe", "ldae-features", "ldae-export", "ldae-push")
TRAIN = [
    "--max_steps=2", "--no_probe", "--image_size=16", "--patch_size=4", "--hidden_size=32", "--num_hidden_layers=1",
    "--num_attention_heads=2", "--latent_dim=4", "--per_device_batch_size=8", "--held_out=0",
]  # fmt: skip


def run(*command, cwd):
    """What a command prints; it must succeed."""
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def project_files():
    """The files of the project, by their paths: those that git knows, or all of an unpacked source distribution."""
    if (ROOT / ".git").exists():
        listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
        return {name for name in listed if (ROOT / name).is_file()}
    made = re.compile(r"(^|/)(__pycache__|\.[a-z]+_cache|\.hypothesis|[^/]*\.egg-info)/|^(PKG-INFO|setup\.cfg)$")
    names = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()}
    return {name for name in names if not made.search(name)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project's files, in a folder that is called as the package is."""
    folder = tmp_path_factory.mktemp("tree") / "ldae"
    for name in project_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def source(tree, tmp_path_factory):
    """The source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=tree)
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def unpacked(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation", "--quiet")


def installed(folder, *what):
    """Makes a fresh environment in a folder and installs `what` there. Other packages, pip too, are those of this one."""
    venv.create(folder)
    python = folder / "bin/python"
    # Only these folders are added, and nothing that their .pth files say: an editable install of ldae is not seen.
    places = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    (Path(site) / "outer.pth").write_text("\n".join(places))
    run(python, "-m", "pip", "install", *OFFLINE, *what, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def environment(source, tmp_path_factory):
    """A fresh environment with the wheel, built from the source distribution."""
    folder, wheels = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("wheels")
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "-w", wheels, source, cwd=folder)
    return installed(folder, *wheels.iterdir())


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def trained(environment, elsewhere):
    """The run's folder of `ldae-train` without a recipe."""
    run(environment / "bin/ldae-train", *TRAIN, cwd=elsewhere)
    (folder,) = (elsewhere / "runs").iterdir()
    return folder


def outcome(folder):
    """The options and the loss of a run, and the files of its folder but for its logs, whose names hold the time."""
    result = json.loads((folder / "results/train.json").read_text())
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return result["arguments"], result["loss"], {name for name in names if not name.startswith("logs/")}


def test_modules_and_recipes_are_those_of_the_wheel(environment, elsewhere):
    modules = [path.stem for path in ROOT.glob("*_ldae.py")]
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    code = f"""
import ldae, {", ".join(modules)}
from ldae.options import recipe_path
for module in (ldae, {", ".join(modules)}):
    print(module.__file__)
for name in {[path.stem for path in recipes]}:
    print(recipe_path(name))
"""
    files = [Path(line) for line in run(environment / "bin/python", "-c", code, cwd=elsewhere).splitlines()]
    assert len(files) == 1 + len(modules) + len(recipes) > 8
    assert all(file.is_relative_to(environment) for file in files)
    assert [file.read_bytes() for file in files[-len(recipes) :]] == [path.read_bytes() for path in recipes]


def test_an_editable_install_serves_scripts_beside_the_checkout(tree, tmp_path):
    python = installed(tmp_path, "-e", tree) / "bin/python"
    code = "import ldae; from ldae.options import recipe_path; print(ldae.__file__, recipe_path('photos'), sep=chr(10))"
    files = run(python, "-c", code, cwd=tree.parent).splitlines()
    assert files == [str(tree / "ldae/__init__.py"), str(tree / "recipes/photos.yaml")]


def test_training_is_that_of_the_checkout(trained, environment, tmp_path):
    for place, command in (
        ("checkout", [sys.executable, ROOT / "train_ldae.py"]),
        ("launched", [environment / "bin/python", "-m", "accelerate.commands.launch", "-m", "train_ldae"]),
    ):
        (tmp_path / place).mkdir()
        run(*command, *TRAIN, cwd=tmp_path / place)
        assert outcome(tmp_path / place / trained.relative_to(trained.parents[1])) == outcome(trained)


def test_a_trained_model_is_probed_and_gives_features(trained, environment, elsewhere):
    given = ["--model", trained, "--data", "photos"]
    run(
        environment / "bin/ldae-probe",
        *given,
        "--protocols",
        "knn",
        "--no_baseline",
        "--features_cache",
        "none",
        cwd=elsewhere,
    )
    assert "knn" in json.loads((trained / "results/probe-photos.json").read_text())["protocols"]
    run(environment / "bin/ldae-features", *given, "--output_dir", "features", cwd=elsewhere)
    assert json.loads((elsewhere / "features/_features.json").read_text())["num_readable"] > 0


def test_scripts_help(environment, elsewhere):
    """In one process, which reads the files that were installed."""
    code = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code
"""
    helped = run(
        environment / "bin/python", "-c", code, *(environment / "bin" / name for name in SCRIPTS), cwd=elsewhere
    )
    assert re.findall(r"^usage: ([\w-]+)", helped, re.MULTILINE) == [*SCRIPTS]


def test_the_source_distribution_is_the_project(unpacked):
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    made = {name for name in files if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    weights = {name for name in project_files() if name.endswith(".safetensors")}  # too large for an archive of sources
    assert files - made == project_files() - weights


def test_the_source_distribution_runs_its_tests(unpacked):
    """All of them can be collected there, and those run that look at most files of the project."""
    some = "test_configuration.py or test_cards.py"
    tested = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-k", some, cwd=unpacked)
    passed = {Path(name).name for name in re.findall(r"^PASSED (\S+\.py)::", tested, re.MULTILINE)}
    assert passed == set(some.split(" or "))
