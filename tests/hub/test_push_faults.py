"""Uploads through faults: whatever happens, a branch holds the old model whole, or the new one whole."""

import shlex
import time

import pytest
import torch
from hub_folders import FILES, MODEL_ID, make_folder, read_all, tiny_model
from hub_stand_in import Fault, HubStandIn
from transformers import AutoImageProcessor, AutoModel

from ldae import LDAEForPreTraining
from ldae.hub import command
from ldae.hub.folder import save_hub_folder
from ldae.hub.push import push_folder, validate_hub
from ldae.mistakes import is_mistake
from ldae.options import parse_arguments
from ldae.training.folder import validate

STEPS = {
    "whoami": "GET /api/whoami-v2",
    "create": "POST /api/repos/create",
    "refs": "GET .*/refs",
    "branch": "POST .*/branch/.*",
    "list": "GET .*/tree/.*",
    "card": "POST /api/validate-yaml",
    "modes": "POST .*/preupload/.*",
    "batch": "POST .*/objects/batch",
    "weights": "PUT /lfs/.*",
    "commit": "POST .*/commit/.*",
    "tag": "POST .*/tag/.*",
}
COMMIT = STEPS["commit"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, with `waits`: the seconds that its client would have slept."""
    with HubStandIn(tmp_path / "hf_home") as hub:
        hub.here(monkeypatch)
        hub.waits = []
        monkeypatch.setattr(time, "sleep", hub.waits.append)
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("hub") / "ldae-vit-tiny")


@pytest.fixture
def old(hub, tmp_path):
    """What the Hub holds before: the weights in two files, and the result of a probe that the new folder lacks."""
    model = tiny_model()
    save_hub_folder(model, tmp_path / "old")
    (tmp_path / "old/model.safetensors").unlink()
    (tmp_path / "old/digests.sha256").unlink()
    model.save_pretrained(tmp_path / "old", max_shard_size="100KB")
    assert len(list((tmp_path / "old").glob("*.safetensors"))) > 1
    (tmp_path / "old/results").mkdir()
    (tmp_path / "old/results/probe-old.json").write_text("{}")
    push_folder(tmp_path / "old", MODEL_ID)
    hub.repositories[MODEL_ID].commits[-1]["files"]["mine.txt"] = b"the owner's"
    return dict(hub.repositories[MODEL_ID].files)


def is_new(folder, files):
    """Whether a branch holds the folder as it is, and of what was there before only what no push has put there."""
    contents = read_all(folder)
    return files == {name: contents[name] for name in FILES} | {"mine.txt": b"the owner's"}


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 503, "headers": {"Retry-After": "77"}},
        {"status": None},
        {"status": None, "late": True},
    ],
    ids=["500", "503", "dropped in the body", "answer lost"],
)
@pytest.mark.parametrize("step", STEPS)
def test_a_fault_that_passes_delays_an_upload(hub, old, folder, step, fault):
    hub.faults = [Fault(STEPS[step], **fault)]
    hub.repositories[MODEL_ID].branches["dev"] = hub.repositories[MODEL_ID].branches["main"]
    push_folder(folder, MODEL_ID, branch="dev", tag="v1")
    repository = hub.repositories[MODEL_ID]
    assert [fault.times for fault in hub.faults] == [0]
    assert hub.waits
    assert max(hub.waits) >= (77 if fault["status"] == 503 else 1)
    assert len(repository.commits) == 2  # one, and never a second one for an answer that was lost
    assert is_new(folder, repository.at("dev")[1])
    assert is_new(folder, repository.at("v1")[1])
    assert repository.files == old


@pytest.mark.parametrize(
    ("step", "status", "remedy"),
    [
        ("whoami", 401, "hf auth login"),
        ("commit", 401, "hf auth login"),
        ("all", 403, "may not write"),
        ("commit", 403, "may not write"),
        ("list", 404, "mind the name"),
        ("commit", 404, "mind the name"),
        ("commit", 409, "being changed by someone else"),
        ("commit", 500, "500"),
        ("weights", 500, "Error while uploading 'model.safetensors' to the Hub. Server error '500"),
        ("weights", 403, "may not write"),
        ("commit", None, "was not uploaded to"),  # the words are the system's
    ],
)
def test_a_fault_that_stays_ends_in_one_line_and_changes_nothing(hub, old, folder, step, status, remedy):
    contents = read_all(folder)
    hub.faults = [Fault(STEPS.get(step, "POST .*"), status, times=1000)]
    with pytest.raises(ConnectionError) as caught:
        push_folder(folder, MODEL_ID)
    assert is_mistake(caught.value)
    message = str(caught.value)
    assert remedy in message
    assert "\n" not in message
    assert bool(hub.waits) == (status not in (401, 403, 404))
    assert hub.repositories[MODEL_ID].files == old
    assert read_all(folder) == contents


def test_the_command_that_a_failed_upload_names_uploads_the_same(hub, folder, capsys):
    hub.faults = [Fault(COMMIT, 403)]
    with pytest.raises(ConnectionError, match=r"was not uploaded to user/mine: 403.*the folder is whole") as caught:
        push_folder(folder, "mine", branch="dev", tag="v1", private=True)
    python, m, module, *arguments = shlex.split(str(caught.value).split("Try again later: ")[1])
    assert (python, m, module) == ("python", "-m", "ldae.hub")
    command.main(arguments)
    repository = hub.repositories["user/mine"]
    assert repository.private
    assert [set(commit["paths"]) for commit in repository.commits] == [FILES]
    assert repository.tags["v1"] == repository.branches["dev"] == repository.commits[0]["sha"]
    assert repository.files == {}  # main is as it was
    assert capsys.readouterr().out.endswith(f"{hub.url}/user/mine/tree/dev\n")


def test_an_upload_that_got_no_tag_says_so_and_is_finished_later(hub, folder):
    hub.faults = [Fault(STEPS["tag"], 403)]
    with pytest.raises(ConnectionError, match=f"was uploaded to {MODEL_ID}, but got no tag: 403"):
        push_folder(folder, MODEL_ID, tag="v1")
    push_folder(folder, MODEL_ID, tag="v1")
    assert len(hub.repositories[MODEL_ID].commits) == 1
    assert hub.repositories[MODEL_ID].tags == {"v1": hub.repositories[MODEL_ID].branches["main"]}


def test_a_model_comes_back_by_its_name_and_revision(hub, folder, tmp_path):
    """Each revision is another model."""
    push_folder(folder, MODEL_ID, tag="first")
    torch.manual_seed(7)
    model = LDAEForPreTraining(tiny_model().config)
    save_hub_folder(model, tmp_path / "second")
    push_folder(tmp_path / "second", MODEL_ID, branch="second")
    push_folder(folder, MODEL_ID, branch="second", tag="back")
    expected = {
        "first": folder,
        "main": folder,
        "back": folder,
        hub.repositories[MODEL_ID].commits[1]["sha"]: tmp_path / "second",
    }
    for revision, source in expected.items():
        loaded = AutoModel.from_pretrained(MODEL_ID, revision=revision, cache_dir=tmp_path / "cache")
        local = AutoModel.from_pretrained(source)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), local.parameters(), strict=True))
        processor = AutoImageProcessor.from_pretrained(MODEL_ID, revision=revision, cache_dir=tmp_path / "cache")
        assert processor.to_dict() == AutoImageProcessor.from_pretrained(source).to_dict()


def test_a_taken_tag_stays(hub, folder):
    push_folder(folder, MODEL_ID, tag="v1")
    commits = list(hub.repositories[MODEL_ID].commits)
    with pytest.raises(ValueError, match=r"--hub_tag: .* has a tag 'v1' already"):
        push_folder(folder, MODEL_ID, branch="dev", tag="v1")
    assert hub.repositories[MODEL_ID].commits == commits


def test_nothing_private_goes_to_a_public_repository(hub, old, folder):
    with pytest.raises(ValueError, match=r"--hub_private: .* is there and public"):
        push_folder(folder, MODEL_ID, private=True)
    assert hub.repositories[MODEL_ID].files == old


def test_a_damaged_folder_is_not_uploaded(hub, tmp_path):
    folder = make_folder(tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"is damaged: model.safetensors is not what was written"):
        push_folder(folder, MODEL_ID)
    assert hub.repositories == {}


@pytest.mark.parametrize("name", ["a/b/c", "two words", "-"])
def test_a_name_that_can_be_none_is_refused(hub, name):
    with pytest.raises(ValueError, match=f"--hub_model_id '{name}' can be no repository's name"):
        validate_hub(name)


def test_a_hub_that_cannot_be_reached_is_named(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"nothing can be uploaded to org/ldae-vit-tiny: .*refused"):
        push_folder(folder, MODEL_ID)


def test_a_run_in_the_working_directory_is_named_after_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldae.training.folder.validate_hub", lambda name: f"user/{name}")
    _, _, options = parse_arguments(["--output_dir", ".", "--push_to_hub"])
    validate(options)
    assert options.hub_model_id == f"user/{tmp_path.name}"


def test_without_a_token_nothing_is_tried(hub, folder, monkeypatch):
    monkeypatch.setattr("ldae.hub.push.get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        push_folder(folder, MODEL_ID)
    assert hub.repositories == {}


@pytest.mark.parametrize("status", [503, None], ids=["503", "dropped in the body"])
def test_a_model_comes_back_whole_after_a_fault(hub, folder, tmp_path, status):
    """The client goes on where the connection was dropped; after a 503 its user has to ask again."""
    push_folder(folder, MODEL_ID)
    hub.faults = [Fault("GET .*/model.safetensors", status)]
    if status == 503:
        with pytest.raises(OSError, match="503"):
            AutoModel.from_pretrained(MODEL_ID, cache_dir=tmp_path / "cache")
    loaded = AutoModel.from_pretrained(MODEL_ID, cache_dir=tmp_path / "cache")
    assert hub.faults[0].times == 0
    local = AutoModel.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), local.parameters(), strict=True))
