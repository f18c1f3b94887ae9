"""Every home of a folded encoder against the l-DAE itself, in float64; and its files, opened without the package."""

import json
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoImageProcessor, UperNetConfig, UperNetForSemanticSegmentation, VitDetBackbone

from folding_ldae import plain_vit
from ldae import LDAEForImageClassification, LDAEImageProcessor, LDAEModel
from ldae.export import as_onnx
from ldae.export.as_timm import as_timm
from ldae.export.as_vitdet import as_vitdet
from ldae.export.command import export, main
from ldae.features.encoders import load_encoder

TINY = {"image_size": 8, "num_hidden_layers": 3}


@pytest.fixture(params=["random", "trained"])
def model(request, tiny_model):
    return tiny_model(LDAEModel, **TINY) if request.param == "random" else request.getfixturevalue("trained")


# ---------------------------------------------------------------------------------------------------------- in float64


def test_transformers_is_exact(model, images, in_float64, exactly):
    x, expected = images(model.config).double(), in_float64(model)
    exactly(model.fold()(x).last_hidden_state, expected(x).last_hidden_state)


def test_timm_is_exact(model, images, in_float64, exactly):
    x, expected = images(model.config).double(), in_float64(model)(images(model.config).double())
    vit = as_timm(plain_vit(model))
    exactly(vit.forward_features(x), expected.last_hidden_state)
    exactly(vit(x), expected.pooler_output)


def test_vitdet_is_exact(model, images, in_float64, exactly):
    x, plain = images(model.config).double(), plain_vit(model)
    hidden = in_float64(model)(x, output_hidden_states=True).hidden_states
    rows, columns = model.config.grid_hw
    maps = [tokens.transpose(1, 2).unflatten(2, (rows, columns)) for tokens in hidden]
    exactly(as_vitdet(plain)(x).last_hidden_state, maps[-1])
    backbone = as_vitdet(plain, VitDetBackbone)
    exactly(backbone(x, output_hidden_states=True).hidden_states, tuple(maps))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_channels": 1},
        {"patch_size": (2, 4), "image_size": (8, 12)},
        {"qkv_bias": False, "final_layernorm": False, "hidden_act": "gelu_pytorch_tanh"},
        {"hidden_size": 28, "intermediate_size": 61, "hidden_act": "silu"},  # 28 * (61 / 28) is below 61
    ],
)
def test_timm_takes_every_shape(tiny_model, images, in_float64, exactly, fields):
    model = in_float64(tiny_model(LDAEModel, **fields))
    x = images(model.config).double()
    exactly(as_timm(plain_vit(model))(x), model(x).pooler_output)


def test_upernet_trains_on_vitdet(tiny_model, images):
    vitdet = as_vitdet(plain_vit(tiny_model(LDAEModel, **TINY)), VitDetBackbone).float()
    vitdet.config.out_features = ["stem", "stage1", "stage2", "stage3"]
    config = UperNetConfig(
        backbone_config=vitdet.config, hidden_size=8, num_labels=3, auxiliary_in_channels=16, pool_scales=[1, 2]
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(vitdet.state_dict())
    labels = torch.arange(2 * 8 * 8).view(2, 8, 8) % 3
    model(torch.rand(2, 3, 8, 8), labels=labels).loss.backward()
    assert model.backbone.embeddings.projection.weight.grad.any()


def test_classifiers_fold_with_their_labels(tiny_model, images, in_float64, exactly):
    model = in_float64(tiny_model(LDAEForImageClassification, id2label={0: "cat", 1: "dog", 2: "owl"}))
    x = images(model.config).double()
    exactly(as_timm(plain_vit(model))(x), model(x).logits)


def test_torch_export_takes_any_number_of_images(tiny_model):
    folded = tiny_model(LDAEModel).fold()
    x = torch.rand(5, 3, 8, 12)
    program = torch.export.export(folded, (x[:2],), dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}})
    assert_close(program.module()(x).last_hidden_state, folded(x).last_hidden_state)


# ------------------------------------------------------------------------------------------------------------- ONNX


