"""The report says what the results of the runs hold, and no more."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ablation_stand_in import made, made_tokenizer, make_ablation

from experiments.ablation import figures, report, run, rungs, runs, verdicts
from experiments.ablation.tables import tables
from experiments.collect import collect
from ldae.probes import pack
from ldae.report.results import save_result

ROOT = Path(__file__).parents[2]
ROWS = 20  # validation images of a stand-in


def test_verdicts(tmp_path):
    """clean-latent falls in the paper, no-input-scaling rises, image-input changes nothing, image-output too little."""
    made(tmp_path, "patch-pca", 50.0, 52.0)
    made(tmp_path, "clean-latent", 44.0, 46.0, 45.0)
    made(tmp_path, "no-input-scaling", 40.0)
    made(tmp_path, "image-input", 40.5)
    made(tmp_path, "image-output", 41.0)
    made(tmp_path, "l-dae", 41.5)
    figures = runs.measure(tmp_path)
    between = (2 * 1**2 + 2 * 1**2) / 3  # of the five runs with other seeds beside them, three degrees of freedom
    assert [figures[name].error for name in ("patch-pca", "clean-latent", "no-input-scaling")] == pytest.approx(
        [(0.25 + between / n) ** 0.5 for n in (2, 3, 1)]
    )
    assert [figures["clean-latent"].accuracy, figures["clean-latent"].seeds] == [45.0, 3]
    found = {name: verdicts.verdict(rungs.RUNGS[name], figures) for name in figures}
    assert found == {
        "patch-pca": "not run", "clean-latent": "agrees", "no-input-scaling": "contradicts", "image-input": "agrees",
        "image-output": "agrees", "l-dae": "undecided",
    }  # fmt: skip
    texts = tables(tmp_path)
    assert (
        "| `clean-latent` | `patch-pca` | predict the clean latent, λ = γ² | -2.7 | -6.0 ± 1.3 | agrees |"
        in texts["claims"]
    )
    assert "34 claims: 3 agrees, 1 contradicts, 1 undecided, 29 not run." in texts["claims"]
    assert "9 runs of 6 rungs with 1 to 3 seeds each; 3.0 epochs of 1,234 images in 1 minutes" in texts["setting"]
    assert "| patch-wise PCA | 56.0 / – | 63.4 / – | 65.1 / 51.0 ± 1.0 |" in texts["table 2"]
    assert "Their best baselines reach 20.0 %." in texts["table 2"]
    assert "convolutional VAE" not in texts["table 2"]  # no rung of it was run
    assert not {"table 1", "branches", "timesteps", "blocks"} & texts.keys()
    assert "| latents or images as input and as output are as good | 2 agrees | agrees |" in texts["facts"]
    assert texts["facts"].startswith("18 facts: 2 agrees, 1 contradicts, 1 undecided, 14 not run.\n")
    assert "| not run |" not in texts["facts"] + texts["claims"]


def test_a_change_that_is_not_there_is_told_from_one_that_cannot_be_seen(tmp_path):
    """one-level loses 3.0 points in the paper, predict-noise nothing, and random-crop gains half a point."""
    made(tmp_path, "l-dae", 50.0, 50.2)
    made(tmp_path, "one-level", 50.1, 50.3)
    made(tmp_path, "random-crop", 50.3, 50.4)
    made(tmp_path, "predict-noise", 60.0, 60.2)
    found = runs.measure(tmp_path)
    assert [verdicts.verdict(rungs.RUNGS[name], found) for name in ("one-level", "random-crop", "predict-noise")] == [
        "absent", "undecided", "contradicts"
    ]  # fmt: skip


def test_what_learned_nothing_is_not_judged(tmp_path):
    made(tmp_path, "l-dae", 40.0, 40.5, thumbnail=40.0)
    made(tmp_path, "one-level", 40.2, 40.4, thumbnail=None)  # it is that of the same images
    made(tmp_path, "classical-dae", 30.0, 30.5, thumbnail=40.0)
    made(tmp_path / "b", "l-dae", 50.0, 50.5, thumbnail=40.0)
    made(tmp_path / "b", "one-level", 40.2, 40.4, thumbnail=40.0)
    figures, others = runs.measure(tmp_path), runs.measure(tmp_path / "b")
    assert verdicts.verdict(rungs.RUNGS["one-level"], figures) == "not judgeable"
    assert verdicts.verdict(rungs.RUNGS["classical-dae"], figures) == "not judgeable"
    assert verdicts.verdict(rungs.RUNGS["one-level"], others) == "agrees"  # one of the two has learned something


def test_claims_that_tell_one_fact_are_counted_once():
    assert verdicts.of_fact(["agrees", "undecided", "agrees"]) == "agrees"
    assert verdicts.of_fact(["agrees", "absent"]) == "mixed"
    assert verdicts.of_fact(["not run", "undecided"]) == "undecided"
    claims = [rung for rung in rungs.RUNGS.values() if rung.claim is not None]
    assert len(claims) == 34
    assert len({rung.fact or rung.what for rung in claims}) == 18


def test_no_verdict_where_more_or_less_than_the_change_differs(tmp_path):
    """Where LPIPS cannot be had, classes can be compared without it, but not what LPIPS does."""
    for name, accuracy in (("dit", 40.0), ("no-classes", 45.0), ("no-perceptual", 30.0)):
        made(tmp_path, name, accuracy, tokenizer_perceptual_weight=0.0)
    made(tmp_path, "patch-pca", 50.0, 50.5)
    made(tmp_path, "clean-latent", 40.0, weight_decay=0.1)
    made(tmp_path, "no-input-scaling", 40.0, config={"hidden_size": 96})
    figures = runs.measure(tmp_path)
    assert figures["dit"].differs == {"tokenizer_perceptual_weight": 0.0}
    found = {name: verdicts.verdict(rungs.RUNGS[name], figures) for name in figures}
    assert found == {
        "dit": "not run", "no-classes": "agrees", "no-perceptual": "not comparable", "patch-pca": "not run",
        "clean-latent": "not comparable", "no-input-scaling": "not comparable",
    }  # fmt: skip
    texts = tables(tmp_path)
    assert "`dit` was run with `--tokenizer_perceptual_weight 0.0`." in texts["table 1"]
    assert "`no-perceptual` and `no-classes` are the same run here." in texts["claims"]
    assert "`clean-latent` and `patch-pca` also differ in weight_decay." in texts["claims"]
    assert "`no-input-scaling` and `clean-latent` also differ in hidden_size, weight_decay." in texts["claims"]


def test_tokenizers_of_one_kind_must_be_trained_alike(tmp_path):
    """Of another kind, each is trained as it needs."""
    for name, seen in (("linear-gamma2", 2), ("patch-vae", 20), ("patch-vae-d8", 10), ("patch-vae-d32", 20)):
        made(tmp_path, name, 50.0, 50.5)
        made_tokenizer(tmp_path, name, seen, base_learning_rate=0.1)
    figures = runs.measure(tmp_path)
    found = {
        name: verdicts.verdict(rungs.RUNGS[name], figures) for name in ("patch-vae", "patch-vae-d8", "patch-vae-d32")
    }
    assert found == {"patch-vae": "undecided", "patch-vae-d8": "not comparable", "patch-vae-d32": "agrees"}
    reason = "`patch-vae-d8` and `patch-vae` also differ in the tokenizer's training."
    assert reason in tables(tmp_path)["claims"]


@pytest.mark.parametrize(
    ("arguments", "comparable"),
    [
        ({"tokenizer_lpips_net": "alex"}, True),  # of a loss that the second has no more
        ({"tokenizer_discriminator_width": 16}, False),  # of one that both have
        ({"ema_decay": 0.5}, False),
    ],
)
def test_what_a_tokenizers_losses_are_counts_where_they_have_a_weight(tmp_path, arguments, comparable):
    base = {"tokenizer_lpips_net": "vgg", "tokenizer_discriminator_width": 64, "tokenizer_adversarial_weight": 0.5}
    for name, perceptual, given in (("no-classes", 1.0, arguments), ("no-perceptual", 0.0, {})):
        made(tmp_path, name, 50.0, 50.5)
        made_tokenizer(tmp_path, name, 2, **{**base, "tokenizer_perceptual_weight": perceptual, **given})
    found = verdicts.verdict(rungs.RUNGS["no-perceptual"], runs.measure(tmp_path))
    assert found == ("absent" if comparable else "not comparable")


def test_one_seed_is_no_verdict(tmp_path):
    """The deviation between seeds is that of all rungs, in other ablations too."""
    made(tmp_path / "first", "l-dae", 50.0)
    made(tmp_path / "first", "classical-dae", 30.0)
    made(tmp_path / "other", "patch-pca", 50.0, 51.0)
    row = "| `classical-dae` | `l-dae` | noise on pixels: the classical DAE | -40.9 | -20.0 ± "
    assert f"{row}0.7 | one seed |" in tables(tmp_path / "first")["claims"]
    assert f"{row}1.2 | agrees |" in tables(tmp_path / "first", [tmp_path / "other"])["claims"]


def test_a_reports_drawings_have_the_errors_of_its_tables(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "rungs", lambda steps, path: drawn.append(steps) or path)
    made(tmp_path / "first", "l-dae", 50.0)
    made(tmp_path / "other", "patch-pca", 50.0, 51.0)
    report.write(tmp_path / "first", tmp_path / "first.md", [tmp_path / "other"])
    (((_, _, (accuracy, error), _),),) = drawn
    assert (accuracy, error) == (50.0, pytest.approx(0.75**0.5))


def test_the_variance_that_tokenizers_hold_stands_below_table_2(tmp_path):
    made(tmp_path, "patch-pca", 50.0)
    path = tmp_path / "patch-pca-seed0/results/train.json"
    save_result(path, {**json.loads(path.read_text()), "variance_held": 0.91234}, overwrite=True)
    assert tables(tmp_path)["table 2"].endswith("| patch-wise PCA | – | – | 91.2 | – | – |")


def test_a_claim_that_is_not_run_is_judged_in_another_ablation(tmp_path):
    """With that ablation's own figures: there l-dae is 40, here 50."""
    first, crops = tmp_path / "first", tmp_path / "crops"
    for folder, accuracy in ((first, 50.0), (crops, 40.0)):
        made(folder, "l-dae", accuracy, accuracy)
        made(folder, "classical-dae", accuracy - 10)
    made(crops, "random-crop", 45.0, crop="other")
    alone, both = tables(first), tables(first, [crops])
    row = "| `random-crop` | `l-dae` | random crops | +0.5 | "
    assert row not in alone["claims"]
    assert alone["claims"].startswith("34 claims: 1 agrees, 33 not run.\n")
    assert row + "+5.0 ± 0.7 | agrees |" in both["claims"]
    reason = (
        "`random-crop` is judged in another ablation, {}: `random-crop` reaches 45.0 ± 0.5, `l-dae` reaches 40.0 ± 0.5."
    )
    reason = reason.format(crops) + "\n\n`random-crop` was run with `--crop other`."
    assert both["claims"].endswith(reason)
    assert both["branches"] == f"{alone['branches']}\n\n{reason}"
    assert [both[name] for name in ("setting", "table 3")] == [alone[name] for name in ("setting", "table 3")]
    report.main([str(first), "--write", str(tmp_path / "first.md"), "--also", str(crops)])
    assert reason in (tmp_path / "first.md").read_text()
    (tmp_path / "empty").mkdir()
    for name, text in (("empty", "no rung in '.*empty'"), ("nowhere", "there is no study '.*nowhere'")):
        with pytest.raises(FileNotFoundError, match=text):
            tables(first, [tmp_path / name])


