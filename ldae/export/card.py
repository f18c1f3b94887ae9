"""The README of an exported folder."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError

from folding_ldae import PlainViT
from ldae.retries import retried

LIBRARIES = {"vitdet": "transformers"}  # where the Hub's name is another
LICENCE = ("license", "license_name", "license_link")  # what a card's metadata may say of it


def licence_of(source: str) -> dict[str, Any]:
    """What the card of a model's folder or Hub id says of its licence, by the names of a card's metadata; {} without a card."""
    folder = Path(source).expanduser()
    file = folder / "README.md"
    if folder.is_dir() and not file.is_file():
        return {}
    try:
        source = str(file) if folder.is_dir() else source
        data = retried(lambda: ModelCard.load(source, ignore_metadata_errors=True)).data.to_dict()
    except EntryNotFoundError:
        return {}
    return {name: data[name] for name in LICENCE if data.get(name)}


def card(plain: PlainViT, to: str, opens: str, description: str, licence: dict[str, Any]) -> str:
    """Markdown that says what the folder holds, what it takes and how it is opened.

    Args:
        licence: as `licence_of` gives it.
    """
    about = ModelCardData(
        library_name=LIBRARIES.get(to, to),
        pipeline_tag="image-classification" if plain.classifies else "image-feature-extraction",
        tags=["ldae"],
        **licence,
    )
    auto = "AutoModelForImageClassification" if plain.classifies else "AutoModel"
    (height, width), channels = plain.image_hw, plain.config.num_channels
    size = "any size in multiples of the patch" if to == "onnx" else f"{height}x{width} pixels"
    return f"""---
{about.to_yaml()}
---

{description}, as a plain ViT. It computes the same to rounding.

It takes images of {channels} channels in [-1, 1], of {size}. There is no class token; the representation of an image is the
mean of its tokens.

```python
{opens.format(auto=auto)}
```
"""
