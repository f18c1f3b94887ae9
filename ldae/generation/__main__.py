"""`python -m ldae.generation`."""

from ldae.generation.command import main
from ldae.mistakes import run_command

run_command(main)
