"""`python -m ldae.generation`."""

from ldae.generation.command import command

command()
