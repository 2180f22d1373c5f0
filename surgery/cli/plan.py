"""surgery plan BASE ADAPTER[=WEIGHT]..."""

from collections.abc import Mapping
from typing import Any

import click

from surgery.cli.arguments import adapters_of, as_json, show, treatment
from surgery.cli.printing import note
from surgery.errors import printable, quoted


@click.command()
@click.argument("base")
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True)
@treatment
@as_json
def plan(base: str, adapters: tuple[str, ...], as_json: bool, **treatment: Any) -> None:
    """Show what a merge would do, and all that stands against it. Writes nothing.

    Exit code 3 if anything is refused.
    """
    from surgery.api import files
    from surgery.errors import InputError

    report = files.plan(base, adapters_of(adapters), **treatment)
    rows = [
        (
            printable(one["tensor"]),
            one["op"] or "",
            "x".join(map(str, one["shape"])),
            one["dtype"],
            _what(one, len(adapters) > 1),
        )
        for one in report.to_json()["changes"]
    ]
    show(report, as_json, rows, ("tensor", "op", "shape", "dtype", "what"))
    if not as_json:
        for line in (*report.notes, *(f"refused: {error}" for error in report.refusals)):
            note(line)
    if not report.ok:
        told = "the reasons are listed" if as_json else "the lines above say why"
        raise InputError(f"{printable(base)}: {len(report.refusals)} refused, so nothing would be merged; {told}")


def _what(change: Mapping[str, Any], several: bool) -> str:
    """What becomes of a weight, in words; `several` adapters are told apart."""
    done = [f"{'in' if 'kept' in change else 'from'} {change['held']}"] if "held" in change else []
    done += [f"begins as {printable(change['begins'])}"] if "begins" in change else []
    done += [f"into {change['into']}"] if "into" in change else []
    layers = zip(change["methods"], change["matched"], strict=True)
    done += ["replaced"] if change["replaced"] else [_laid(*layer, several) for layer in layers]
    return ", ".join(done) or "cast"


def _laid(method: Mapping[str, str], matched: Mapping[str, Any], several: bool) -> str:
    """A layer: its method, r, alpha, scaling, its adapter, and the entry of target_modules that it is there by."""
    numbers = [f"{name}={matched[name]:g}" for name in ("r", "lora_alpha", "alpha") if name in matched]
    numbers += [f"scaling={float.fromhex(method['scaling']):g}"] if "scaling" in method else []
    told = [f"of {printable(matched['adapter'])}"] if several else []
    return " ".join([method["method"], *numbers, *told, f"by {quoted(matched['by'])}"])