def onnx_outputs(folder, x, file=as_onnx.FILE):
    session = onnxruntime.InferenceSession(folder / file)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixel_values": x.numpy()}), strict=True))


@pytest.mark.parametrize("model", ["random", pytest.param("trained", marks=pytest.mark.slow)], indirect=True)
def test_onnx_takes_any_number_and_size(model, tmp_path):
    export(plain_vit(model), tmp_path, "onnx", "A test")
    p, q = model.config.patch_hw
    for count, rows, columns in ((1, 1, 1), (3, 2, 5), (2, 7, 3)):
        x = torch.rand(count, 3, rows * p, columns * q) * 2 - 1
        expected = model(x, interpolate_pos_encoding=True)
        found = onnx_outputs(tmp_path, x)
        assert list(found) == ["last_hidden_state", "pooler_output"]
        for name, value in found.items():
            assert_close(torch.from_numpy(value), expected[name], atol=2e-5, rtol=2e-5)
    nodes = onnx.load(tmp_path / as_onnx.FILE, load_external_data=False).graph.node
    assert "Cos" not in {node.op_type for node in nodes}  # of float64, which onnxruntime knows from 1.29 on


def test_onnx_in_int8_is_close_and_gives_no_advice(tiny_model, images, tmp_path, caplog):
    model = tiny_model(LDAEModel)
    export(plain_vit(model), tmp_path, "onnx", "A test", int8=True)
    assert not [record for record in caplog.records if record.name == "root"]
    x = images(model.config, 8)
    found = torch.from_numpy(onnx_outputs(tmp_path, x, as_onnx.INT8_FILE)["pooler_output"])
    assert 0.99 < torch.cosine_similarity(found, model(x).pooler_output).min() < 1 - 1e-6


