"""`python -m ldae.features`, or `accelerate launch -m ldae.features`, is the command `ldae-features`."""

from ldae.features.command import command

if __name__ == "__main__":
    command()
