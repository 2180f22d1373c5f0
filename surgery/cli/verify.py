"""surgery verify OUT, or surgery verify BASE ADAPTER... OUT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from surgery.cli.arguments import (
    adapters_of,
    arithmetics,
    as_json,
    base_as,
    calibration,
    compute_dtype,
    conclude,
    mha_out_proj_scale,
    ops,
    probes,
    reports,
)


@click.command()
@click.argument("paths", metavar="[BASE ADAPTER[=WEIGHT]...] OUT", nargs=-1, required=True)
@click.option("--base", help="The base of OUT, where OUT is the only argument.")
@click.option("--adapter", "adapters", multiple=True, help="An adapter of OUT, ADAPTER[=WEIGHT]; may be repeated.")
@ops
@compute_dtype
@base_as
@click.option(
    "--arithmetic",
    type=click.Choice(arithmetics),
    help="Derive the merge by this arithmetic.",
)
@mha_out_proj_scale
@calibration
@probes
@click.option("--outputs", is_flag=True, help="Also run both models, and compare what they give.")
@click.option("--layers", is_flag=True, help="With --outputs: also what each adapted module gives.")
@as_json
@reports
def verify(  # noqa: PLR0913, PLR0917  # one argument an option
    paths: tuple[str, ...],
    base: str | None,
    adapters: tuple[str, ...],
    outputs: bool,
    layers: bool,
    as_json: bool,
    reports: tuple[Path, ...],
    **derivation: Any,
) -> None:
    """Grade every tensor of OUT. Exit code 4 if any is different.

    With base and adapters the merge is derived anew, whichever tool made OUT. bits: it gives the same bytes;
    rounding: as near as correct merges are; untouched: the base's bytes; different: none of these. With OUT
    alone its files are checked against its receipt. recorded: of the sha256 told there.
    What it was made with is taken from its receipt, if it has one, where no option says it.

    --outputs runs the base with the adapters over it, and OUT, with transformers, on seeded inputs; one of them
    at a time must fit into memory in float64.
    equivalent: an error of at most 4 times the noise of OUT's own dtype, and of a quarter of the adapters' effect.
    """
    from surgery.api import checking

    _check_call(paths, base, adapters)
    if len(paths) > 2:
        base, adapters = paths[0], paths[1:-1]
    out = paths[-1]
    given = (base, adapters_of(adapters), out) if base else (out,)
    report = checking.verify_checkpoint(*given, outputs=outputs, layers=layers, **derivation)
    conclude(report, as_json, reports)
    report.require()


def _check_call(paths: Sequence[str], base: str | None, adapters: Sequence[str]) -> None:
    """UsageError unless base and adapters are both named, in one of the two ways, or neither is."""
    if len(paths) == 2 or (len(paths) > 2 and (base or adapters)) or bool(base) != bool(adapters):
        raise click.UsageError("name OUT; or OUT with --base and --adapter; or BASE ADAPTER... OUT")
