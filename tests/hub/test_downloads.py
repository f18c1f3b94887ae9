"""Downloads by our commands through faults of the Hub: what may pass is waited for, and anything else is said at once."""

import io
import time

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from hub_folders import make_folder, read_all
from hub_stand_in import Fault, HubStandIn, Repository
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from ldae.data.sources import load_examples
from ldae.features.encoders import load_encoder
from ldae.loading import load_model
from ldae.retries import WAITS


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, with `waits`: the seconds that its client would have slept. Nothing is in a cache."""
    with HubStandIn(tmp_path / "hf_home") as hub:
        hub.here(monkeypatch)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        hub.waits = []
        monkeypatch.setattr(time, "sleep", hub.waits.append)
        yield hub


def put(hub: HubStandIn, name: str, files: dict[str, bytes]):
    """Puts a repository there as if it had been uploaded. Each test needs another name: the client notes a name's commit."""
    repository, sha = Repository(), "1" * 40
    repository.commits.append({"summary": "", "paths": sorted(files), "sha": sha, "files": files})
    repository.branches["main"] = sha
    hub.repositories[name] = repository


@pytest.mark.parametrize("status", [500, 503, None], ids=["500", "503", "dropped in the body"])
def test_a_model_comes_whole_after_a_fault_that_passes(hub, tmp_path, status):
    folder, name = make_folder(tmp_path / "ldae-vit-tiny"), f"org/fault-{status}"
    put(hub, name, read_all(folder))
    hub.faults = [Fault("GET .*/model.safetensors", status)]
    loaded, local = load_model(name), load_model(folder)
    assert hub.faults[0].times == 0
    assert WAITS[0] in hub.waits or status is None  # where the connection is dropped, the client goes on by itself
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), local.parameters(), strict=True))


def test_the_format_of_images_is_waited_for_and_not_made_up(hub, tmp_path):
    """A model without an image processor is given images as its configuration says."""
    ViTModel(
        ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "vit")
    put(hub, "org/vit", {path.name: path.read_bytes() for path in (tmp_path / "vit").iterdir()})
    hub.faults = [Fault("GET .*/preprocessor_config.json", 503)]
    assert load_encoder("org/vit").mean == pytest.approx([0.1, 0.2, 0.3])
    assert hub.faults[0].times == 0


@pytest.mark.parametrize("request_", ["GET /api/datasets/org/data", "GET .*/revision/.*", "GET .*/train.parquet"])
def test_a_data_set_comes_whole_after_a_fault_that_passes(hub, request_):
    content = io.BytesIO()
    images = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    rows = {"image": [{"bytes": b"x", "path": None}] * 3, "label": [0, 1, 0]}
    pq.write_table(datasets.Dataset.from_dict(rows, features=images).data.table, content)
    put(hub, "org/data", {"train.parquet": content.getvalue()})
    hub.faults = [Fault(request_, 503)]
    assert load_examples("org/data", "train")["label"] == [0, 1, 0]
    assert hub.faults[0].times == 0


def test_a_fault_that_stays_is_said_after_some_tries(hub, tmp_path):
    put(hub, "org/lost", read_all(make_folder(tmp_path / "ldae-vit-tiny")))
    hub.faults = [Fault("GET .*/model.safetensors", 503, times=1000)]
    with pytest.raises(FileNotFoundError, match=r"(?s)--model: 'org/lost' .*503"):
        load_model("org/lost")
    assert hub.waits == list(WAITS)


def test_what_is_not_there_is_said_at_once(hub):
    with pytest.raises(FileNotFoundError, match="--model: 'org/none'"):
        load_model("org/none")
    assert not hub.waits
