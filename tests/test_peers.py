"""Peers are trained by the same loop and probed like l-DAE."""

import json

import torch
from PIL import Image
from transformers import AutoModel, ViTMAEModel

from benchmarks.peers import vit_mae
from ldae.arguments import parse_arguments
from train_ldae import train


def test_vit_mae_trains_in_the_same_loop(tmp_path):
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 100, 255 - 30 * i)).save(tmp_path / f"{i}.png")
    arguments = parse_arguments(
        f"--data {tmp_path} --output_dir {tmp_path / 'run'} --image_size 16 --patch_size 4 --hidden_size 32 --latent_dim 4 "
        "--num_hidden_layers 1 --num_attention_heads 2 --per_device_batch_size 4 --max_steps 3 --report_to none".split()
    )
    model = vit_mae.build(arguments[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config
    assert (config.num_hidden_layers, config.decoder_num_hidden_layers, config.hidden_size) == (1, 1, 32)
    for positions in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        assert positions[0, 1:].std() > 0.1  # transformers leaves them at zero
    noise = model.sample_noise(3, generator=torch.Generator().manual_seed(0))["noise"]
    assert noise.shape == (3, 16)
    train(*arguments, model=model)
    encoder = AutoModel.from_pretrained(tmp_path / "run")
    assert isinstance(encoder, ViTMAEModel)
    assert not torch.equal(encoder.layers[0].mlp.fc1.weight, before["vit.layers.0.mlp.fc1.weight"])
    result = json.loads((tmp_path / "run/results/train.json").read_text())
    assert (result["config"]["model_type"], result["steps"]) == ("vit_mae", 3)
