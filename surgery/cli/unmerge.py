"""surgery unmerge OUT BASE_OUT."""

import click

from surgery.cli.arguments import as_json, overwrite, show


@click.command()
@click.argument("merged", metavar="OUT")
@click.argument("out", metavar="BASE_OUT")
@overwrite
@as_json
def unmerge(merged: str, out: str, overwrite: bool, as_json: bool) -> None:
    """Write the original files of OUT, a merge made with --reversible, to BASE_OUT. The base is not needed."""
    from surgery import api

    show(api.unmerge_checkpoint(merged, out, overwrite=overwrite), as_json)
