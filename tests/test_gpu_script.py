"""benchmarks/gpu.sh at tiny sizes on the CPU, so that a visit to a GPU does not find out what a test could have told."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
STAGES = ("check", "step", "train", "mae", "probe", "pack")


def run(tmp_path: Path, *stages: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DRY": "1", "RUNS": str(tmp_path / "runs")}
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path / "out"), *stages]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_every_stage_leaves_its_files_whatever_fails_before_it(tmp_path):
    done = run(tmp_path, "pack", "nonsense", *STAGES)
    assert done.returncode == 2  # there is nothing to pack before the run, and no such stage
    summary = [line.split() for line in done.stdout.splitlines()[-2 - len(STAGES) :]]
    assert [line[0] for line in summary] == ["pack", "nonsense", *STAGES]
    assert [line[-1] for line in summary] == ["1", "2", *["done"] * len(STAGES)], done.stdout[-5000:]
    assert "there is no stage 'nonsense'" in done.stderr
    out = tmp_path / "out"
    with tarfile.open(out / "results.tar.gz") as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
        step = json.load(archive.extractfile("./report/step-gpu-tiny.json"))
    assert {"report/summary.txt", *(f"report/{stage}.log" for stage in STAGES)} <= names
    for name in ("ldae", "mae"):
        assert {f"{name}/losses.jsonl", f"{name}/results/train.json", f"{name}/results/probe-photos.json"} <= names
    assert not any("checkpoint-" in name or name.endswith(".safetensors") for name in names)
    assert list(step["contenders"])[:3] == ["l-DAE, sdpa", "ViTMAE, sdpa", "DiT"]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert {path.parent for path in files} == {out}
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {str(value.dtype) for path in weights for value in load_file(path).values()} == {
        "torch.bfloat16",
        "torch.float32",
    }
