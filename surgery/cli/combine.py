"""surgery combine ADAPTER[=WEIGHT]... OUT."""

from pathlib import Path

import click

from surgery.cli.arguments import adapters_of, as_json, conclude, overwrite, reports

_METHODS = ["cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


@click.command()
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True)
@click.argument("out")
@click.option("--method", type=click.Choice(_METHODS), default="cat", show_default=True, help="cat is the exact sum.")
@click.option("--density", type=float, help="The part of the values that ties, dare and magnitude_prune keep.")
@click.option("--majority-sign-method", type=click.Choice(["total", "frequency"]), help="Of ties. By default total.")
@click.option("--rank", type=int, help="Of svd. By default the largest rank at each site.")
@click.option("--seed", type=int, help="Of dare. By default 0.")
@overwrite
@as_json
@reports
def combine(  # noqa: PLR0913, PLR0917  # one argument an option
    adapters: tuple[str, ...],
    out: str,
    method: str,
    density: float | None,
    majority_sign_method: str | None,
    rank: int | None,
    seed: int | None,
    overwrite: bool,
    as_json: bool,
    reports: tuple[Path, ...],
) -> None:
    """Combine LoRA adapters into one.

    OUT is a new folder in PEFT's format; its error against the exact sum is shown.
    """
    from surgery.api import made_adapters

    report = made_adapters.combine(
        adapters_of(adapters),
        out,
        method=method,
        density=density,
        majority_sign_method=majority_sign_method,
        rank=rank,
        seed=seed,
        overwrite=overwrite,
    )
    conclude(report, as_json, reports)
