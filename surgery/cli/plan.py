"""surgery plan BASE ADAPTER[=WEIGHT]..."""

from collections.abc import Mapping
from typing import Any

import click

from surgery.cli.arguments import (
    adapters_of,
    arithmetic,
    as_json,
    base_as,
    compute_dtype,
    dtype,
    into,
    ops,
    ops_of,
    show,
    tied,
)


@click.command()
@click.argument("base")
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True)
@dtype
@tied
@ops
@compute_dtype
@into
@base_as
@arithmetic
@as_json
def plan(  # noqa: PLR0913, PLR0917  # one argument an option
    base: str,
    adapters: tuple[str, ...],
    dtype: str | None,
    tied: str,
    ops: tuple[str, ...],
    compute_dtype: str | None,
    into: str | None,
    base_as: str | None,
    arithmetic: str,
    as_json: bool,
) -> None:
    """Show what a merge would do, and all that stands against it. Writes nothing.

    Exit code 3 if anything is refused.
    """
    from surgery.api import files
    from surgery.errors import printable

    report = files.plan(
        base,
        adapters_of(adapters),
        dtype=dtype,
        tied=tied,
        ops=ops_of(ops),
        compute_dtype=compute_dtype,
        into=into,
        base_as=base_as,
        arithmetic=arithmetic,
    )
    rows = [
        (
            printable(one["tensor"]),
            one["op"] or "",
            "x".join(map(str, one["shape"])),
            one["dtype"],
            _what(one),
        )
        for one in report.to_json()["changes"]
    ]
    show(report, as_json, rows, ("tensor", "op", "shape", "dtype", "what"))
    if not as_json:
        for line in (*report.notes, *(f"refused: {error}" for error in report.refusals)):
            click.echo(line)
    report.require()


def _what(change: Mapping[str, Any]) -> str:
    """What becomes of a weight, in words."""
    done = [f"{'in' if 'kept' in change else 'from'} {change['held']}"] if "held" in change else []
    done += ["replaced"] if change["replaced"] else [str(one["method"]) for one in change["methods"]]
    return ", ".join(done) or "cast"
