"""`mka run`: one recompression, here."""

import click


@click.command()
def run() -> None:
    """Recompress a model."""
