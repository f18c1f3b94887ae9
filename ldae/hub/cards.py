"""Model cards. Each figure in them is read from the Hub folder's `config.json` and `results/*.json`.

python -m ldae.hub.cards --model FOLDER [--hub_model_id org/name] [--data_name NAME] [--output model_cards/NAME/README.md]
"""

import shutil
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig, PreTrainedConfig

from configuration_ldae import pair
from ldae.files import read_json, validate_writable
from ldae.hub.counts import count_encoder
from ldae.hub.energy import energy
from ldae.mistakes import run_command
from ldae.names import duration
from ldae.options import option, option_parser
from ldae.probes import PROTOCOLS, Result, format_figure
from ldae.probes.baselines import TITLES
from ldae.report.tables import markdown

# Images that a run may leave in its folder, and what they show.
IMAGES = {
    "loss.png": "The loss on images that are trained on and on others, beside the mean patch's and the best linear denoiser's of "
    "single patches, and the effective rank of the features",
    "denoised.png": "Images, what the encoder sees of them under noise, and what the decoder predicts",
    "noise_levels.png": "One image under the same noise, from the weakest to the strongest, and what the decoder predicts",
    "spectrum.png": "Variance of the patches along every principal component",
    "filters.png": "The leading principal components of the patches: the axes of the latent space",
}

INTRODUCTION = """\
A vision transformer that learned visual features without labels by l-DAE, the latent denoising autoencoder of
[Deconstructing Denoising Diffusion Models for Self-Supervised Learning](https://arxiv.org/abs/2401.14404): noise is
added to images in a linear latent space of their patches, the noisy latent is turned back into an image, and the
network predicts the original image. The encoder's output on clean images is the representation.
"""

BASELINE = """\
{architecture} of transformers, trained like an l-DAE to be compared with it.
"""

PLACE = """\
In place of `{model_id}`, give the path of this folder, or the name that it has on the Hub.

"""

USE = """\
```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline

extract = pipeline("image-feature-extraction", model="{model_id}", trust_remote_code=True)
features = extract("image.jpg", pool=True)  # {hidden_size} numbers: the mean over the patches

processor = AutoImageProcessor.from_pretrained("{model_id}", trust_remote_code=True)
model = AutoModel.from_pretrained("{model_id}", trust_remote_code=True)
outputs = model(**processor(Image.open("image.jpg"), return_tensors="pt"))
outputs.last_hidden_state  # a vector for each patch
outputs.pooler_output  # their mean
```

The same folder serves `AutoModelForPreTraining` (with the decoder and the loss), `AutoModelForImageClassification` (for
fine-tuning) and, from the Hub only, `AutoBackbone` (feature maps for detection and segmentation).
"""

LIMITS = """\
- The features are for further training or for comparing images: the model names nothing and describes nothing.
- It knows the kind of images it was trained on, with whatever bias they hold; on others it is unmeasured. It has not
  been examined for any use that concerns people.
- It takes images of {height} × {width} pixels in [-1, 1], which the image processor sees to; for other sizes, multiples
  of the patch, pass `interpolate_pos_encoding=True`.
- The reconstruction is a means of training, not a generator of images.
"""

LICENCE = """\
The weights and the code are under Apache-2.0. The images that it was trained on have licences of their own.
"""

CITATION = """\
```bibtex
@article{chen2024deconstructing,
  title   = {Deconstructing Denoising Diffusion Models for Self-Supervised Learning},
  author  = {Chen, Xinlei and Liu, Zhuang and Xie, Saining and He, Kaiming},
  journal = {arXiv preprint arXiv:2401.14404},
  year    = {2024}
}
```
"""


@dataclass
class CardArguments:
    model: str = option(MISSING, "The Hub folder.")
    hub_model_id: str | None = option(None, "The model's name on the Hub; by default the folder's name.")
    data_name: str | None = option(
        None, "What the card calls the images of the training; by default as the results do."
    )
    output: str | None = option(None, "File of the card; by default README.md in the folder.")


