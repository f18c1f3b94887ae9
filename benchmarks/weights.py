"""Writes a run's model in bf16 as safetensors files of limited size: `python -m benchmarks.weights RUN FOLDER`."""

from dataclasses import MISSING, dataclass
from pathlib import Path

import torch

from ldae import LDAEForPreTraining
from ldae.mistakes import run_command
from ldae.options import option, option_parser


@dataclass
class WeightArguments:
    run: str = option(MISSING, "Folder of a run that is done.", positional=True)
    folder: str = option(MISSING, "Folder to write, with the configuration.", positional=True)
    max_shard_size: str = option("15MB", "Size of the largest file.")


def main(argv: list[str] | None = None):
    parser = option_parser(WeightArguments, description=__doc__.split(":")[0])
    (options,) = parser.parse_args_into_dataclasses(argv)
    model = LDAEForPreTraining.from_pretrained(options.run, dtype=torch.bfloat16)
    model.save_pretrained(options.folder, max_shard_size=options.max_shard_size)
    for path in sorted(Path(options.folder).iterdir()):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
