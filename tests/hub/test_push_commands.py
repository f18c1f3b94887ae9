"""`--push_to_hub` of training and probing: what they upload is what lies in the run's folder when they end."""

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from hub_folders import MODEL_ID, read_all, tiny_model
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from PIL import Image

import probe_ldae
import train_ldae
from ldae.export import command as export
from ldae.hub.folder import save_hub_folder
from ldae.hub.push import push_folder

OPTIONS = (
    "--image_size 16 --patch_size 8 --hidden_size 16 --num_hidden_layers 1 --decoder_num_hidden_layers 1 --num_attention_heads 2 "
    "--latent_dim 4 --max_steps 1 --per_device_batch_size 4 --data_name squares --no_probe --knn_steps 0 --held_out 0 "
    "--report_to none --hub_branch dev --hub_private"
)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # of the features that probes keep
    monkeypatch.delenv("RANK", raising=False)
    AcceleratorState._reset_state(True)
    with HubStandIn(tmp_path / "hf_home") as hub:
        hub.here(monkeypatch)
        yield hub


@pytest.fixture
def data(tmp_path):
    """Noise in two classes, with a validation split of its own."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "data" / ("train" if i < 16 else "validation") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def test_training_and_probing_upload_the_run(hub, data, tmp_path):
    run = tmp_path / "a-run"
    train_ldae.main(["--data", str(data), "--output_dir", str(run), "--push_to_hub", *OPTIONS.split()])
    repository = hub.repositories["user/a-run"]
    trained = repository.at("dev")[1]
    assert repository.private
    assert len(repository.commits) == 1
    assert {"README.md", "config.json", "model.safetensors", "denoised.png", "results/train.json"} <= trained.keys()
    assert trained.items() <= read_all(run).items()
    card = ModelCard(trained["README.md"].decode())
    assert 'from_pretrained("user/a-run", trust_remote_code=True)' in card.text  # with its owner, so that it loads
    assert "| Data | squares, 16 images" in card.text

    AcceleratorState._reset_state(True)
    arguments = f"--model {run} --data {data} --device cpu --protocols knn --knn_k 3 --no_baseline --push_to_hub"
    probe_ldae.main([*arguments.split(), "--hub_branch", "dev", "--hub_tag", "probed"])
    probed = repository.at("probed")[1]
    assert len(repository.commits) == 2
    assert set(probed) - set(trained) == {"results/probe-data.json"}
    assert probed.items() <= read_all(run).items()
    results = ModelCard(probed["README.md"].decode()).data.eval_results
    assert [(result.dataset_name, result.metric_name[:4]) for result in results] == [("squares", "k-NN")]
    assert repository.files == {}  # main is as it was


@pytest.mark.parametrize("arguments", ["--model org/name", "--model here --output_dir there"])
def test_probing_uploads_a_folder_only(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match="--push_to_hub uploads the folder of a model with its results in it"):
        probe_ldae.main([*arguments.split(), "--push_to_hub"])


@pytest.mark.parametrize("has_card", [True, False])
def test_what_is_exported_from_the_hub_has_the_licence_of_the_card_there(hub, tmp_path, has_card):
    save_hub_folder(tiny_model(), tmp_path / "model")
    if has_card:
        (tmp_path / "model/README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    name = f"{MODEL_ID}-{has_card}"  # a name of its own, since the client notes a name's commit
    push_folder(tmp_path / "model", name)
    export.main(["--model", name, "--output_dir", str(tmp_path / "plain")])
    assert ModelCard.load(tmp_path / "plain/README.md").data.license == ("cc0-1.0" if has_card else None)
