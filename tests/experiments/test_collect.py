"""The results of folders of runs become a study."""

import pytest

from experiments.collect import collect, main
from ldae.report.results import load_study, save_result


def made(folder, run, loss):
    save_result(folder / run / "results/train.json", {"kind": "train", "loss": loss}, overwrite=True)


def losses(study):
    return [(row.run, row.result["loss"]) for row in load_study(study)]


def test_collected_runs_replace_their_rows_alone(tmp_path, capsys):
    runs, study = tmp_path / "runs", tmp_path / "results/mine.jsonl"
    made(runs, "a", 1.0)
    made(runs, "tokenizers/b", 2.0)
    main([str(runs), str(study)])
    assert "2 results of 2 runs" in capsys.readouterr().out
    assert load_study(study)[0].study == "mine"
    made(runs, "a", 3.0)
    made(runs, "tokenizers/b", 4.0)
    made(tmp_path / "others", "c", 5.0)
    collect(runs, study, ["a"])
    collect(tmp_path / "others", study)
    assert losses(study) == [("a", 3.0), ("c", 5.0), ("tokenizers/b", 2.0)]


def test_what_cannot_be_collected(tmp_path):
    study = tmp_path / "mine.jsonl"
    with pytest.raises(NotADirectoryError, match=r"folder must be a folder of runs, got '.*nowhere'"):
        collect(tmp_path / "nowhere", study)
    with pytest.raises(FileNotFoundError, match="holds no results of any run"):
        collect(tmp_path, study)
    made(tmp_path, "a", 1.0)
    with pytest.raises(FileNotFoundError, match="holds no results of b, c"):
        collect(tmp_path, study, ["a", "c", "b"])
    with pytest.raises(ValueError, match=r"study must be a .jsonl file, got '.*mine'"):
        collect(tmp_path, tmp_path / "mine")
    assert not study.exists()
