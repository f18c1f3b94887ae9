"""Install with `pip install -e .`; tools are configured in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
ONNX = ["onnx>=1.19", "onnxscript>=0.6", "onnxruntime>=1.29"]


class BuildWithRecipes(build_py):
    """Puts the recipes into the package, but for an editable install, which finds those of the checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "ldae/recipes")
            folder.mkdir(exist_ok=True)
            for recipe in (ROOT / "recipes").glob("*.yaml"):
                shutil.copy(recipe, folder)


setup(
    name="ldae",
    version="0.1.0",
    description="l-DAE, the latent denoising autoencoder: self-supervised pre-training and features, on transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: {version}" for version in ("3.11", "3.13")],
    packages=find_packages(include=["ldae", "ldae.*"]),
    # An editable install then names the checkout on Python's path. The finder that setuptools writes otherwise comes too late
    # for a script beside a checkout that is called ldae: the script would import that folder, as an empty package.
    package_dir={"": "."},
    cmdclass={"build_py": BuildWithRecipes},
    py_modules=sorted(path.stem for path in ROOT.glob("*_ldae.py")),
    entry_points={
        "console_scripts": [
            "ldae-train = train_ldae:command",
            "ldae-probe = probe_ldae:command",
            "ldae-push = ldae.hub.command:command",
            "ldae-features = ldae.features.command:command",
            "ldae-export = ldae.export.command:command",
        ]
    },
    # tests/versions.py tries the lowest of these versions, all at once; CONTRIBUTING.md says which tests passed.
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "transformers>=5.17",
        "diffusers>=0.42",
        "datasets>=5.2",
        "accelerate>=1.15",
        "huggingface-hub>=1.33",
        "evaluate>=0.4.6",
        "safetensors>=0.8",
        "torchmetrics>=1.9",
        # little is asked of these
        "filelock>=4.0",
        "numpy>=2.0",  # pyarrow needs it, which datasets needs
        "pandas>=2.2.2",
        "pillow>=11",
        "matplotlib>=3.9",
        "tensorboard>=2.18",
        "tqdm>=4.66.3",
        "psutil>=5.9.4",
        "pyyaml>=6.0",
        # the photographs of the embedded data set
        "scikit-image>=0.24",
        "scikit-learn>=1.5",
        "joblib>=1.3",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "parameterized>=0.9",
            "ruff>=0.14",
            "mypy>=2.4",
            "types-PyYAML>=6.0",
            "timm>=1.0.31",
            "lightly>=1.6",
            "pillow-heif>=0.22",
            *ONNX,
            "faiss-cpu>=1.9",
            "setuptools>=77.0.1",
            "nbclient>=0.10",
            "ipykernel>=6.29",
        ],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6"],
        "timm": ["timm>=1.0.31"],  # its encoders in ldae-probe and ldae-features, and ldae-export --to timm
        "onnx": ONNX,  # ldae-export --to onnx
        "heic": ["pillow-heif>=0.22"],  # images as phones make them
        "baselines": ["lightly>=1.6"],  # experiments/baselines/moco_v3.py
        "demo": ["gradio>=6.31", "pillow<13"],  # app.py; no Gradio takes Pillow 13 yet
        "trackio": ["trackio>=0.10"],
        "fid": ["torch-fidelity>=0.4"],  # Inception for python -m ldae.generation; its weights are downloaded once
    },
)
