"""Uploads a model's folder to the Hub: `ldae-push --model FOLDER --hub_model_id org/name`. `--help` lists the options."""

from dataclasses import MISSING, dataclass

from ldae.hub.push import push
from ldae.mistakes import run_command
from ldae.options import HubArguments, option, option_parser


@dataclass
class PushArguments:
    model: str = option(MISSING, "Folder of a run that has ended, or another Hub folder. Other files in it stay here.")


def main(argv: list[str] | None = None) -> None:
    """Runs a command line."""
    parser = option_parser(PushArguments, HubArguments, description=(__doc__ or "").split(":")[0] + ".")
    options, hub = parser.parse_args_into_dataclasses(argv)
    print(push(options.model, hub))


def command() -> None:
    """The command `ldae-push`."""
    run_command(main)
