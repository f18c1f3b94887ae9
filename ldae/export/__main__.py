"""`python -m ldae.export`."""

from ldae.export.command import command

command()
