"""surgery inspect PATH."""

from itertools import compress

import click

from surgery.cli.arguments import as_json, show
from surgery.cli.printing import say

_COLUMNS = ("name", "op", "shape", "dtype", "bytes", "tied to")


@click.command()
@click.argument("path")
@click.option(
    "--sha256",
    is_flag=True,
    help="Read all of a model for the hash that `surgery merge --expect-base-sha256` takes; alone, or in --json.",
)
@as_json
def inspect(path: str, sha256: bool, as_json: bool) -> None:
    """List the sites of a model, or an adapter's tensors.

    Of each it tells op, shape, dtype and size, and what is tied.
    Only headers of a model are read, but for --sha256.
    """
    from surgery.api import checking
    from surgery.errors import printable

    report = checking.inspect(path, sha256=sha256)
    if sha256 and not as_json:
        say(str(report.sha256))
        return
    rows = [
        (printable(row.name), row.op, "x".join(map(str, row.shape)), row.dtype, f"{row.size_bytes:,}", row.tied)
        for row in report.rows
    ]
    told = [any(row[column] for row in rows) for column in range(len(_COLUMNS))]  # of an adapter some are empty
    show(report, as_json, [list(compress(row, told)) for row in rows], list(compress(_COLUMNS, told)))