def test_only_the_ablations_own_runs_and_probes_count(tmp_path):
    made(tmp_path, "l-dae", 50.0)
    results = tmp_path / "l-dae-seed0/results"
    other = json.loads((results / "probe-x.json").read_text())
    other["protocols"]["linear-fast"]["accuracy"] = 90.0
    save_result(results / "probe-photos.json", {**other, "data": {"name": "photos"}})
    shutil.copytree(tmp_path / "l-dae-seed0", tmp_path / "old/l-dae-seed0")
    shutil.copytree(tmp_path / "l-dae-seed0", tmp_path / "l-dae-seed0-old")
    made(tmp_path, "patch-pca", 50.0)
    (tmp_path / "patch-pca-seed0/results/probe-x.json").unlink()  # trained, and not probed yet
    made(tmp_path, "one-level", 50.0)
    path = tmp_path / "one-level-seed0/results/probe-x.json"
    probe = json.loads(path.read_text())
    probe["protocols"] = {"knn": probe["protocols"]["linear-fast"]}  # by another protocol
    save_result(path, probe, overwrite=True)
    (found,) = runs.measure(tmp_path).values()
    assert (found.accuracy, found.seeds) == (50.0, 1)


def test_distances_of_generated_images_stand_in_table_1(tmp_path):
    made(tmp_path, "linear-gamma2", 50.0, 51.0)
    for seed, value in enumerate((10.0, 12.0)):
        result = {"kind": "generation", "metric": "Fréchet distance on features of x", "value": value, "num_fake": 2000}
        result |= {"num_real": 1234, "sampler": "ddim", "num_inference_steps": 50, "guidance_scale": 1.0}
        save_result(tmp_path / f"linear-gamma2-seed{seed}/results/generation.json", {**result, "data_fingerprint": "f"})
    made(tmp_path, "no-adversarial", 50.0, 51.0)
    guided = {**result, "guidance_scale": 4.0, "data_fingerprint": "f"}
    save_result(tmp_path / "no-adversarial-seed0/results/generation.json", guided)
    other = {**result, "value": 99.0, "data_fingerprint": "of other images"}
    save_result(tmp_path / "no-adversarial-seed1/results/generation.json", other)
    table = tables(tmp_path)["table 1"]
    assert "| 93.2 | – | 11.0 ± 1.0 |" in table  # the seeds' variance is 2, over two of them
    assert "| 75.6 | 12.0 | – |" in table  # of one seed
    assert "99.0" not in table
    note = "Fréchet distance on features of x, 2,000 generated and 1,234 real images, ddim, 50 steps"
    assert f"Distance 1: {note}, guidance 4." in table
    assert f"Distance 2: {note}." in table


