"""surgery extract BASE TUNED OUT."""

from pathlib import Path

import click

from surgery.cli.arguments import as_json, conclude, ops_of, overwrite, reports


@click.command()
@click.argument("base")
@click.argument("tuned")
@click.argument("out")
@click.option("--rank", type=int, help="The most at each site.")
@click.option("--energy", type=float, help="The part of each change's squared norm to hold, such as 0.99.")
@click.option(
    "--target", "targets", multiple=True, metavar="NAME", help="Take modules and experts whose name ends so alone."
)
@click.option(
    "--rest",
    type=click.Choice(["refuse", "save", "drop"]),
    default="refuse",
    show_default=True,
    help="What becomes of other changes: refuse, save the modules whole, or leave them out.",
)
@click.option(
    "--op",
    "ops",
    multiple=True,
    metavar="NAME=linear|conv1d|embedding",
    help="What a module is, or a stack of experts.",
)
@overwrite
@as_json
@reports
def extract(  # noqa: PLR0913, PLR0917  # one argument an option
    base: str,
    tuned: str,
    out: str,
    rank: int | None,
    energy: float | None,
    targets: tuple[str, ...],
    rest: str,
    ops: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
    reports: tuple[Path, ...],
) -> None:
    """Make a LoRA adapter of a tuned model and its base.

    OUT is a new folder in PEFT's format. Its error at each site is shown.
    """
    from surgery.api import made_adapters

    report = made_adapters.extract(
        base,
        tuned,
        out,
        rank=rank,
        energy=energy,
        targets=targets or None,
        rest=rest,  # type: ignore[arg-type]  # click has checked it
        ops=ops_of(ops),
        overwrite=overwrite,
    )
    conclude(report, as_json, reports)
