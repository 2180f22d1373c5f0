"""surgery inspect PATH."""

import click

from surgery.cli.arguments import as_json, show


@click.command()
@click.argument("path")
@as_json
def inspect(path: str, as_json: bool) -> None:
    """List the sites of a model, or the tensors of an adapter: op, shape, dtype, size, tied.

    Only headers of a model are read.
    """
    from surgery import api
    from surgery.errors import printable

    report = api.inspect(path)
    rows = [
        (printable(row.name), row.op, "x".join(map(str, row.shape)), row.dtype, f"{row.size_bytes:,}", row.tied)
        for row in report.rows
    ]
    show(report, as_json, rows, ("name", "op", "shape", "dtype", "bytes", "tied to"))
