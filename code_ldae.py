"""The code that a model's folder carries, so that it opens with `trust_remote_code=True` where the package is not installed."""

import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

# Where transformers finds the class of each Auto class in such a folder.
AUTO_MAP = {
    "AutoConfig": "configuration_ldae.LDAEConfig",
    "AutoModel": "modeling_ldae.LDAEModel",
    "AutoModelForPreTraining": "modeling_ldae.LDAEForPreTraining",
    "AutoModelForImageClassification": "modeling_ldae.LDAEForImageClassification",
    "AutoBackbone": "modeling_ldae.LDAEBackbone",
}

# The pipelines that such a folder brings, as `custom_pipelines` of a configuration.
CUSTOM_PIPELINES: dict[str, dict] = {
    "image-feature-extraction": {"impl": "pipeline_ldae.LDAEImageFeatureExtractionPipeline", "pt": ["AutoModel"]},
    "image-classification": {
        "impl": "pipeline_ldae.LDAEImageClassificationPipeline",
        "pt": ["AutoModelForImageClassification"],
    },
}

ROOTS = ("modeling_ldae.py", "pipeline_ldae.py", "image_processing_ldae.py")


def code_files() -> list[Path]:
    """The modules that such a folder carries: `ROOTS`, and every sibling that they import, directly or not.

    They are found as transformers finds them. There are none where a folder was opened for its configuration alone, since
    transformers then takes no other code out of it.
    """
    roots = [path for name in ROOTS if (path := Path(__file__).with_name(name)).is_file()]
    if ROOTS[0] not in {path.name for path in roots}:
        return []
    return sorted({*roots, *(Path(file) for root in roots for file in get_relative_import_files(root))})


def copy_code(folder: str | Path) -> bool:
    """Copies the code into a folder, which is made if it does not exist. Returns whether there is any."""
    files = code_files()
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.parent.resolve() != Path(folder).resolve():
            shutil.copy(file, folder)
    return bool(files)