def test_figures_by_timestep_stand_beside_the_papers(tmp_path):
    made(tmp_path, "l-dae", 50.0)
    rows = [{"t": t, "noisy": noisy, "protocols": {"linear-fast": {"accuracy": 40.0 + t / 10 - noisy, "standard_error": 0.8}}}
            for t in (0, 10, 20, 40, 80) for noisy in (False, True)]  # fmt: skip
    depth = [{"protocols": {"linear-fast": {"accuracy": 30.0 + i, "standard_error": 0.8}}} for i in range(3)]
    sweep = {"kind": "sweep", "timesteps": rows, "depth": depth, "data": {"name": "x"}}
    made(tmp_path, "classical-dae", 30.0)
    for rung in ("classical-dae", "patch-pca"):  # neither is the last rung
        save_result(tmp_path / f"{rung}-seed0/results/sweep-x.json", {**sweep, "timesteps": [], "depth": depth[:1]})
    assert not {"timesteps", "blocks"} & tables(tmp_path).keys()
    save_result(tmp_path / "l-dae-seed0/results/sweep-x.json", sweep)
    save_result(tmp_path / "l-dae-seed0/results/sweep-y.json", {**sweep, "timesteps": [], "data": {"name": "y"}})
    table = tables(tmp_path)["timesteps"].splitlines()
    assert table[2].startswith("| clean | 64.1 / 40.0 ± 0.8 | 64.5 / 41.0 ± 0.8 |")
    assert table[3].endswith("| 64.5 / 47.0 ± 0.8 |")
    assert tables(tmp_path)["blocks"].endswith("| linear-fast | 30.0 ± 0.8 | 31.0 ± 0.8 | 32.0 ± 0.8 |")


