"""Files that are written whole, and folders that are held."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldae.files import (
    DIGESTS,
    LOCK,
    atomic_write,
    damage,
    digests_of,
    hold_folder,
    read_json,
    replace_files,
    validate_writable,
)

ROOT = Path(__file__).parent.parent


def test_a_file_is_atomic_write_or_stays_as_it_was(tmp_path):
    path = tmp_path / "new/file.txt"
    with atomic_write(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"

    def stopped():
        with atomic_write(path) as partial:
            partial.write_text("half of the sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "first"
    with atomic_write(path) as partial:
        partial.write_text("second")
    assert path.read_text() == "second"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    code = """
import sys
from ldae.files import atomic_write
for i in range(200):
    with atomic_write(sys.argv[1], sealed=True) as partial:
        partial.write_text("whole " * 1000)
"""
    path = tmp_path / "file.txt"
    writers = [subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert path.read_text() == "whole " * 1000
    assert damage(path) is None
    assert {file.name for file in tmp_path.iterdir()} == {"file.txt", ".file.txt.sha256"}


def test_a_folder_is_atomic_write_and_what_a_killed_process_left_is_removed(tmp_path):
    path = tmp_path / "folder"
    with atomic_write(path) as partial:
        pass_on = partial
        partial.mkdir()
        (partial / "a").touch()
    pass_on.mkdir()
    (pass_on / "left").touch()
    path.rename(tmp_path / "other")
    with atomic_write(path) as partial:
        partial.mkdir()
    assert list(path.iterdir()) == []
    assert {file.name for file in tmp_path.iterdir()} == {"folder", "other"}


def test_a_folder_that_is_not_empty_is_never_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    with pytest.raises(OSError, match="not empty"), atomic_write(tmp_path / "folder") as partial:
        partial.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]


def test_everything_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """By the system's own names of what is flushed and renamed, in their order."""
    calls, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))[1]
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), rename(*paths))[1])
    with atomic_write(tmp_path / "folder", sealed=True) as partial:
        partial.mkdir()
        (partial / "a").touch()
    at = calls.index("rename")
    assert {"a", DIGESTS, partial.name} <= set(calls[:at])
    assert calls[at + 1 :] == [tmp_path.name]


@pytest.mark.parametrize("is_folder", [True, False])
def test_sealed_files_are_those_that_sha256sum_finds(tmp_path, is_folder):
    path = tmp_path / "sealed"
    with atomic_write(path, sealed=True) as partial:
        if is_folder:
            partial.mkdir()
        ((partial / "a b") if is_folder else partial).write_bytes(b"content")
    assert damage(path) is None
    digests = digests_of(path)
    subprocess.run(["sha256sum", "--check", "--strict", digests.name], cwd=digests.parent, check=True)
    ((path / "a b") if is_folder else path).write_bytes(b"Content")
    assert damage(path) == f"{'a b' if is_folder else 'sealed'} is not what was written"


def test_replaced_files_leave_others_alone_and_half_of_them_is_seen(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("kept")

    def write(content: str):
        with replace_files(tmp_path) as partial:
            (partial / "a").write_text(content)
            (partial / "b").write_text(content)

    write("first")
    assert damage(tmp_path) is None
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != DIGESTS} == {
        "mine": "kept", "a": "first", "b": "first"
    }  # fmt: skip
    real, renamed = Path.replace, []

    def killed(self, target):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(target)
        return real(self, target)

    with monkeypatch.context() as patches:
        patches.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write("second")
    assert damage(tmp_path) == "a is not what was written"
    write("third")
    assert damage(tmp_path) is None


def test_broken_json_is_named(tmp_path):
    for content in ("{", "[]", ""):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=r"a\.json is damaged: .*; remove it"):
            read_json(tmp_path / "a.json")


def test_a_held_folder_is_refused_by_the_name_of_its_holder(tmp_path):
    with hold_folder(tmp_path):
        with (
            pytest.raises(FileExistsError, match=rf"{tmp_path}' is in use by process {os.getpid()} on"),
            hold_folder(tmp_path),
        ):
            pass
        assert (tmp_path / LOCK).exists()  # who was refused has released nothing
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), hold_folder(tmp_path):
        raise KeyboardInterrupt
    with hold_folder(tmp_path):
        pass


def test_a_process_that_was_killed_holds_no_folder_even_if_its_children_live_on(tmp_path):
    script = (
        "import os, sys, time\nfrom ldae.files import hold_folder\nwith hold_folder(sys.argv[1]):\n"
        "    if os.fork() == 0:\n        time.sleep(60)\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(FileExistsError, match=f"in use by process {holder.pid} on"), hold_folder(tmp_path):
            pass
        holder.kill()
        holder.wait()
        assert (tmp_path / LOCK).exists()
        with hold_folder(tmp_path):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_what_can_be_written_to_is_left_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    for good in ("there", "new", "there/new/and/deep"):
        validate_writable(tmp_path / good)
    with pytest.raises(
        ValueError, match=r"^--output: the folder '.*file' cannot be written to \(File exists\); choose"
    ):
        validate_writable(tmp_path / "file", "--output")
    with pytest.raises(ValueError, match=r"^--output_dir: .* cannot be written to \(File name too long\); choose"):
        validate_writable(tmp_path / "parent" / ("x" * 300))
    monkeypatch.setenv("RANK", "1")  # which leaves it to the first process
    validate_writable(tmp_path / "file")
    assert {path.name for path in tmp_path.rglob("*")} == {"there", "file"}
