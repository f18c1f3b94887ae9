"""What commands run on where their user has chosen nothing, and that a choice is obeyed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ldae import hardware, launch

ROOT = Path(__file__).parents[1]
FREE = {name: value for name, value in os.environ.items() if name not in launch.VARIABLES.values()}
SHOW = "from ldae import launch; print(sorted(launch.chosen_by_user()))"

# counts the pages that the system has to provide for a tensor of 64 MiB that is made and freed ten times
PAGES = """
import resource, sys, torch
from ldae.hardware import keep_freed_memory
if sys.argv[1]:
    keep_freed_memory()
torch.ones(2**24)  # the heap grows to what it keeps
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Nothing is chosen, and the threads are afterwards as before."""
    AcceleratorState._reset_state(True)
    for variable in launch.VARIABLES.values():
        monkeypatch.delenv(variable)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "environment", "configuration", "chosen"),
    [
        ("", {}, None, []),
        ("--mixed_precision no", {"OMP_NUM_THREADS": "1"}, None, ["mixed_precision", "num_cpu_threads_per_process"]),
        (
            "--num_cpu_threads_per_process=1",
            {},
            "mixed_precision: 'no'\nnum_processes: 1\n",
            ["mixed_precision", "num_cpu_threads_per_process"],
        ),
    ],
)
def test_choices_of_accelerates_launcher(tmp_path, options, environment, configuration, chosen):
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    if configuration is not None:
        (tmp_path / "accelerate.yaml").write_text(
            f"compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\n{configuration}"
        )
        options += f" --config_file {tmp_path / 'accelerate.yaml'}"
    program = [str(Path(sys.executable).with_name("accelerate")), "launch", *options.split(), str(script)]
    environment = {**FREE, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), **environment}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(chosen)


def test_without_accelerates_launcher_the_environment_counts(monkeypatch):
    assert launch.chosen_by_user() == set()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch.chosen_by_user() == {"num_cpu_threads_per_process"}


@pytest.mark.parametrize(
    ("command", "launched"),
    [
        ("/venv/bin/python /venv/bin/accelerate launch train_ldae.py", True),
        ("/venv/bin/python /venv/bin/accelerate-launch --cpu train_ldae.py", True),
        ("python -m accelerate.commands.launch train_ldae.py", True),
        ("bash accelerate_job.sh", False),
        ("/accelerate/bin/python -m pytest tests/test_accelerate.py", False),
    ],
)
def test_only_accelerates_own_launcher_is_taken_for_it(monkeypatch, command, launched):
    parent = SimpleNamespace(cmdline=command.split, environ=dict)
    monkeypatch.setattr(launch.psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    environment, options = launch._launcher()
    assert (environment is not None) == launched
    assert getattr(options, "training_script", None) == ("train_ldae.py" if launched else None)


@pytest.mark.parametrize(("processes", "threads"), [("1", 6), ("4", 1), ("2", 3)])
def test_all_cores_are_shared_between_the_processes(monkeypatch, processes, threads):
    monkeypatch.setattr(launch.joblib, "cpu_count", lambda only_physical_cores: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    launch.start("no", cpu=True)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("given", "faster", "variable", "expected"),
    [
        (None, True, None, "bf16"),
        (None, False, None, "no"),
        ("no", True, None, "no"),
        (None, True, "no", "no"),
        (None, False, "bf16", "bf16"),
        ("bf16", False, None, "bf16"),
    ],
)
def test_precision(monkeypatch, capsys, given, faster, variable, expected):
    monkeypatch.setattr(launch, "bf16_is_faster", lambda device: faster)
    if variable is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", variable)
    assert launch.start(given, cpu=True).mixed_precision == expected
    said = capsys.readouterr().out
    assert said.startswith("Runs on the CPU with ")
    assert ("in bf16." in said) == (expected == "bf16")
    assert ("--mixed_precision no" in said) == (expected == "bf16" and not faster)


def test_bf16_is_chosen_where_its_products_take_half_the_time(monkeypatch):
    cpu = torch.device("cpu")
    for seconds, expected in ((0.4, True), (0.6, False)):
        hardware.bf16_is_faster.cache_clear()
        monkeypatch.setattr(hardware, "_seconds_of_product", {torch.float32: 1.0, torch.bfloat16: seconds}.get)
        assert hardware.bf16_is_faster(cpu) is expected
    hardware.bf16_is_faster.cache_clear()


START = "from ldae import launch; from ldae.mistakes import run_command; run_command(lambda: launch.start('no'))"


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="accelerate gives each process a GPU, so that nothing is to be refused"
)
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"],
    ],
    ids=["torchrun", "accelerate-cpu"],
)
def test_processes_that_do_not_know_each_other_are_refused(tmp_path, launcher):
    """One line names the launch that works: the one by which the tests of training start two processes."""
    (tmp_path / "start.py").write_text(START)
    environment = {**FREE, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, *launcher, str(tmp_path / "start.py")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode
    (said,) = [line for line in done.stderr.splitlines() if "error: the launcher was asked for 2 processes" in line]
    assert "`ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 start.py ...`" in said


@pytest.mark.parametrize(("variable", "steps", "refused"), [("4", 1, True), ("2", 2, False), ("4", None, False)])
def test_accumulation_of_the_environment(monkeypatch, variable, steps, refused):
    """accelerate takes the environment's number, whatever the option says."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", variable)
    kwargs = {} if steps is None else {"gradient_accumulation_steps": steps}
    if refused:
        with pytest.raises(ValueError, match=r"--gradient_accumulation_steps 1 contradicts .*=4 .*unset"):
            launch.start("no", cpu=True, **kwargs)
    else:
        launch.start("no", cpu=True, **kwargs)


@pytest.mark.parametrize(
    ("device", "precision", "expected"), [("cpu", "bf16", "eager"), ("cpu", "no", None), ("cuda", "bf16", None)]
)
def test_attention_is_written_out_in_bf16_on_a_cpu(device, precision, expected):
    accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=precision)
    assert launch.attention(accelerator) == expected


# PyTorch's wheels for Linux need glibc, so each Linux has mallopt here.
@pytest.mark.skipif(
    sys.platform != "linux", reason="keep_freed_memory does nothing elsewhere: it calls glibc's mallopt"
)
def test_memory_that_is_kept_is_not_asked_of_the_system_again():
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", PAGES, keep], check=True, capture_output=True, text=True).stdout)
        for keep in ("keep", "")
    )
    assert kept < returned / 5  # the heap may grow a second time


def test_a_run_on_the_cpu_names_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a GPU")
    AcceleratorState._reset_state(True)
    assert hardware.hardware()["gpus"] == ["a GPU"]
    Accelerator(cpu=True)
    assert hardware.hardware()["gpus"] == []