def test_a_report_keeps_the_words_around_it(tmp_path):
    made(tmp_path, "l-dae", 50.0)
    path = tmp_path / "docs" / "mine.md"
    path.parent.mkdir()
    path.write_text("# Mine\n<!-- setting -->\nold\n<!-- setting -->\nwords\n")
    assert report.write(tmp_path, path)[1] == tmp_path / "docs/mine/schedules.png"
    text = path.read_text()
    assert text.startswith("# Mine\n<!-- setting -->\n1 runs of 1 rungs")
    assert "<!-- setting -->\nwords\n" in text
    assert "old" not in text
    assert "\n<!-- claims -->\n34 claims" in text
    report.write(tmp_path, path)
    assert path.read_text() == text
    with pytest.raises(ValueError, match=r"Markdown file.*got '.*mine'"):
        report.write(tmp_path, path.with_suffix(""))
    path.write_text("<!-- claims -->\n")
    with pytest.raises(ValueError, match="twice, got it 1 times"):
        report.write(tmp_path, path)


def test_nothing_done_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rung in"):
        tables(tmp_path)


def with_predictions(folder, name, right, images=ROWS):
    """Puts predictions into a run's probe: the class 1 for the images that it has right, all of which are of class 1."""
    path = folder / name / "results/probe-x.json"
    result = json.loads(path.read_text())
    result["data"] |= {"labels": pack(np.ones(images, dtype=int))}
    predictions = np.isin(np.arange(images), right).astype(int)
    result["protocols"]["linear-fast"] |= {
        "accuracy": 100 * predictions.mean(), "standard_error": 5.0, "predictions": pack(predictions)
    }  # fmt: skip
    save_result(path, result, overwrite=True)


