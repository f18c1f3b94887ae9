"""An ablation of tiny models, and the results that its runs would leave."""

from pathlib import Path

from experiments.ablation import run, rungs
from ldae import LDAEConfig
from ldae.options import parse_arguments
from ldae.report.results import save_result

TINY = [
    f"--{option}"
    for option in (
        "image_size=32", "patch_size=8", "hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2",
        "per_device_batch_size=4", "max_steps=2", "tokenizer_epochs=1", "checkpointing_steps=0", "knn_steps=0",
        "image_steps=0", 'autoencoder={"block_out_channels": [8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}',
    )
]  # fmt: skip


def make_ablation(recipe, some, output_dir=Path("runs"), seeds=(3,), workers=2, **kwargs):
    model_args, data_args, _ = parse_arguments([recipe, *TINY])
    given = run.AblationArguments(recipe, str(output_dir), seeds=list(seeds), workers=workers, **kwargs)
    return run.Ablation(given, some, model_args.config(), data_args, TINY)


def made(folder, name, *accuracies, error=0.5, config=(), thumbnail=20.0, **arguments):
    """The results that runs of a rung would leave, one for each seed; their best baseline is the thumbnail, if any."""
    rung = rungs.RUNGS[name]
    given = {"crop": "center", **rungs.options(rung), **arguments}
    fields = LDAEConfig.from_size("tiny", num_hidden_layers=4, decoder_num_hidden_layers=2).to_dict()
    fields |= {k: v for k, v in given.items() if k in LDAEConfig.__annotations__}
    fields |= {"num_classes": 10 if given["class_conditional"] else None, **dict(config)}
    data = {"name": "x", "num_images": 1234, "fingerprint": "f"}
    for seed, accuracy in enumerate(accuracies):
        results = folder / f"{name}-seed{seed}/results"
        figures = {"linear-fast": {"accuracy": accuracy, "standard_error": error, "seconds": 15}}
        floor = {"linear-fast": {"accuracy": 15.0, "seconds": 15}}
        probe = {"kind": "probe", "data": data, "protocols": figures, "floor": floor}
        if thumbnail is not None:
            probe["thumbnail"] = {"linear-fast": {"accuracy": thumbnail, "seconds": 0}}
        save_result(results / "probe-x.json", probe)
        if (tokenizer := rungs.tokenizer_of(rung)) is not None:
            given["tokenizer"] = str(folder / f"tokenizers/{tokenizer}-seed{seed}")
        train = {"kind": "train", "config": fields, "arguments": given, "epochs": 3.0, "seconds": 60, "seed": seed}
        save_result(results / "train.json", {**train, "data": data, "images_seen": 3702})


def made_tokenizer(folder, rung, images_seen, **arguments):
    """The results that the tokenizers of two seeds would leave."""
    train = {"kind": "train", "arguments": arguments, "config": {}, "images_seen": images_seen}
    for seed in (0, 1):
        name = rungs.folder_name(rungs.tokenizer_of(rungs.RUNGS[rung]), seed)
        save_result(folder / f"tokenizers/{name}/results/train.json", {**train, "data": {"fingerprint": "f"}})
