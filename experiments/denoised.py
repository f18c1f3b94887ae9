"""Draws what an l-DAE makes of one photograph under growing noise: the picture at the head of README.md.

python -m experiments.denoised docs/denoised.png

By default it is the small model of this repository and scikit-image's cup of coffee, which that model was not trained on.
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from PIL import Image

from ldae.data.photos import photograph_path
from ldae.files import validate_writable
from ldae.hub.folder import image_processor
from ldae.loading import load_model
from ldae.mistakes import reading, run_command
from ldae.options import option, option_parser
from ldae.report.figures import noise_levels


@dataclass
class DenoisedArguments:
    output: str = option(MISSING, "The PNG to write.", positional=True)
    model: str = option("model_cards/ldae-vit-small-tiny-imagenet64", "An l-DAE's folder or Hub id.")
    image: str = option(str(photograph_path("skimage/coffee.png")), "The photograph.")


def main(argv: list[str] | None = None):
    """Draws the picture.

    Raises:
        FileNotFoundError, ValueError: for a model or an image that cannot be read, or a picture that cannot be written.
    """
    (options,) = option_parser(DenoisedArguments, description=__doc__.split("\n")[0]).parse_args_into_dataclasses(argv)
    validate_writable(Path(options.output).parent, "output")
    model = load_model(options.model)
    with reading("--image", options.image), Image.open(options.image) as image:
        (pixel_values,) = image_processor(model.config)(image, return_tensors="pt")["pixel_values"]
    print(noise_levels(model, pixel_values, options.output))


if __name__ == "__main__":
    run_command(main)
