"""surgery merge BASE ADAPTER[=WEIGHT]... OUT."""

from typing import Any

import click

from surgery.cli.arguments import adapters_of, as_json, calibration, overwrite, probes, resume, show, treatment
from surgery.cli.progress import shown
from surgery.cli.push import private


@click.command()
@click.argument("base")
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True)
@click.argument("out")
@click.option("--reversible", is_flag=True, help="Write what `surgery unmerge` needs, into OUT/surgery.undo.")
@treatment
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "feedback"]),
    help="To the nearest codes of a format, or to those that do best along the adapter's own input directions.",
)
@calibration
@probes
@click.option(
    "--fallback",
    type=click.Choice(["16bit", "int8"]),
    help="What weights become instead that would be under --min-retained, or over --max-noise, there.",
)
@click.option(
    "--min-retained", default=0.5, show_default=True, help="Fail if --into leaves less of the adapters' change."
)
@click.option(
    "--max-noise", default=1.0, show_default=True, help="Fail if more comes beside it, in proportion to the change."
)
@click.option("--max-shard-size", metavar="SIZE", help="Such as 5GB. By default the files are cut as the base's are.")
@click.option("--expect-base-sha256", metavar="HASH", help="Refuse another base; `surgery inspect --sha256` tells it.")
@click.option(
    "--expect-adapter-sha256",
    metavar="HASH",
    multiple=True,
    help="Refuse another adapter; one for each, in their order. `surgery inspect --sha256` tells it.",
)
@overwrite
@resume
@click.option("--push-to-hub", metavar="REPO", help="Then upload OUT to this repository on the Hub, as `surgery push`.")
@private
@as_json
def merge(  # noqa: PLR0913, PLR0917  # one argument an option
    base: str,
    adapters: tuple[str, ...],
    out: str,
    reversible: bool,
    rounding: str | None,
    calibration: str | None,
    probes: int,
    fallback: str | None,
    min_retained: float,
    max_noise: float,
    max_shard_size: str | None,
    expect_base_sha256: str | None,
    expect_adapter_sha256: tuple[str, ...],
    overwrite: bool,
    resume: bool | None,
    push_to_hub: str | None,
    private: bool,
    as_json: bool,
    **treatment: Any,
) -> None:
    """Merge adapters into BASE, streaming, into the new folder OUT.

    Every adapter tensor is applied once, or nothing is written. OUT/surgery.receipt.json says what was done.
    OUT appears whole, at the end; a call that was cut short goes on from the files that were finished.
    """
    from surgery.api import files

    with shown("merging") as progress:
        report = files.merge_checkpoint(
            base,
            adapters_of(adapters),
            out,
            reversible=reversible,
            rounding=rounding,
            calibration=calibration,
            probes=probes,
            fallback=fallback,
            min_retained=min_retained,
            max_noise=max_noise,
            max_shard_size=max_shard_size,
            expect_base_sha256=expect_base_sha256,
            expect_adapter_sha256=expect_adapter_sha256 or None,
            overwrite=overwrite,
            resume=resume,
            push_to_hub=push_to_hub,
            private=private,
            progress=progress,
            **treatment,
        )
    for note in report.plan.notes:
        click.echo(f"surgery: note: {note}", err=True)
    show(report, as_json)
