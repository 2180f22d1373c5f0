"""surgery unmerge OUT BASE_OUT."""

import click

from surgery.cli.arguments import as_json, overwrite, resume, show
from surgery.cli.progress import shown


@click.command()
@click.argument("merged", metavar="OUT")
@click.argument("out", metavar="BASE_OUT")
@overwrite
@resume
@as_json
def unmerge(merged: str, out: str, overwrite: bool, resume: bool | None, as_json: bool) -> None:
    """Write the original files of a merge.

    OUT was made with --reversible. The base is not needed.
    """
    from surgery.api import files

    with shown("unmerging") as progress:
        report = files.unmerge_checkpoint(merged, out, overwrite=overwrite, resume=resume, progress=progress)
    show(report, as_json)