def write_card(
    folder: str | Path, repo_id: str | None = None, output: str | Path | None = None, data_name: str | None = None
) -> Path:
    """Writes the model card of a Hub folder and returns its path.

    Args:
        folder: a folder as `save_hub_folder` makes it, with files of its training and probes in `results/`.
        repo_id: the model's name on the Hub, which the card's examples load; by default the folder's name.
        output: where the card goes, with copies of its images and results beside it; by default `README.md` in the folder.
        data_name: what the card calls the images that the model was trained on, and the same images where they were probed; by
            default as the results do.

    Raises:
        FileNotFoundError: if `folder` holds no `config.json`.
    """
    folder = Path(folder)
    output = folder / "README.md" if output is None else Path(output)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no config.json; give the folder of a run that has ended")
    config = read_json(folder / "config.json")
    results = {path: read_json(path) for path in sorted((folder / "results").glob("*.json"))}
    training = next((result for result in results.values() if result.get("kind") == "train"), None)
    probes = {path.relative_to(folder): result for path, result in results.items() if result.get("kind") == "probe"}
    if training:
        _name_alike(training, probes.values(), data_name)
    images = [name for name in IMAGES if (folder / name).is_file()]

    model_id = repo_id or folder.resolve().name
    is_ldae = config["model_type"] == "ldae"
    height, width = pair(config["image_size"])
    parts = {
        f"# {model_id.split('/')[-1]}": INTRODUCTION
        if is_ldae
        else BASELINE.format(architecture=config["architectures"][0]),
        "": "\n".join(f"![{IMAGES[name]}]({name})\n\n*{IMAGES[name]}.*\n" for name in images),
        "## Use": is_ldae and (PLACE.format(model_id=model_id) if repo_id is None else "") + _use(model_id, config),
        "## Results": _results(probes),
        "## Model": is_ldae and _model(AutoConfig.from_pretrained(folder, trust_remote_code=False)),
        "## Training": training and _training(training),
        "## Limits": is_ldae and LIMITS.format(height=height, width=width),
        "## Licence": is_ldae and LICENCE,
        "## Citation": is_ldae and CITATION,
    }
    text = "\n".join(f"{title}\n\n{part}".lstrip() for title, part in parts.items() if part)
    card = ModelCard(f"---\n{_metadata(model_id, is_ldae, training, probes).to_yaml()}\n---\n\n{text}")
    output.parent.mkdir(parents=True, exist_ok=True)
    card.save(output)
    if output.parent.resolve() != folder.resolve():
        for path in [*map(Path, images), *(path.relative_to(folder) for path in results)]:
            (output.parent / path).parent.mkdir(exist_ok=True)
            shutil.copy(folder / path, output.parent / path)
    return output


def _name_alike(training: Result, probes: Iterable[Result], data_name: str | None):
    """Gives the images of the training their name, and those of the probes that are the same, by their fingerprint."""
    data = training["data"]
    data["name"] = data_name or data["name"]
    for probe in probes:
        if probe["data"]["fingerprint"].startswith(data["fingerprint"]):
            probe["data"]["name"] = data["name"]


def _use(model_id: str, config: dict[str, Any]) -> str:
    text = USE.format(model_id=model_id, hidden_size=config["hidden_size"])
    if "auto_map" in config:
        return text
    # the folder has no code of its own, so the installed package has to bring it
    text = text.replace(", trust_remote_code=True", "")
    return text.replace("```python\n", "```python\nimport ldae  # registers l-DAE with transformers\n")


def _metadata(model_id: str, is_ldae: bool, training: Result | None, probes: dict[Path, Result]) -> ModelCardData:
    evaluations = [
        EvalResult(
            task_type="image-classification",
            dataset_type=probe["data"]["name"],
            dataset_name=probe["data"]["name"],
            dataset_split="validation",
            metric_type=PROTOCOLS[name].metric,
            metric_name=f"{PROTOCOLS[name].title}: {PROTOCOLS[name].metric} (%), seed {probe['seed']}",
            metric_value=figures[PROTOCOLS[name].metric],
        )
        for probe in probes.values()
        for name, figures in probe["protocols"].items()
    ]
    return ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["vision", "self-supervised-learning"]
        + (["ldae", "denoising-autoencoder", "arxiv:2401.14404"] if is_ldae else []),
        datasets=[training["data"]["hub_id"]] if training and training["data"].get("hub_id") else None,
        metrics=["accuracy"] if evaluations else None,
        model_name=model_id.split("/")[-1],
        eval_results=evaluations or None,
    )


def _results(probes: dict[Path, Result]) -> str:
    """The table of all probes, with a column for each baseline that one of them measured, and what the rows mean."""
    if not probes:
        return "This model has not been evaluated yet.\n"
    measured = {key: title for key, title in TITLES.items() if any(probe.get(key) for probe in probes.values())}
    columns = ["Protocol", "This model", *(title[0].upper() + title[1:] for title in measured.values())]
    columns += ["Data", "Seed", "File"]
    rows: list[dict[str, Any]] = []
    notes = []
    for path, probe in probes.items():
        data = probe["data"]
        for name, figures in probe["protocols"].items():
            accuracies = [figures, *(probe.get(key, {}).get(name) for key in measured)]
            shown = [format_figure(name, accuracy) for accuracy in accuracies]
            file = f"[{path.name}]({path.as_posix()})"
            row = [PROTOCOLS[name].title, *shown, data["name"], probe["seed"], file]
            rows.append(dict(zip(columns, row, strict=True)))
            notes.append(f"- {PROTOCOLS[name].title}: {figures['description']}\n")
        for key, title in measured.items():
            if probe.get(key):
                notes.append(f"- {title[0].upper() + title[1:]}: {probe[key]['description']}\n")
        notes.append(
            f"- {data['name']} (fingerprint `{data['fingerprint']}`): {data['num_train']:,} training and "
            f"{data['num_validation']:,} validation images of {data['num_classes']} classes\n"
        )
    beside = (
        "Beside the model stand baselines\nthat have learned nothing.\n"
        if measured
        else "No baseline was\nmeasured beside the model.\n"
    )
    table = markdown(rows, left=columns)
    head = f"In percent, on validation images, ± one standard error. {beside}"
    return f"{head}\n{table}\n\n{''.join(dict.fromkeys(notes))}"


