"""surgery merge BASE ADAPTER[=WEIGHT]... OUT."""

from typing import Any

import click

from surgery.cli.arguments import adapters_of, as_json, calibration, overwrite, probes, resume, show, treatment
from surgery.cli.printing import note
from surgery.cli.progress import shown
from surgery.cli.push import private


@click.command()
@click.argument("base")
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True)
@click.argument("out")
@click.option("--reversible", is_flag=True, help="Write what `surgery unmerge` needs, into OUT/surgery.undo.")
@treatment
@calibration
@probes
@click.option("--min-retained", type=float, help="Fail if --into leaves less of the adapters' change.  [default: 0.5]")
@click.option(
    "--max-noise", type=float, help="Fail if more comes beside it, in proportion to the change.  [default: 1.0]"
)
@click.option("--max-shard-size", metavar="SIZE", help="Such as 5GB. By default the files are cut as the base's are.")
@click.option("--expect-base-sha256", metavar="HASH", help="Refuse another base; `surgery inspect --sha256` tells it.")
@click.option(
    "--expect-adapter-sha256",
    metavar="HASH",
    multiple=True,
    callback=lambda _, __, given: given or None,
    help="Refuse another adapter; one for each, in their order. `surgery inspect --sha256` tells it.",
)
@overwrite
@resume
@click.option("--push-to-hub", metavar="REPO", help="Then upload OUT to this repository on the Hub, as `surgery push`.")
@private
@as_json
def merge(base: str, adapters: tuple[str, ...], out: str, as_json: bool, **options: Any) -> None:
    """Merge adapters into BASE, streaming, into the new folder OUT.

    Every adapter tensor is applied once, or nothing is written. OUT/surgery.receipt.json says what was done.
    OUT appears whole, at the end; a call that was cut short goes on from the files that were finished.
    """
    from surgery.api import files

    with shown("merging") as progress:
        report = files.merge_checkpoint(base, adapters_of(adapters), out, progress=progress, **options)
    for one in report.plan.notes:
        note(f"surgery: note: {one}", err=True)
    show(report, as_json)
