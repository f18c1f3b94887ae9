"""Writes a run's model in bf16 as safetensors files of limited size: `python -m benchmarks.weights RUN FOLDER`."""

import argparse
from pathlib import Path

import torch

from ldae import LDAEForPreTraining
from ldae.mistakes import run_command


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("run", type=Path, help="folder of a run that is done")
    parser.add_argument("folder", type=Path, help="folder to write, with the configuration")
    parser.add_argument("--max_shard_size", default="15MB", help="size of the largest file")
    options = parser.parse_args(argv)
    model = LDAEForPreTraining.from_pretrained(options.run, dtype=torch.bfloat16)
    model.save_pretrained(options.folder, max_shard_size=options.max_shard_size)
    for path in sorted(options.folder.iterdir()):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