def _model(config: PreTrainedConfig) -> str:
    (height, width), (p, q) = pair(config.image_size), pair(config.patch_size)
    counts, decoder = count_encoder(config), config.decoder_num_hidden_layers
    facts = {
        "Input": f"{height} × {width} pixels, {config.num_channels} channels, patches of {p} × {q}",
        "Encoder": f"{config.num_hidden_layers} blocks of width {config.hidden_size}, {config.num_attention_heads} heads, "
        "no class token",
        "Parameters of the encoder (M)": f"{counts.parameters / 1e6:.1f}",
        "GMACs of an image": f"{counts.macs / 1e9:.2f}, those of attention among them",
        "Activations of an image (M)": f"{counts.activations / 1e6:.1f}, which linear layers put out",
        "Decoder": f"{decoder} blocks of the same width",
        "Latent space": f"{config.latent_dim} of a patch's {config.num_channels * p * q} dimensions "
        f"(`{config.tokenizer_type}`), scaling `{config.latent_scaling}`",
        "Noise": f"`{config.noise_schedule}` over {config.num_train_timesteps} timesteps; "
        f"features at t = {config.feature_timestep}",
    }
    if config.keep_ratio < 1:
        tokens, block = (height // p) * (width // q), config.mask_block**2
        kept = block * max(1, round(config.keep_ratio * tokens / block))
        facts["Tokens"] = f"the encoder sees {kept} of {tokens} in training, and all in use"
    if config.predicts_image:
        latent = config.loss_units == "latent"
        facts["Loss"] = f"in the units of the {'scaled latents' if latent else 'pixels (equation 4)'}"
    return _facts(facts)


def _training(result: Result) -> str:
    data = result["data"]
    number = f"{data['num_images']:,} images" if data["num_images"] else "streamed"
    labels = "with labels" if result.get("uses_labels") else "no labels"
    epochs = f", {result['epochs']:.1f} epochs" if result["epochs"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    facts = {
        "Data": f"{data['name']}, {number}, {labels} (fingerprint `{data['fingerprint']}`)",
        "Seen": f"{result['images_seen']:,} images in {result['steps']:,} steps{epochs}",
        "Final loss": f"{result['loss']:.4f}",
        **_held_out(result.get("held_out")),
        "Seed": result["seed"],
        "Cost": _cost(result),
        **({"Energy": estimate} if (estimate := energy(result)) else {}),
        "Hardware": _hardware(result),
        "Ended": result["date"],
        "Code": f"commit `{result['commit']}`" if result.get("commit") else "commit not recorded",
        "Versions": versions,
    }
    options = yaml.safe_dump(result["arguments"], sort_keys=True)
    return f"{_facts(facts)}\n<details><summary>All options</summary>\n\n```yaml\n{options}```\n\n</details>\n"


def _held_out(result: Result | None) -> dict[str, str]:
    """What a run has reached on images that it was not trained on, if it was measured."""
    if result is None:
        return {}
    return {
        "Held-out loss": f"{result['loss']:.4f} on {result['images']:,} images {result['origin']}; the mean patch gives "
        f"{result['loss_of_mean']:.4f}, the best linear denoiser of single patches {result['loss_of_linear']:.4f}",
        "Effective rank": f"{result['effective_rank']:.1f} of {result['largest_rank']} at most, of those images' features",
    }


def _cost(result: Result) -> str:
    """The time of a run and its images a second."""
    clock = " of the processor" if result.get("clock") == "processor" else ""
    return f"{duration(result['seconds'])}{clock}, {result['images_seen'] / result['seconds']:,.0f} images/s"


def _hardware(result: Result) -> str:
    """What a run was made on, each of its processes with the same."""
    hardware, processes = result["hardware"], result.get("num_processes", 1)
    name = hardware["gpus"][0] if hardware["gpus"] else f"{hardware['processor']}, {hardware['threads']} thread(s)"
    precision = result.get("mixed_precision", "")
    precision = "float32" if precision == "no" else precision
    return ", ".join(filter(None, [f"{processes} × {name}" if processes > 1 else name, precision]))


def _facts(facts: dict[str, Any]) -> str:
    return markdown([{"": name, " ": fact} for name, fact in facts.items()], left=("", " ")) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Runs a command line."""
    parser = option_parser(CardArguments, description="Writes the model card of a Hub folder from its own files.")
    (options,) = parser.parse_args_into_dataclasses(argv)
    if options.output is not None:
        validate_writable(Path(options.output).parent, "--output")
    print(write_card(options.model, options.hub_model_id, options.output, options.data_name))


if __name__ == "__main__":
    run_command(main)
