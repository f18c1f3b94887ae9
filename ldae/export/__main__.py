"""`python -m ldae.export` is the command `ldae-export`."""

from ldae.export.command import command

if __name__ == "__main__":
    command()
