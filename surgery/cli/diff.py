"""surgery diff A B."""

from pathlib import Path

import click

from surgery.cli.arguments import as_json, conclude, reports


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--exit-code", is_flag=True, help="Exit with 4 if anything differs.")
@as_json
@reports
def diff(a: str, b: str, exit_code: bool, as_json: bool, reports: tuple[Path, ...]) -> None:
    """Show what differs between two models.

    That is names, shapes, dtypes and values of tensors, and keys of config.json.
    A and B may be cut into files in any way. Ulps are those of the dtype with fewer digits.
    """
    from surgery.api import checking

    report = checking.diff(a, b)
    conclude(report, as_json, reports)
    if exit_code:
        report.require()
