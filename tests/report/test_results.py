"""Results of runs, and of many runs as a study in one file."""

import json
import subprocess
import sys

import pytest

from ldae.report.results import Row, load_study, save_result, save_study


def test_a_result_replaces_another_only_if_told_so(tmp_path):
    path = save_result(tmp_path / "new/results/train.json", {"kind": "train", "loss": 0.5})
    assert json.loads(path.read_text())["loss"] == 0.5
    assert {"commit", "versions", "hardware", "date"} < json.loads(path.read_text()).keys()
    with pytest.raises(FileExistsError, match="holds another run's result"):
        save_result(path, {"kind": "train", "loss": 0.25})
    assert json.loads(path.read_text())["loss"] == 0.5
    save_result(path, {"kind": "train", "loss": 0.25}, overwrite=True)
    assert json.loads(path.read_text())["loss"] == 0.25


def write(folder, name, **result):
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "results" / name).write_text(json.dumps(result))


def test_a_study_is_the_same_as_folder_and_as_file(tmp_path):
    folder = tmp_path / "mine"
    write(folder / "b", "train.json", kind="train", loss=0.1)
    write(folder / "a", "train.json", kind="train", loss=0.2)
    write(folder / "a", "probe-σ.json", kind="probe", text="line\nbreak \u2028 σ")
    write(folder / "tokenizers/a", "train.json", kind="train", loss=1e-300)
    write(folder / "a/checkpoints", "state.json", kind="train")  # in a folder of results, but deeper: a run of its own
    (folder / "b/config.json").write_text("{}")
    rows = load_study(folder)
    assert [(row.study, row.run, row.kind) for row in rows] == [
        ("mine", "a", "probe"),
        ("mine", "a", "train"),
        ("mine", "a/checkpoints", "train"),
        ("mine", "b", "train"),
        ("mine", "tokenizers/a", "train"),
    ]
    assert rows[0].result == {"kind": "probe", "text": "line\nbreak \u2028 σ"}
    path = save_study(tmp_path / "mine.jsonl", reversed(rows[:1] + rows[2:]))
    assert load_study(path) == rows[:1] + rows[2:]
    assert load_study(folder / "b") == [Row("b", "b", "train", {"kind": "train", "loss": 0.1})]


def test_what_is_no_study(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no study '.*nowhere'"):
        load_study(tmp_path / "nowhere")
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"study": "bad", "run": "a", "kind": "train", "result": {}})
    for line in ("{", '{"run": "a"}', "[]", "3"):
        path.write_text(f"{good}\n{line}\n")
        with pytest.raises(ValueError, match=r"bad.jsonl, line 2: not a row of results"):
            load_study(path)
    path.write_bytes(b"\xff\xfe\0")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: not a row of results"):
        load_study(path)


def test_a_broken_result_is_named(tmp_path):
    write(tmp_path / "a", "train.json", kind="train")
    (tmp_path / "a/results/probe.json").write_text('{"kind": "pro')
    with pytest.raises(ValueError, match=r"a/results/probe\.json is damaged"):
        load_study(tmp_path)
    (tmp_path / "a/results/probe.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a/results/probe\.json is no result, for it has no 'kind'"):
        load_study(tmp_path)


def test_importing_the_reports_loads_no_library_that_only_drawing_needs():
    code = "import sys, ldae; before = set(sys.modules)\n"
    code += "import ldae.report.tables, ldae.report.results, ldae.report.figures\n"
    code += "print([name for name in ('matplotlib', 'sklearn', 'diffusers') if name in sys.modules.keys() - before])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_results_say_nothing_of_this_machine_s_folders(tmp_path):
    data, run = tmp_path / "me/My Pictures", tmp_path / "runs/first"
    result = {
        "arguments": {"data": str(data), "output_dir": str(run), "tokenizer": str(tmp_path / "runs/tokenizers/vae"),
                      "init_from": "/somewhere/else/model", "model": "facebook/vit-mae-base", "epochs": 3},
        "bad_images": [f"{data}/a/b.jpg: UnidentifiedImageError: cannot identify image file '{data}/a/b.jpg'",
                       f"{data.as_uri()}/caf%E9.jpg: unreadable"],
    }  # fmt: skip
    path = save_result(run / "results/train.json", result, data=str(data))
    written = json.loads(path.read_text())
    assert written["arguments"] == {
        "data": "My Pictures", "output_dir": "first", "tokenizer": "tokenizers/vae", "init_from": "model",
        "model": "facebook/vit-mae-base", "epochs": 3,
    }  # fmt: skip
    name = "My Pictures/a/b.jpg"
    assert written["bad_images"] == [
        f"{name}: UnidentifiedImageError: cannot identify image file '{name}'",
        "My%20Pictures/caf%E9.jpg: unreadable",
    ]
    assert str(tmp_path) not in path.read_text()
