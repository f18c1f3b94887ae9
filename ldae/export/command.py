"""Writes an encoder as a plain ViT, which other libraries open without this package.

python -m ldae.export --model FOLDER --output_dir OUT               # transformers' I-JEPA
python -m ldae.export --model FOLDER --output_dir OUT --to timm     # or vitdet, or onnx
"""

from dataclasses import MISSING, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from folding_ldae import PlainViT, plain_vit
from ldae.export.card import card, licence_of
from ldae.files import replace_files, validate_writable
from ldae.loading import load_config, load_model
from ldae.mistakes import run_command
from ldae.names import short_name
from ldae.options import option, option_parser
from modeling_ldae import LDAEForImageClassification, LDAEModel

HOMES = {  # and the optional libraries that writing each one needs
    "transformers": (),
    "timm": ("timm",),
    "vitdet": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}
CLASS_TOKEN = ("vit", "dinov2", "deit", "vit_mae")  # transformers' ViTs that are no home


@dataclass
class ExportArguments:
    model: str = option(MISSING, "Folder or Hub id of an l-DAE, or of a classifier that was made of one.")
    output_dir: str = option(MISSING, "Folder to write; it must be empty or not there.")
    to: str = option(
        "transformers",
        "Library that opens it: transformers (its I-JEPA), timm, vitdet (of transformers, for dense tasks) or onnx.",
    )
    timestep: int | None = option(None, "Timestep; by default the model's feature_timestep.", minimum=0)
    image_size: list[int] | None = option(
        None, "Side of the images in pixels, or height and width; by default the model's. onnx takes any.", minimum=1
    )
    int8: bool = option(False, "Also write model.int8.onnx, with weights of 8 bits.")

    @property
    def folder(self) -> Path:
        """The folder to write."""
        return Path(self.output_dir).expanduser()


def parse_arguments(argv: list[str] | None = None) -> ExportArguments:
    """The options of a command line.

    Raises:
        SystemExit: for an unknown option or value, named on stderr.
        FileExistsError: for an output_dir that holds files.
        ValueError: for a home that l-DAE does not fit, options that contradict each other, or an output_dir that cannot be
            written to.
        ImportError: for a library that is not installed.
    """
    (options,) = option_parser(ExportArguments, description=__doc__.split("\n")[0]).parse_args_into_dataclasses(argv)
    if options.to in CLASS_TOKEN:
        raise ValueError(
            f"--to {options.to}: that ViT has a class token, which the patches would attend to; l-DAE has none. "
            "--to transformers writes I-JEPA, the same ViT without it"
        )
    if options.to not in HOMES:
        raise ValueError(f"--to must be one of {', '.join(HOMES)}, got {options.to!r}")
    for library in HOMES[options.to]:
        if find_spec(library) is None:
            raise ImportError(f"--to {options.to} needs {library}: in a checkout, pip install -e '.[{options.to}]'")
    if options.to == "onnx" and options.image_size is not None:
        raise ValueError("--image_size says nothing to --to onnx, whose graph takes images of any size; leave it out")
    if options.to != "onnx" and options.int8:
        raise ValueError(f"--int8 is for --to onnx, got --to {options.to}")
    if options.image_size is not None and len(options.image_size) > 2:
        raise ValueError(f"--image_size takes a side, or height and width, got {len(options.image_size)} numbers")
    if options.folder.is_dir() and any(options.folder.iterdir()):
        raise FileExistsError(f"{options.output_dir} holds files; remove them or choose another --output_dir")
    validate_writable(options.folder)
    return options


def load(source: str) -> PreTrainedModel:
    """The encoder of a folder or Hub id, with its classifier if it has one.

    Raises:
        FileNotFoundError: if there is no such l-DAE.
        ValueError: if weights are missing or not finite, or files of the folder are not those that were written.
    """
    classifies = "LDAEForImageClassification" in (load_config(source).architectures or [])
    model_class = LDAEForImageClassification if classifies else LDAEModel
    return load_model(source, model_class=model_class)


def export(
    plain: PlainViT, folder: Path, to: str, description: str, int8: bool = False, licence: dict[str, Any] | None = None
):
    """Writes a plain ViT for the library `to`, with a README.md that begins with `description`.

    Args:
        licence: of the model, as `ldae.export.card.licence_of` gives it.

    Raises:
        ValueError: for what that library cannot compute exactly.
    """
    home = import_module(f"ldae.export.as_{to}")
    with replace_files(folder) as partial:
        home.save(plain, partial, **({"int8": int8} if to == "onnx" else {}))
        (partial / "README.md").write_text(card(plain, to, home.OPENS, description, licence or {}))


def main(argv: list[str] | None = None) -> None:
    """Writes the folder.

    Raises:
        FileExistsError, FileNotFoundError, ImportError, ValueError: as `parse_arguments`, `load` and `export` do.
    """
    options = parse_arguments(argv)
    model = load(options.model)
    size = options.image_size
    plain = plain_vit(model, options.timestep, size[0] if size is not None and len(size) == 1 else size)
    timestep = model.config.feature_timestep if options.timestep is None else options.timestep
    description = f"The encoder of the l-DAE {short_name(options.model)} at timestep {timestep}"
    licence = licence_of(options.model)
    export(plain, options.folder, options.to, description, options.int8, licence)
    if not licence:
        print("The model has no card that names its licence, so README.md names none.")
    print(f"{options.model} at timestep {timestep} for {options.to}: {options.folder}")


def command() -> None:
    """The command `ldae-export`."""
    run_command(main)
