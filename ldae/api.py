"""One call each: `ldae.train`, `ldae.embed` and `ldae.probe` do what the commands do, with their options as keyword arguments.

Each imports what it needs when it is called, so that `import ldae` stays as fast as it is.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets


def train(
    data: str | PathLike,
    output_dir: str | PathLike | None = None,
    *,
    recipe: str | PathLike | None = None,
    **options: Any,
) -> Path | None:
    """Pre-trains an l-DAE on images without labels, as `train_ldae.py` does.

    Args:
        data: "photos", a folder of images in any nesting, a folder of parquet files, or the name of a Hub data set.
        output_dir: folder of the run, which in the end is a Hub folder; by default runs/ldae-SIZE-DATA.
        recipe: a YAML file of options, or the name of a shipped one. Options win over it.
        options: any option of `train_ldae.py --help` by its name, as in `train("photos", model_size="small", max_steps=100)`.

    Returns:
        The run's folder; None with `dry_run=True`, which makes none.

    Raises:
        TypeError: for an unknown option.
        FileExistsError, FileNotFoundError, ValueError: before any training, for what cannot work. The message names the option.
        FloatingPointError: if a loss or gradient is not finite; the last checkpoint is whole.
        SystemExit: with the status 130 or 143, after SIGINT or SIGTERM; the last step is in a checkpoint.
    """
    from ldae.options import parse_keywords
    from train_ldae import pretrain

    return pretrain(*parse_keywords(recipe, data=data, output_dir=output_dir, **options))


def embed(model: str | PathLike, data: str | PathLike, **options: Any) -> datasets.Dataset:
    """Computes the features of images, as `ldae-features` does, and keeps them in memory.

    Args:
        model: an l-DAE folder or Hub id, or any other vision encoder that transformers' AutoModel loads.
        data: as of `train`.
        options: `split`, `features` and the others of `ldae-features --help`, but for those of the files that it writes.

    Returns:
        A row for each readable image, in the data's order: `name`, relative to the data's folder; `label`, where there are
        labels; `pooled` (E), the mean of the patches, and with `features="both"` `patches` (N, E) too. Unreadable images are
        named on the screen. A column's `[:]` is a NumPy array; `to_pandas` and `add_faiss_index` are datasets' own.

    Raises:
        TypeError: for an unknown option.
        FileNotFoundError, ValueError: for a model, data or an option that cannot be, or if no image can be read.
    """
    from ldae.features import embedding
    from ldae.options import option_parser

    parser = option_parser(embedding.EmbedArguments, description="")
    (arguments,) = parser.build(parser.keywords({"model": model, "data": data, **options}))
    return embedding.embed(arguments)


def probe(model: str | PathLike, data: str | PathLike = "photos", **options: Any) -> dict[str, Any]:
    """Measures an encoder on labelled images beside its baselines, as `probe_ldae.py` does.

    Args:
        model: as of `embed`.
        data: as of `train`; a training and a validation split with labels of the same classes.
        options: any option of `probe_ldae.py --help` by its name, as in `probe(model, data, protocols="knn", knn_k=10)`.

    Returns:
        What the result's file holds; `["protocols"]["knn"]["accuracy"]` is in percent, and its "standard_error" beside it.

    Raises:
        TypeError: for an unknown option.
        FileExistsError, FileNotFoundError, ValueError: for what cannot be measured, or figures of another encoder that stand in
            the result's place. The message names the option.
    """
    from ldae.files import read_json
    from probe_ldae import parse_keywords, run

    return read_json(run(*parse_keywords(model=model, data=data, **options)))