def test_a_change_has_the_error_of_paired_predictions(tmp_path):
    """Of 20 images two seeds of l-dae have 10 and 12 right, one of classical-dae 5, one of one-level 8."""
    made(tmp_path, "l-dae", 0.0, 0.0)
    made(tmp_path, "classical-dae", 0.0)
    made(tmp_path, "one-level", 0.0)
    right = {"l-dae-seed0": range(10), "l-dae-seed1": range(12), "classical-dae-seed0": [0, 1, 2, 18, 19]}
    for name, numbers in (right | {"one-level-seed0": range(8)}).items():
        with_predictions(tmp_path, name, numbers)
    figures = runs.measure(tmp_path)
    change, error = verdicts.compare(rungs.RUNGS["classical-dae"], figures)
    each = [(i in range(10)) / 2 + (i in range(12)) / 2 for i in range(20)]
    differences = [(i in right["classical-dae-seed0"]) - each[i] for i in range(20)]
    mean = sum(differences) / 20
    paired = sum((x - mean) ** 2 for x in differences) / 20 / 20  # the variance of a mean of 20
    seeds = ((60 - 50) / 2) ** 2 * 2  # the variance of the two accuracies of l-dae, the only rung with several seeds
    assert change == pytest.approx(25 - 55)
    assert error == pytest.approx((1e4 * paired + seeds / 2 + seeds / 1) ** 0.5)
    with_predictions(tmp_path, "one-level-seed0", range(8), images=19)  # of other images
    assert verdicts.compare(rungs.RUNGS["one-level"], runs.measure(tmp_path))[1] == pytest.approx(
        (5.0**2 + 5.0**2 + seeds / 2 + seeds / 1) ** 0.5
    )


