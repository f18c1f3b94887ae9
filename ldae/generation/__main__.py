"""`python -m ldae.generation`."""

from ldae.generation.command import main
from ldae.mistakes import run_command

if __name__ == "__main__":
    run_command(main)
