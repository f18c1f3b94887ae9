"""What README and the documents say works: Python runs as it stands, commands parse, and links lead somewhere."""

import functools
import importlib.util
import json
import os
import re
import runpy
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun_parser

import ldae.features.command
import ldae.generation.command
import ldae.options
import probe_ldae
from ldae import LDAEConfig, LDAEForPreTraining
from ldae.hub.folder import save_hub_folder
from ldae.options.parser import OptionParser

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PAGES += ["benchmarks/README.md", "model_cards/README.md"]
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
PARSERS = {
    "train_ldae": ldae.options.parse_arguments,
    "probe_ldae": probe_ldae.parse_arguments,
    "ldae.features": ldae.features.command.parse_arguments,
    "ldae.generation": ldae.generation.command.parse_arguments,
}
# programs in whose command lines nothing is ours
FOREIGN = {"hf", "mypy", "pre-commit", "python3", "ruff", "sha256sum"}
OURS = dict(re.findall(r'"([\w-]+) = ([\w.]+):\w+"', SETUP))  # the commands that are installed, and their modules
PROGRAMS = {"accelerate", "bash", "mkdocs", "pip", "pytest", "python", "sbatch", "torchrun", *FOREIGN, *OURS}
NEEDS = {"app": "gradio"}  # what a command says no more without
NOTE = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >> "$COMMANDS"
printf '\\n\\0' >> "$COMMANDS"
"""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.S | re.M)


# --------------------------------------------------------------------------------------------------------------- links


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M)
    for target in re.findall(r"(?<!`)\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, place = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if place:
            headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", file.read_text(), flags=re.S | re.M), re.M)
            assert place in map(anchor, headings), f"{page} links to {target}"


def test_the_site_shows_every_page():
    """In its navigation, but for README, which is its first page under another address."""
    site = (ROOT / "docs/mkdocs.yml").read_text(encoding="utf-8")
    shown = re.findall(r": (\S+\.md)$", site, re.M)
    assert len(shown) == len(set(shown))
    assert set(PAGES) == set(shown)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert f'version="{citation["version"]}"' in SETUP
    assert f"[Unreleased]: {citation['version']}" in text_of("CHANGELOG.md")
    assert citation["preferred-citation"]["url"] in text_of("README.md")


# ------------------------------------------------------------------------------------------------------------ commands


def commands(block: str, folder: Path) -> list[list[str]]:
    """The commands that bash makes of a block, with all variables and loops filled in. Nothing of them is run."""
    noted, programs = folder / "commands", folder / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(NOTE)
        (programs / name).chmod(stat.S_IRWXU)
    activate = folder / ".venv/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    environment = {"PATH": str(programs), "COMMANDS": str(noted), "HOME": "/home/me"}
    done = subprocess.run(["/bin/bash", "-euc", block], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = noted.read_text().split("\n\0") if noted.exists() else []
    return [line.rstrip("\0").split("\0") for line in lines if line]


class Parsed(BaseException):
    """Ends a command when its command line has been read."""


def ends_after(parse):
    @functools.wraps(parse)
    def parse_and_end(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    return parse_and_end


def reads(run, argv: list[str], name: str):
    """A command reads its command line, and comes no further."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OptionParser, "parse_args_into_dataclasses", ends_after(OptionParser.parse_args_into_dataclasses))
        patch.setattr(sys, "argv", [name, *argv])
        with pytest.raises(Parsed):
            run()


def understood(command: list[str]):
    """Asserts that the program there is takes such a command."""
    program, *argv = command
    if program == "accelerate":
        launched = launch_command_parser().parse_args(argv[1:])
        module = ["-m"] if launched.module else []
        understood(["python", *module, launched.training_script, *launched.training_script_args])
    elif program == "torchrun":
        launched = torchrun_parser().parse_args(argv)
        understood(["python", launched.training_script, *launched.training_script_args])
    elif program in OURS:
        understood(["python", "-m", OURS[program].removesuffix(".command"), *argv])
    elif program == "python":
        name, argv = (argv[1], argv[2:]) if argv[0] == "-m" else (argv[0].removesuffix(".py"), argv[1:])
        if name in PARSERS:
            PARSERS[name](argv)
        elif "/" in name or (name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None):
            # tests/versions.py, which hands on what it does not know; or a script that needs an extra
            assert (ROOT / f"{name}.py").is_file()
        elif name.startswith("experiments.baselines."):
            PARSERS["train_ldae"](argv)
        elif argv and "--" in argv and name == "experiments.ablation.run":
            reads(lambda: runpy.run_module(name, run_name="__main__"), argv[: argv.index("--")], name)
            PARSERS["train_ldae"](argv[argv.index("--") + 1 :])
        else:
            reads(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True), argv, name)
    elif program in ("bash", "sbatch"):
        assert (ROOT / argv[0]).is_file()
    elif program == "pip":
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(argv)):
            assert all(f'"{name}": [' in SETUP for name in extra.split(","))
    elif program == "pytest":
        if "-m" in argv:
            assert f'"{argv[argv.index("-m") + 1]}: ' in (ROOT / "pyproject.toml").read_text()
    elif program == "mkdocs":
        assert (ROOT / argv[argv.index("-f") + 1]).is_file()
    else:
        assert program in FOREIGN, f"nobody knows {program}"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    ("page", "number"), [(page, number) for page in PAGES for number in range(len(blocks(page, "bash")))]
)
def test_commands_are_understood(page, number, tmp_path, monkeypatch):
    found = commands(blocks(page, "bash")[number], tmp_path)
    assert found
    monkeypatch.chdir(ROOT)
    for command in found:
        understood(command)