def test_onnx_of_a_classifier_gives_logits(tiny_model, images, tmp_path):
    model = tiny_model(LDAEForImageClassification, num_labels=3)
    export(plain_vit(model), tmp_path, "onnx", "A test")
    x = images(model.config)
    found = onnx_outputs(tmp_path, x)
    assert_close(torch.from_numpy(found["logits"]), model(x).logits, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------- opened where the package is not

STRANGER = """
import sys, timm, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, VitDetBackbone, pipeline

x, image, found = load_file("x.safetensors")["x"], Image.open("image.png"), {}
with torch.no_grad():
    for name in ("transformers", "timm", "vitdet"):
        model = AutoModel.from_pretrained(name).eval()
        outputs = model(x)
        found[name] = outputs.last_hidden_state
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        found[f"{name} pixels"] = processor(image, return_tensors="pt")["pixel_values"]
        if name == "timm":
            found["timm pooled"] = outputs.pooler_output
        if name != "vitdet":
            pipe = pipeline("image-feature-extraction", model=name)
            found[f"{name} pipeline"] = torch.tensor(pipe(image, pool=name == "timm"))
    found["vitdet map"] = VitDetBackbone.from_pretrained("vitdet").eval()(x).feature_maps[0]
    found["timm.create_model"] = timm.create_model("local-dir:timm", pretrained=True).eval()(x)
    for name in ("classifier-transformers", "classifier-timm"):
        model = AutoModelForImageClassification.from_pretrained(name).eval()
        assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}, model.config.id2label
        found[name] = model(x).logits
        assert {answer["label"] for answer in pipeline("image-classification", model=name)(image)} == {"cat", "dog", "owl"}
save_file({name: value.contiguous() for name, value in found.items()}, "found.safetensors")
assert not {"ldae", "modeling_ldae", "folding_ldae"} & set(sys.modules)
"""


def test_files_open_without_the_package(tiny_model, images, tmp_path):
    """A process that does not import the package, and runs no code of a folder, finds the outputs of l-DAE."""
    model = tiny_model(LDAEModel, **TINY)
    classifier = tiny_model(LDAEForImageClassification, id2label={0: "cat", 1: "dog", 2: "owl"}, **TINY)
    for home in ("transformers", "timm", "vitdet"):
        export(plain_vit(model), tmp_path / home, home, "A test")
    for home in ("transformers", "timm"):
        export(plain_vit(classifier), tmp_path / f"classifier-{home}", home, "A test")
    x, image = images(model.config), Image.fromarray((torch.rand(20, 30, 3) * 255).byte().numpy())
    save_file({"x": x}, tmp_path / "x.safetensors")
    image.save(tmp_path / "image.png")
    done = subprocess.run([sys.executable, "-I", "-c", STRANGER], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")

    expected = model(x, output_hidden_states=True)
    pixels = LDAEImageProcessor({"height": 8, "width": 8})(image, return_tensors="pt")["pixel_values"]
    of_image = model(pixels)
    before_norm = expected.hidden_states[-1].transpose(1, 2).unflatten(2, (2, 2))
    logits = classifier(x).logits
    for name, value in {
        "transformers": expected.last_hidden_state,
        "timm": expected.last_hidden_state,
        "timm pooled": expected.pooler_output,
        "timm.create_model": expected.pooler_output,
        "vitdet": before_norm,
        "vitdet map": before_norm,
        "transformers pixels": pixels,
        "timm pixels": pixels,
        "vitdet pixels": pixels,
        "timm pipeline": of_image.pooler_output,
        "classifier-transformers": logits,
        "classifier-timm": logits,
    }.items():
        assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=lambda message, name=name: f"{name}: {message}")
    # a pipeline resizes by torchvision, whose pixels are up to a level or two from Pillow's
    assert_close(found["transformers pipeline"], of_image.last_hidden_state, atol=0.1, rtol=0.1)


def test_this_package_takes_them_as_encoders(tiny_model, images, tmp_path):
    model = tiny_model(LDAEModel, **TINY)
    x, expected = images(model.config), model(images(model.config)).pooler_output
    for home in ("transformers", "timm"):
        export(plain_vit(model), tmp_path / home, home, "A test")
        assert_close(load_encoder(str(tmp_path / home)).pool(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_processors_give_the_same_pixels(tiny_model, tmp_path, channels, mode):
    """Of an image in the model's own mode whose resized long side is a whole number of pixels."""
    model = tiny_model(LDAEModel, num_channels=channels, **TINY)
    ours = LDAEImageProcessor({"height": 8, "width": 8}, channels)
    for home in ("transformers", "timm"):
        export(plain_vit(model), tmp_path / home, home, "A test")
        theirs = AutoImageProcessor.from_pretrained(tmp_path / home, backend="pil")
        for size in ((20, 30), (64, 32), (40, 40), (5, 10)):
            image = Image.fromarray((torch.rand(*size, 3) * 255).byte().numpy()).convert(mode)
            expected, found = (p(image, return_tensors="pt")["pixel_values"] for p in (ours, theirs))
            assert_close(found, expected, atol=1e-6, rtol=0)


def test_timms_processor_scales_oblong_images_as_ours(tiny_model, tmp_path):
    model = tiny_model(LDAEModel)
    export(plain_vit(model), tmp_path, "timm", "A test")
    ours, theirs = LDAEImageProcessor({"height": 8, "width": 12}), AutoImageProcessor.from_pretrained(tmp_path)
    for size in ((20, 30), (64, 31), (41, 90)):
        image = Image.fromarray((torch.rand(*size, 3) * 255).byte().numpy())
        expected, found = (p(image, return_tensors="pt")["pixel_values"] for p in (ours, theirs))
        assert_close(found, expected, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------- the command


def test_command_writes_a_folder_with_a_card(tiny_model, tmp_path, capsys):
    model = tiny_model(LDAEModel, **TINY)
    model.save_pretrained(tmp_path / "model")
    main(
        [
            "--model",
            str(tmp_path / "model"),
            "--output_dir",
            str(tmp_path / "out"),
            "--timestep",
            "300",
            "--image_size",
            "16",
        ]
    )
    assert "at timestep 300 for transformers" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["image_size"]) == ("ijepa", [16, 16])
    assert 'AutoModel.from_pretrained("FOLDER")' in (tmp_path / "out/README.md").read_text()
    x = torch.rand(1, 3, 16, 16)
    expected = model(x, torch.tensor([300]), interpolate_pos_encoding=True).pooler_output
    assert_close(load_encoder(str(tmp_path / "out")).pool(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: cc-by-4.0\ntags: [x]\n---\n", {"license": "cc-by-4.0"}),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENCE\n---\n",
            {"license": "other", "license_name": "mine", "license_link": "LICENCE"},
        ),
        ("---\ntags: [x]\n---\n", {}),
        ("a text without metadata", {}),
        (None, {}),
    ],
)
def test_the_licence_is_that_of_the_models_card(tiny_model, tmp_path, capsys, card, expected):
    tiny_model(LDAEModel, **TINY).save_pretrained(tmp_path / "model")
    if card is not None:
        (tmp_path / "model/README.md").write_text(card)
    main(["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")])
    data = ModelCard.load(tmp_path / "out/README.md").data.to_dict()
    assert {name: value for name, value in data.items() if "license" in name} == expected
    assert ("README.md names none" in capsys.readouterr().out) == (not expected)


def test_command_takes_a_classifier(tiny_model, tmp_path):
    tiny_model(LDAEForImageClassification, num_labels=3, **TINY).save_pretrained(tmp_path / "model")
    main(["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["IJepaForImageClassification"]
    assert "AutoModelForImageClassification" in (tmp_path / "out/README.md").read_text()


def test_oblong_images_get_no_processor_that_would_cut_them_otherwise(tiny_model, tmp_path, capsys):
    export(plain_vit(tiny_model(LDAEModel)), tmp_path, "transformers", "A test")
    assert "No image processor is written" in capsys.readouterr().out
    assert not (tmp_path / "preprocessor_config.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "vit"], "--to vit: that ViT has a class token"),
        (["--to", "dinov2"], "--to dinov2: that ViT has a class token"),
        (["--to", "keras"], "--to must be one of transformers, timm, vitdet, onnx, got 'keras'"),
        (["--to", "onnx", "--image_size", "8"], "--image_size says nothing to --to onnx"),
        (["--int8"], "--int8 is for --to onnx, got --to transformers"),
        (["--image_size", "8", "8", "8"], "--image_size takes a side, or height and width, got 3 numbers"),
        (["--image_size", "10"], r"image_size must be a multiple of patch_size=\(4, 4\)"),
        (["--timestep", "1000"], r"timesteps must be in \[0, 1000\), got 1000"),
        (["--model", "nowhere/model/there"], "--model: there is no folder 'nowhere/model/there'"),
        (["--model", __file__], "--model: '.*test_homes.py' is a file; give the model's folder"),
        (["--to", "vitdet", "--image_size", "8", "12"], "VitDet takes as many patches high as wide, got 2 and 3"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tiny_model, tmp_path, options, message):
    tiny_model(LDAEModel, **TINY).save_pretrained(tmp_path / "model")
    with pytest.raises((ValueError, OSError), match=message):
        main(["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_what_a_home_cannot_compute_is_refused(tiny_model):
    for fields, home, message in (
        ({"hidden_act": "relu2"}, as_timm, "timm's ViT has no hidden_act='relu2'"),
        ({"layer_norm_eps": 1e-5}, as_timm, "timm's files name no layer_norm_eps but 1e-06, got 1e-05"),
        ({"intermediate_size": 24}, as_vitdet, "intermediate_size to be a multiple of hidden_size=16, got 24"),
    ):
        with pytest.raises(ValueError, match=message):
            home(plain_vit(tiny_model(LDAEModel, **{**TINY, **fields})))


def test_folders_that_hold_files_are_left_alone(tiny_model, tmp_path):
    tiny_model(LDAEModel, **TINY).save_pretrained(tmp_path / "model")
    with pytest.raises(FileExistsError, match="holds files; remove them or choose another --output_dir"):
        main(["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "model"), "--to", "timm"])
