"""The command line: mistakes, switches, help."""

from dataclasses import MISSING, dataclass

import pytest
from sample_options import PARSER, TRAINING, refused

from ldae.options import names_given, option, option_parser, parse_arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max-stps 3", "unknown option --max_stps; did you mean --max_steps?"),
        ("--hiden_size=64", "unknown option --hiden_size; did you mean --hidden_size?"),
        ("-epochs 3", "unknown option -epochs; did you mean --epochs?"),
        ("--qqq", "unknown option --qqq; --help lists the options"),
        ("--epoch 3", "unknown option --epoch; did you mean --epochs?"),  # no abbreviations
        ("--max_steps 0", "argument --max_steps: must be an integer of at least 1, got '0'"),
        ("--max_steps 2.5", "argument --max_steps: must be an integer of at least 1, got '2.5'"),
        ("--learning_rate -1e-4", "argument --learning_rate: must be a number greater than 0, got '-1e-4'"),
        ("--learning_rate", "argument --learning_rate: expected one argument"),
        ("--warmup_ratio 1.5", "argument --warmup_ratio: must be a number of at least 0 and less than 1, got '1.5'"),
        ("--latent_scaling all", "argument --latent_scaling: must be one of none, global, component, got 'all'"),
        ("--flip maybe", "argument --flip/--no_flip: must be true or false, got 'maybe'"),
        ("--no-flip true", "argument --no_flip: takes no value, got True; leave it out"),
        ("--autoencoder [1]", "argument --autoencoder: must be a JSON object, got '[1]'"),
        ("--image_size 32 x", "argument --image_size: must be one or more integers, got 'x'"),
        ("--epochs 3 photos", "unexpected argument 'photos'; usage: "),
    ],
)
def test_a_mistake_is_answered_by_one_line(capsys, arguments, message):
    assert f": error: {message}" in refused(TRAINING, arguments.split(), capsys)
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["--data", "x", *arguments.split()])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--flip", True),
        ("--flip true", True),
        ("--flip=no", False),
        ("--flip False", False),
        ("--no_flip", False),
        ("--no-flip", False),
        ("--no_flip --flip", True),
    ],
)
def test_switches(arguments, expected):
    assert TRAINING.given(arguments.split()) == {"flip": expected}


def test_a_missing_option_is_named(capsys):
    @dataclass
    class Required:
        model: str = option(MISSING, "A model.")
        lists: list[int] = option([1], "Numbers.")

    parser = option_parser(Required, description="")
    assert "the following arguments are required: --model" in refused(parser, ["--lists", "1"], capsys)
    assert "unknown option --modle; did you mean --model?" in refused(parser, ["--modle", "x"], capsys)
    assert parser.parse_args_into_dataclasses(["--model", "x"])[0] == Required("x", [1])


def test_names_given():
    assert names_given(["--max-steps=3", "x-y", "--no_flip", "--sizes", "-1"]) == {"max_steps", "no_flip", "sizes"}


def test_help_shows_each_option_once_in_its_group(capsys):
    with pytest.raises(SystemExit, match="0"):
        PARSER.given(["--help"])
    out = capsys.readouterr().out
    sample, switches = out.split("\nSample:\n")[1].split("\nSwitches:\n")
    for name in PARSER.domains:
        part = switches if name in ("flag", "kind") else sample
        assert part.count(f"\n  --{name}") + part.startswith(f"  --{name}") == 1
        assert out.count(f"--{name}") == 1
    text = " ".join(out.split())
    for part in (
        "--count N How many. (at least 1 and at most 9; default: 3)",
        "--ratio X A part, in %. (at least 0 and less than 1; default: 0.5)",
        "--weight X A weight. (greater than 0 and at most 100) ",
        "--flag, --no_flag A switch. (default: True)",
        "--kind {no,bf16} A choice.",
        "--sizes N [N ...] Sizes. (at least 1; default: 4 5)",
        "--rates X [X ...] Rates. (greater than 0) --parts",
    ):
        assert part in text
    assert "None" not in text


def test_help_of_training(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(["--help"])
    out = capsys.readouterr().out
    titles = [line.rstrip(":") for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert (titles[:3], titles[-1]) == (["options", "Data", "Run"], "Model")  # what a first run wants comes first
    assert len(titles) == len(set(titles)) == 9
    text = " ".join(out.split())
    for part in ("equation 4", "number means square. (default: 224)", "--probe, --no_probe", "photos, tiny-imagenet"):
        assert part in text  # the configuration's own texts and defaults
    assert "None)" not in text


def test_help_shows_what_is_needed_and_breaks_no_name_at_a_hyphen(capsys, monkeypatch):
    @dataclass
    class Needs:
        model: str = option(MISSING, "A model.")
        rung: str = option("dit", "One of " + ", ".join(f"patch-vae-d{d}" for d in range(20)) + ".")

    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        option_parser(Needs, description="").parse_args_into_dataclasses(["--help"])
    out = capsys.readouterr().out
    assert out.split("\n")[0].endswith(" --model TEXT [--option VALUE ...]")
    assert all(f"patch-vae-d{d}" in out for d in range(20))


def test_positional_options(capsys):
    @dataclass
    class Places:
        folder: str = option(MISSING, "A folder.", positional=True)
        count: int = option(7, "A number.", minimum=1, positional=True)
        names: list[str] = option([], "Names.")

    parser = option_parser(Places, description="")
    (alone,), (both,) = (
        parser.parse_args_into_dataclasses(line.split()) for line in ("--names=a x", "x 2 --names a b")
    )
    assert (alone, both) == (Places("x", 7, ["a"]), Places("x", 2, ["a", "b"]))
    assert parser.format_usage().endswith(" FOLDER [COUNT] [--option VALUE ...]\n")
    assert "the following arguments are required: FOLDER" in refused(parser, [], capsys)
    assert "argument COUNT: must be an integer of at least 1, got '0'" in refused(parser, ["x", "0"], capsys)
    assert "argument FOLDER: must be a text that is not empty, got ''" in refused(parser, [""], capsys)
    assert "unexpected argument 'y'" in refused(parser, ["x", "1", "y"], capsys)
    assert "unknown option --folder" in refused(parser, ["--folder", "x"], capsys)