def test_a_command_that_nobody_knows_is_seen():
    for command in (
        ["python", "train_ldae.py", "--no_such_option"],
        ["python", "-m", "experiments.collect", "--no_such_option", "a", "b"],
        ["accelerate", "launch", "train_ldae.py", "no-such-recipe"],
        ["pip", "install", "-e", ".[no]"],
        ["pytest", "-m", "no"],
        ["no-such-program"],
    ):
        with pytest.raises((SystemExit, AssertionError, FileNotFoundError)):
            understood(command)


def test_the_slurm_script_starts_accelerate_on_each_machine(tmp_path):
    """srun runs its command on each machine with another SLURM_NODEID; here it does so for two."""
    stubs = {
        "scontrol": "echo first; echo second",
        "srun": 'for id in 0 1; do SLURM_NODEID=$id "$@"; done',
        "accelerate": 'printf "%s\\0" "$@" >> "$COMMANDS"; printf "\\n\\0" >> "$COMMANDS"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    slurm = {"SLURM_JOB_NODELIST": "x", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64", "SLURM_NNODES": "2"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COMMANDS": str(tmp_path / "noted"), **slurm}
    options = ["paper", "--data", "a folder", "--output_dir", "runs/paper"]
    subprocess.run(["bash", ROOT / "recipes/slurm.sh", *options], env=environment, check=True)
    lines = [line.rstrip("\0").split("\0") for line in (tmp_path / "noted").read_text().split("\n\0") if line]
    parsed = [launch_command_parser().parse_args(line[1:]) for line in lines]
    assert [launched.machine_rank for launched in parsed] == [0, 1]
    for launched in parsed:
        assert (launched.num_machines, launched.num_processes, launched.main_process_ip) == (2, 16, "first")
        assert launched.training_script_args == options


# -------------------------------------------------------------------------------------------------------------- Python


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the examples are given: a trained model, one that generates, an image and images with labels."""
    tiny = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    generates = {"noise_schedule": "ddpm", "input_space": "latent", "prediction": "noise", "latent_dim": 8}
    rng = np.random.default_rng(0)
    for name, fields in {"ldae-tiny-photos": {"latent_dim": 8}, "ablation/patch-pca-seed0": generates}.items():
        model = LDAEForPreTraining(LDAEConfig(**tiny, **fields))
        model.ldae.tokenizer.fit([torch.rand(64, 3, 16, 16) * 2 - 1], model.config)
        save_hub_folder(model, tmp_path / "runs" / name)
    for name in [f"labelled/{s}/{c}/{i}" for s in ("train", "validation") for c in ("cat", "dog") for i in range(4)]:
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "image.jpg")
    for name in ("model_cards", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# a test below runs README's, and the tests of their rooms the others', with the commands between their examples
OWN_TESTS = {"README.md", "docs/extending.md", "docs/export.md", "docs/search.md"}
SHOWING_PYTHON = [page for page in PAGES if blocks(page, "python") and page not in OWN_TESTS]


def run_python(page: str) -> dict:
    """What the blocks of a page, one after the other in one program, leave under their names."""
    names = {"__name__": "__main__"}
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), names)
    return names


@pytest.mark.parametrize("page", SHOWING_PYTHON)
def test_python_runs_as_it_stands(page, workplace):
    run_python(page)


def test_python_is_seen_to_be_run():
    assert {"docs/dense.md", "docs/fine-tuning.md"} <= set(SHOWING_PYTHON)


@pytest.mark.usefixtures("shipped_model", "few_photos")
def test_the_examples_of_readme_give_what_it_says(workplace, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(workplace / "home"))
    names = run_python("README.md")
    assert names["nearest"][0] == 0
    assert len(set(names["nearest"].tolist())) == 6
    assert "astronaut-validation-0000.png" in capsys.readouterr().out
    assert names["folder"] == Path("runs/mine")
    assert names["features"].column_names == ["name", "label", "pooled"]
    assert json.loads(Path("runs/mine/results/probe-photos.json").read_text()) == names["result"]


def test_the_hours_of_own_images_are_those_of_the_benchmarks():
    rows = re.findall(r"^\| .* \| ([\d,]+) \| (\d+) (minutes|seconds) \|$", text_of("docs/own-images.md"), re.M)
    assert len(rows) == 4
    for rate, time, unit in rows:
        assert re.search(rf"^\| l-DAE, (sdpa|eager).* \| {rate} \|", text_of("benchmarks/README.md"), re.M)
        seconds = 50_000 / int(rate.replace(",", ""))
        assert round(seconds / {"minutes": 60, "seconds": 1}[unit]) == int(time)
    found = re.search(
        r"^\| share of tokens kept \| [^|]* \| \d+, (\d+), (\d+) \|", text_of("benchmarks/README.md"), re.M
    )
    assert f"[{int(found[1]) / int(found[2]):.2f} of the time]" in text_of("docs/own-images.md")


def test_what_fine_tuning_gave_is_in_the_comparison():
    page, table = text_of("docs/fine-tuning.md"), text_of("docs/comparison.md").split("<!-- imagenette64 -->")[1]
    figures = re.search(r"fine-tuning from (\S+) %.*?to (\S+) %.*?ViTMAE's (\S+) %", page, re.S).groups()
    for name, figure in zip(("untrained l-DAE, d = 16", "l-DAE, d = 16", "ViTMAE"), figures, strict=True):
        assert re.search(rf"^\| {name}.* \| {figure} ± [\d.]+ \|$", table, re.M)
