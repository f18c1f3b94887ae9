"""The README of an exported folder."""

from huggingface_hub import ModelCardData

from folding_ldae import PlainViT

LIBRARIES = {"vitdet": "transformers"}  # where the Hub's name is another


def card(plain: PlainViT, to: str, opens: str, description: str) -> str:
    """Markdown that says what the folder holds, what it takes and how it is opened."""
    about = ModelCardData(
        library_name=LIBRARIES.get(to, to),
        pipeline_tag="image-classification" if plain.classifies else "image-feature-extraction",
        tags=["ldae"],
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
