"""surgery demo."""

from pathlib import Path

import click


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Keep the files in this new folder.")
def demo(out: Path | None) -> None:
    """Train, merge, verify and unmerge an adapter on a real model, in about a minute."""
    from surgery import api

    api.demo(out)
