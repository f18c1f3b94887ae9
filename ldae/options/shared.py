"""The options that several commands share."""

from dataclasses import dataclass
from typing import Any, Literal

from ldae.options.declaration import option

HUB = "Hub"


@dataclass(kw_only=True)
class ColumnArguments:
    """Where a data set has its images and labels."""

    image_column: str | None = option(None, "Column of the images; by default the first that holds images.")
    label_column: str | None = option(None, "Column of the labels; by default 'label' or the first that holds classes.")

    @property
    def columns(self) -> dict[str, Any]:
        """The same, as keyword arguments of `load_examples`."""
        return {"image_column": self.image_column, "label_column": self.label_column}


@dataclass(kw_only=True)
class EncodingArguments(ColumnArguments):
    """How an encoder is run over the images of a data set."""

    batch_size: int = option(256, "Images in a forward pass of one process.", minimum=1)
    num_workers: int = option(0, "Processes that read images, for each process of accelerate.", minimum=0)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None,
        "Precision of the encoder, as accelerate's; by default bf16 where it is faster, unless accelerate's configuration says "
        "another.",
    )
    trust_remote_code: bool = option(False, "Run the code that comes with the model. Only for a model that you trust.")


@dataclass(kw_only=True)
class HubArguments:
    """Where on the Hub a model goes."""

    hub_model_id: str | None = option(
        None, "Repository to upload to, as org/name; by default the name of the folder in your own account.", group=HUB
    )
    hub_branch: str | None = option(
        None, "Branch to upload to, which is made if there is none; by default main.", group=HUB
    )
    hub_tag: str | None = option(None, "Tag that the upload's commit is given. A tag that is there stays.", group=HUB)
    hub_private: bool = option(
        False, "Make a new repository private. Nothing is uploaded to one that is public.", group=HUB
    )
