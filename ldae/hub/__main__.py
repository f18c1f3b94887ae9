"""`python -m ldae.hub` is the command `ldae-push`."""

from ldae.hub.command import command

if __name__ == "__main__":
    command()
