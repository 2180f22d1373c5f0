"""surgery merge BASE ADAPTER[=WEIGHT]... OUT."""

import click

from surgery.cli.arguments import adapters_of, as_json, dtype, overwrite, show
from surgery.cli.push import private


@click.command()
@click.argument("base")
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True)
@click.argument("out")
@click.option("--reversible", is_flag=True, help="Write what `surgery unmerge` needs, into OUT/surgery.undo.")
@dtype
@overwrite
@click.option("--push-to-hub", metavar="REPO", help="Then upload OUT to this repository on the Hub, as `surgery push`.")
@private
@as_json
def merge(  # noqa: PLR0913, PLR0917  # one argument an option
    base: str,
    adapters: tuple[str, ...],
    out: str,
    reversible: bool,
    dtype: str | None,
    overwrite: bool,
    push_to_hub: str | None,
    private: bool,
    as_json: bool,
) -> None:
    """Merge adapters into BASE, streaming, into the new folder OUT.

    Every adapter tensor is applied once, or nothing is written. OUT/surgery.receipt.json says what was done.
    """
    from surgery import api

    report = api.merge_checkpoint(
        base,
        adapters_of(adapters),
        out,
        reversible=reversible,
        dtype=dtype,
        overwrite=overwrite,
        push_to_hub=push_to_hub,
        private=private,
    )
    show(report, as_json)
