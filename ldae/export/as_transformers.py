"""transformers' I-JEPA, a ViT without class token. `AutoModel` and pipelines open it."""

from pathlib import Path

from folding_ldae import PlainViT, as_ijepa
from ldae.export.processor import save_processor

OPENS = """from transformers import {auto}

model = {auto}.from_pretrained("FOLDER")"""


def save(plain: PlainViT, folder: Path):
    """Writes the model in float32, and an image processor.

    Raises:
        ValueError: as `as_ijepa` does.
    """
    as_ijepa(plain).float().save_pretrained(folder)
    save_processor(plain, folder)
