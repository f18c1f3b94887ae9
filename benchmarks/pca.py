"""The fit of PCA beside scikit-learn's, on the same patches in one run: its time, and the error of its variances.

    python -m benchmarks.pca --data FOLDER --output benchmarks/results/pca.json
    python -m benchmarks.pca --table benchmarks/results/pca.json    # puts the table into README.md

The patches lie in memory as scikit-learn wants them. The tokenizer is given images, and cuts its patches within the time.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import sklearn
import torch
from sklearn.decomposition import PCA, IncrementalPCA
from threadpoolctl import threadpool_limits

from benchmarks import command
from benchmarks.device import in_rounds, ratio
from ldae import LDAEConfig
from ldae.data.images import ImageDataset, to_pixel_values
from ldae.data.order import evaluation_loader
from ldae.data.sources import load_examples
from ldae.options import option
from ldae.report.tables import markdown
from tokenizers_ldae import patchify

OURS = "ldae"


@dataclass(kw_only=True)
class PCASpeedArguments(command.FileArguments):
    """Time the fit of PCA to patches."""

    data: str = option("photos", "'photos', a folder, parquet files or a Hub data set; its training split is read.")
    image_size: int = option(64, "Side of the images in pixels.", minimum=1)
    patch_sizes: list[int] = option([8, 16], "Sides of the patches in pixels.", minimum=1)
    num_patches: int = option(
        200_000, "Patches that PCA is fitted to. Images of a small set are taken several times.", minimum=1
    )
    batch_size: int = option(64, "Images in a batch of the tokenizer's.", minimum=1)
    rounds: int = option(5, "Timed rounds of each contender.", minimum=1)
    threads: int = option(1, "CPU threads.", minimum=1)


def contenders(images: torch.Tensor, patches: np.ndarray, config: LDAEConfig, batch_size: int) -> dict[str, Callable]:
    """What is timed, by its name: each fits PCA and returns the variances (D,), largest first.

    Args:
        images: (B, C, H, W) in [-1, 1], which are given to the tokenizer in batches.
        patches: float32 (n, D), the patches of these images.
    """
    wide = patches.astype(np.float64)

    def ours() -> np.ndarray:
        return config.tokenizer_class(config).fit(images.split(batch_size), config).spectrum.numpy()

    def theirs(estimator: PCA | IncrementalPCA, patches: np.ndarray) -> np.ndarray:
        return estimator.fit(patches).explained_variance_ * (1 - 1 / len(patches))  # they divide by n - 1

    return {
        OURS: ours,
        "PCA(covariance_eigh), float32": lambda: theirs(PCA(svd_solver="covariance_eigh"), patches),
        "PCA(covariance_eigh), float64": lambda: theirs(PCA(svd_solver="covariance_eigh"), wide),
        "IncrementalPCA": lambda: theirs(IncrementalPCA(), patches),
    }


def exact_variances(patches: np.ndarray) -> np.ndarray:
    """The variances (D,) along the principal components of patches (n, D), largest first, in float64."""
    return np.linalg.eigvalsh(np.cov(patches, rowvar=False, bias=True, dtype=np.float64))[::-1]


def measure(arguments: PCASpeedArguments) -> Iterator[dict]:
    """Rounds of all contenders in turn for one size of the patches, then for the next."""
    torch.set_num_threads(arguments.threads)
    examples = load_examples(arguments.data, "train")
    result: dict = {"benchmark": "pca", "scikit-learn": sklearn.__version__, "sizes": {}}
    for patch_size in arguments.patch_sizes:
        config = LDAEConfig(image_size=arguments.image_size, patch_size=patch_size)
        rows, columns = config.grid_hw
        num_images = -(-arguments.num_patches // (rows * columns))
        dataset = ImageDataset(examples.select([i % len(examples) for i in range(num_images)]), config.image_hw)
        images = torch.cat([to_pixel_values(batch["pixel_values"]) for batch in evaluation_loader(dataset, 256)])
        patches = patchify(images, config.patch_hw).flatten(0, 1).numpy()
        exact = exact_variances(patches)
        runs = contenders(images, patches, config, arguments.batch_size)
        with threadpool_limits(arguments.threads):  # NumPy's too
            errors = {name: float(np.abs(run() / exact - 1).max()) for name, run in runs.items()}
            seconds = in_rounds(runs, arguments.rounds)
        shape, smallest = list(patches.shape), float(exact[-1] / exact.mean())
        result["sizes"][patch_size] = {"shape": shape, "smallest": smallest, "errors": errors, "seconds": seconds}
        yield result


def table(result: dict) -> str:
    """A result as markdown."""
    arguments, versions = result["arguments"], result["versions"]
    lines = [
        f"{result['hardware']['processor']}, {arguments['threads']} CPU thread(s), {arguments['rounds']} rounds; torch "
        f"{versions['torch']}, scikit-learn {result['scikit-learn']}; {result['date'][:10]}."
    ]
    for patch_size, found in result["sizes"].items():
        n, dim = found["shape"]
        title = f"{n:,} patches of {patch_size} px, D = {dim}"
        rows = [
            {
                title: name,
                "seconds": f"{statistics.median(times):.2f}",
                "ldae / it": f"{ratio(found['seconds'][OURS], times):.2f}",
                "error": f"{found['errors'][name]:.0e}",
            }
            for name, times in found["seconds"].items()
        ]
        lines += ["", markdown(rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(PCASpeedArguments, measure, table)
