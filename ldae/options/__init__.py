"""The options of the commands. Each is declared once, with its type, its bounds, its group and its help.

Dataclasses hold the options (`option`). The command line (`option_parser`), recipes (`read_recipe`) and Python (`validate`)
read that one declaration, and so does whoever asks which options define a run (`RUN_DEFINING`).
"""

from ldae.options.command import parse_arguments, parse_keywords
from ldae.options.declaration import domains, option, validate
from ldae.options.model import ModelArguments
from ldae.options.parser import OptionParser, names_given, option_parser
from ldae.options.recipes import read_recipe, recipe_path
from ldae.options.shared import EncodingArguments, HubArguments
from ldae.options.training import RUN_DEFINING, DataArguments, TrainArguments, default_learning_rate

__all__ = [
    "RUN_DEFINING",
    "DataArguments",
    "EncodingArguments",
    "HubArguments",
    "ModelArguments",
    "OptionParser",
    "TrainArguments",
    "default_learning_rate",
    "domains",
    "names_given",
    "option",
    "option_parser",
    "parse_arguments",
    "parse_keywords",
    "read_recipe",
    "recipe_path",
    "validate",
]