def test_predictions_of_some_seeds_alone_are_not_paired(tmp_path):
    made(tmp_path, "l-dae", 0.0, 0.0)
    with_predictions(tmp_path, "l-dae-seed0", range(10))
    assert runs.measure(tmp_path)["l-dae"].right is None
    with_predictions(tmp_path, "l-dae-seed1", range(12), images=19)
    assert runs.measure(tmp_path)["l-dae"].right is None
    with_predictions(tmp_path, "l-dae-seed1", range(12))
    assert runs.measure(tmp_path)["l-dae"].right.tolist() == [1.0] * 10 + [0.5] * 2 + [0.0] * 8


def test_options_that_differ_between_seeds_stand_in_the_way(tmp_path):
    made(tmp_path, "l-dae", 50.0, 51.0)
    made(tmp_path, "one-level", 40.0, 41.0)
    path = tmp_path / "one-level-seed1/results/train.json"
    train = json.loads(path.read_text())
    train["arguments"]["weight_decay"] = 0.1
    save_result(path, train, overwrite=True)
    reason = "`one-level` and `l-dae` also differ in weight_decay"
    assert verdicts.compare(rungs.RUNGS["one-level"], runs.measure(tmp_path)) == reason


def test_a_study_is_reported_as_its_runs_are(tmp_path, capsys):
    """And the command prints the tables."""
    made(tmp_path / "first", "l-dae", 50.0, 51.0)
    made(tmp_path / "first", "patch-ae", 30.0, 31.0)
    made_tokenizer(tmp_path / "first", "patch-ae", 20)
    study = tmp_path / "first.jsonl"
    collect(tmp_path / "first", study)
    assert tables(study) == tables(tmp_path / "first")
    report.main([str(study)])
    assert capsys.readouterr().out == "\n\n".join(tables(study).values()) + "\n"


def test_the_document_holds_what_the_results_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path("docs/ablation.md").read_text()
    found = tables("experiments/results/ablation.jsonl", ["experiments/results/crops.jsonl"])
    assert {name: text.split(f"<!-- {name} -->")[1].strip("\n") for name in found} == found


@pytest.mark.parametrize("side", [True, False])
def test_a_rung_of_the_list_is_planned_run_and_reported(tmp_path, recipe, monkeypatch, side):
    """Nothing but the list knows of it."""
    rung = rungs.Rung("mine", "twice the classes left out", {"class_dropout": 0.2}, 60.0, "l-dae", side=side)
    monkeypatch.setitem(rungs.RUNGS, "mine", rung)
    ablation = make_ablation(recipe, [rung], tmp_path, [0])
    assert "twice the classes left out: --class_dropout 0.2" in ablation.plan()
    command = ablation.command(*ablation.jobs()[0])
    assert command[command.index("--class_dropout") + 1] == "0.2"
    with pytest.raises(ValueError, match="decide class_dropout"):
        run.main([recipe, "--rungs", "mine", "--", "--class_dropout", "0.3"])
    made(tmp_path, "l-dae", 50.0, 51.0)
    made(tmp_path, "mine", 40.0, 41.0)
    texts = tables(tmp_path)
    assert "| `mine` | `l-dae` | twice the classes left out | -4.5 | -10.0 ± 1.0 | agrees |" in texts["claims"]
    row = "| `mine` | twice the classes left out | 60.0 | 40.5 ± 0.7 | 20.0 | 2 |"
    assert (row in texts.get("branches", ""), row in texts["table 3"]) == (side, not side)
    drawn = []
    monkeypatch.setattr(figures, "rungs", lambda steps, path: drawn.append(steps) or path)
    report.draw(tmp_path, tmp_path / "drawn")
    assert [name for name, *_ in drawn[0]] == ["l-dae", "mine"]
