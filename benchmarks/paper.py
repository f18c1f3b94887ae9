"""What the paper's runs would cost on eight GPUs, on paper: from the utilization that a step was measured to reach on one.

python -m benchmarks.paper    # puts the table into README.md, and into model_cards/README.md
"""

from pathlib import Path

from benchmarks.contenders import Contender, flops_per_image
from ldae import LDAEConfig
from ldae.files import read_json
from ldae.hub.energy import published_watts
from ldae.report.tables import fill, markdown

IMAGES, GPUS = 1_281_167, 8  # of ImageNet-1k; and the number of cards
EPOCHS = (400, 1600)  # of the paper's ablation and of its last table
RESULTS = Path(__file__).with_name("results")
MEASURED = {"base": "step-gpu-base", "half-large": "step-gpu-half-large", "large": "step-gpu-half-large"}
NAMES = {"base": "ViT-B", "half-large": "half of ViT-L", "large": "ViT-L"}


def hours(size: str, result: dict, epochs: int) -> float:
    """Hours that a named size takes for so many epochs, if `GPUS` cards reach the utilization of `result` each.

    Args:
        size: of the encoder; the decoder is as large.
        result: of `benchmarks.step` on one GPU, with compiled blocks.
    """
    measured = result["contenders"]["l-DAE, sdpa, compiled"]
    given = {name: result["arguments"][name] for name in ("image_size", "patch_size")}
    flops = flops_per_image(Contender("l-DAE"), LDAEConfig.from_size(size, latent_dim=16, **given))
    rate = measured["flops"] / measured["median"]  # floating-point operations a second
    return epochs * IMAGES * flops / (GPUS * rate) / 3600


def table(results: Path = RESULTS) -> str:
    """The table as markdown."""
    rows = []
    for size, name in MEASURED.items():
        result = read_json(results / f"{name}.json")
        watts = GPUS * (published_watts(result["device"]) or 0)
        costs = {}
        for epochs in EPOCHS:
            time = hours(size, result, epochs)
            costs[f"{epochs} epochs"] = f"{time:.0f} hours, {time * watts / 1000:.0f} kWh"
        device = f"{GPUS} × {result['device']}"
        rows.append({"encoder and decoder": NAMES[size], "on": device, **costs})
    return markdown(rows, left=("encoder and decoder", "on"))


if __name__ == "__main__":
    text = table()
    for folder in ("benchmarks", "model_cards"):
        fill(Path(__file__).parents[1] / folder / "README.md", "paper", text)
    print(text)
