"""A user's mistake is one line and status 2; a fault of the program or of a library shows its traceback."""

import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm.auto import tqdm

import train_ldae
from ldae.files import validate_writable
from ldae.mistakes import run_command

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def run(*command: str | Path, cwd: Path) -> tuple[int, list[str]]:
    """The status of a Python program, and the lines of its stderr."""
    given = [sys.executable, *map(str, command)]
    done = subprocess.run(given, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr.splitlines()


def ended_by_mistake(monkeypatch, capfd, command: str) -> str:
    """The one line that a command ends with, as Python starts it, but in this process, which has imported what it needs."""
    program, *arguments = command.removeprefix("-m ").split()
    start = partial(runpy.run_module, alter_sys=True) if command.startswith("-m ") else runpy.run_path
    name = program if command.startswith("-m ") else str(ROOT / program)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        start(name, run_name="__main__")
    assert ended.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if ": error: " in line] == lines[-1:]
    return lines[-1]


def test_a_mistake_does_not_stand_in_the_line_of_a_bar(capsys):
    with tqdm(total=3, file=sys.stderr, disable=False) as bar:
        bar.update()
        with pytest.raises(SystemExit):
            run_command(lambda: validate_writable(Path(__file__) / "folder", "--output_dir"))
        shown = capsys.readouterr().err
    assert "0/3" in shown
    assert re.search(r"\r *\r[^\r]*: error: ", shown)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("train_ldae.py --data /nonexistent --report_to none", "train_ldae.py: error: .*data.*'/nonexistent'"),
        ("probe_ldae.py --model /nonexistent", "probe_ldae.py: error: .*/nonexistent"),
        (
            "-m ldae.features --model /nonexistent --data photos --output_dir x",
            "python -m ldae.features: error: .*/non",
        ),
        ("-m ldae.generation --model /nonexistent --output_dir x", "python -m ldae.generation: error: .*/nonexistent"),
        ("-m ldae.hub.cards --model /nonexistent", "python -m ldae.hub.cards: error: .*/nonexistent"),
        ("-m benchmarks.loader --output here.json", "python -m benchmarks.loader: error: here.json is there; pass "),
        (
            "-m experiments.baselines.vit_mae --data /nonexistent",
            "python -m experiments.baselines.vit_mae: error: .*'/nonexist",
        ),
    ],
)
def test_a_mistake_ends_every_command_with_one_line(tmp_path, monkeypatch, capfd, command, named):
    (tmp_path / "here.json").touch()
    monkeypatch.chdir(tmp_path)
    assert re.search(named, ended_by_mistake(monkeypatch, capfd, command))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train_ldae.py --data {there} --output_dir", "--output_dir"),
        ("probe_ldae.py --model /nonexistent --data photos --output_dir", "--output_dir"),
        ("-m ldae.features --model /nonexistent --data photos --output_dir", "--output_dir"),
        ("-m ldae.generation --model /nonexistent --output_dir", "--output_dir"),
        ("-m ldae.export --model /nonexistent --output_dir", "--output_dir"),
        ("-m ldae.hub.cards --model /nonexistent --output", "--output"),
        ("-m benchmarks.loader --output", "--output"),
        ("-m experiments.ablation.run photos --output_dir", "--output_dir"),
        ("-m experiments.denoised --model /nonexistent", "output"),
        ("-m experiments.resized --size 8 /nonexistent", "target"),
        ("-m experiments.search --model /nonexistent --output", "--output"),
        ("-m experiments.segmentation MODEL --results", "--results"),
    ],
)
def test_what_cannot_be_written_is_told_before_any_work(tmp_path, monkeypatch, capfd, command, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()  # under which root itself can make no folder
    line = ended_by_mistake(monkeypatch, capfd, f"{command.format(there=ROOT / 'docs')} file/x/y")
    assert re.search(rf"error: {option}: the folder 'file/x(/y)?' cannot be written to \(.+\); choose another$", line)


def test_a_mistake_is_the_last_line_of_a_process(tmp_path):
    status, lines = run(ROOT / "train_ldae.py", "--data", "/nonexistent", "--report_to", "none", cwd=tmp_path)
    assert status == 2
    assert not any("Traceback" in line for line in lines)
    assert [line for line in lines if ": error: " in line] == lines[-1:]


def test_debug_lets_a_mistake_go_on(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_ldae.py", "--debug", "--data", "/nonexistent"])
    with pytest.raises(FileNotFoundError, match="/nonexistent"):
        run_command(train_ldae.main)
    assert ": error: " not in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_say_it_once(tmp_path):
    """What the command line says, before they know each other, and what all of them find afterwards."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train_ldae.py")
    for given in (["--foo"], ["--data", "/nonexistent", "--output_dir", "run"]):
        status, lines = run(*launch, *given, cwd=tmp_path)
        assert status == 1  # torchrun's
        assert len([line for line in lines if "train_ldae.py: error: " in line]) == 1


def test_python_gets_the_exception():
    with pytest.raises(FileNotFoundError, match="/nonexistent"):
        train_ldae.main(["--data", "/nonexistent"])


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("x" * 1000),  # names no file
        lambda path: Image.effect_noise((64, 64), 50).save(path, "PNG"),
        lambda path: pq.write_table(pa.table({"a": range(1000)}), path),
        lambda path: save_file({"a": torch.zeros(1000)}, path),
    ],
    ids=["python", "pillow", "pyarrow", "safetensors"],
)
def test_a_full_disk_is_no_fault_of_the_program(tmp_path, monkeypatch, capsys, write):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # `python -m pytest` names the program by it
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
        with pytest.raises(SystemExit, match="2"):
            run_command(partial(write, tmp_path / "file"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.fullmatch(r"x.py: error: .*File too large.*: make room on the disk, or .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise ValueError('x')", True),
        ("raise FileExistsError('x')", True),
        ("open('/')", True),  # of the operating system, about a file
        ("raise KeyError('x')", False),
        ("raise RuntimeError('x')", False),
        ("int('x')", False),  # raised in this frame, but not by a check
        ("open('/nonexistent')", False),
        ("import json; json.loads('{')", False),
    ],
)
def test_what_is_a_mistake(monkeypatch, capsys, code, expected):
    """Of code as if in a file of the project; of no other file."""
    monkeypatch.setattr(sys, "argv", ["x.py"])
    for file, is_ours in ((ROOT / "ldae/x.py", True), (ROOT / "modeling_ldae.py", True), (ROOT / "tests/x.py", False)):
        compiled = compile(code, str(file), "exec")
        if expected and (is_ours or code.startswith("open")):
            with pytest.raises(SystemExit, match="2"):
                run_command(partial(exec, compiled))
            err = capsys.readouterr().err
            assert err.count("\n") == 1
            assert ": error: " in err
        else:
            with pytest.raises((ValueError, OSError, KeyError, RuntimeError)):
                run_command(partial(exec, compiled))
            assert not capsys.readouterr().err


def test_ctrl_c_ends_a_command_with_one_line(capfd):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command(stopped)
    assert ended.value.code == 130
    assert capfd.readouterr().err.strip().endswith(": stopped; what was written is whole")
