"""What commands share: how adapters are spelled, and how a report is shown and written."""

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from surgery.cli.printing import held, say

if TYPE_CHECKING:
    from surgery.core.report import Report
    from surgery.procedures.checking.report import CaseReport

_NUMBER = re.compile(r"-?\d*\.?\d+")

Command = TypeVar("Command", bound=Callable[..., Any])


def _known_endings(context: click.Context, option: click.Parameter, paths: tuple[Path, ...]) -> tuple[Path, ...]:
    from surgery.io.hub import local_path
    from surgery.procedures.checking.report import ENDINGS

    for path in paths:
        if path.suffix.lower() not in ENDINGS:
            raise click.BadParameter(f"{path}: the ending must be one of {', '.join(ENDINGS)}", context, option)
    return tuple(map(local_path, paths))


class Told(click.Choice[str]):
    """Choices as --help lists them; of another value the function says that it is none, and why."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        del param, ctx
        return value


def _as_ops(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    return ops_of(given)


as_json = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
reports = click.option(
    "--report",
    "reports",
    metavar="FILE.(json|md|xml)",
    multiple=True,
    type=click.Path(path_type=Path),
    callback=_known_endings,
    help="Write the report to this file too, as JSON, Markdown or JUnit XML; may be repeated.",
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
resume = click.option(
    "--resume/--no-resume",
    default=None,
    help="Go on with such a call that was cut short, or start anew. By default it goes on if there is one.",
)
tied = click.option(
    "--tied",
    type=click.Choice(["refuse", "untie"]),
    default="refuse",
    show_default=True,
    help="Where one of two tied tensors changes: refuse, or write an output head of its own.",
)
ops = click.option(
    "--op",
    "ops",
    multiple=True,
    metavar="NAME=linear|conv1d",
    callback=_as_ops,
    help="The layout of a square weight, by the end of its name; may be repeated.",
)
dtype = click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
    help="Write all floats in this dtype. By default each tensor keeps its own.",
)
compute_dtype = click.option(
    "--compute-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What the weights of a quantized base are decoded to. By default what it computes in.",
)
forms = ["nf4", "nf4-double", "fp4", "fp4-double", "int8", "fp8_block", "w4a16", "w4a16-asym", "w8a16", "w8a8"]
forms += ["fp8_dynamic", "nvfp4", "mxfp4a16", "torchao-int8", "torchao-fp8"]
into = click.option(
    "--into",
    type=Told(["16bit", "keep", *(form for form in forms if form != "w4a16-asym")]),
    help="What weights become: plain, as by default; codes by a quantized base's own scales; or a format, by new ones.",
)
fallback = click.option(
    "--fallback",
    type=Told(["16bit"]),
    help="What weights become instead, where --into would leave too little of the adapters' change.",
)
rounding = click.option(
    "--rounding",
    type=click.Choice(["nearest", "feedback"]),
    help="To the nearest codes of a format, or to those that do best along the adapter's own input directions.",
)
base_as = click.option(
    "--base-as",
    type=Told(forms),
    help="The form in which the adapters were trained over this plain base, such as nf4 for QLoRA.",
)

probes = click.option(
    "--probes",
    metavar="N",
    type=int,
    default=0,
    help="Also tell the error of each weight's outputs, for N seeded inputs, over the adapters' effect on them.",
)
calibration = click.option(
    "--calibration",
    metavar="FILE|FOLDER",
    help="Of a rounding by feedback: the inputs, recorded by surgery.record_inputs, that tell which errors matter.",
)
arithmetics = ("exact", "peft", "peft-safe")
arithmetic = click.option(
    "--arithmetic",
    type=click.Choice(arithmetics),
    default="exact",
    show_default=True,
    help="Peft: the bits that PEFT 0.21.2's merge_and_unload gives; peft-safe: with its safe_merge.",
)
mha_out_proj_scale = click.option(
    "--mha-out-proj-scale",
    type=click.IntRange(1, 2),
    metavar="1|2",
    help="How often a file's delta of an attention layer's out_proj counts. By default 2 up to peft_version 0.21.2.",
)


_TREATMENT = (dtype, tied, ops, compute_dtype, into, fallback, rounding, base_as, arithmetic, mha_out_proj_scale)


def treatment(command: Command) -> Command:
    """The options that say what is done to a base besides laying adapters over it, as `plan` and `merge` take them."""
    for option in reversed(_TREATMENT):
        command = option(command)
    return command


def adapters_of(arguments: Sequence[str]) -> list[tuple[str, float]]:
    """ADAPTER[=WEIGHT]: an existing path as it stands, else split at the last `=` before a finite number."""
    return [_weighted(argument) for argument in arguments]


def ops_of(arguments: Sequence[str]) -> dict[str, str]:
    """NAME=OP."""
    found = {}
    for argument in arguments:
        name, sign, op = argument.rpartition("=")
        if not sign or not name:
            raise click.UsageError(f"--op {argument}: NAME=OP is wanted, such as c_proj=conv1d")
        found[name] = op
    return found


def show(report: "Report", as_json: bool, rows: Sequence[Sequence[str]] = (), header: Sequence[str] = ()) -> None:
    """The report as JSON, or its rows as a table with the summary below."""
    if as_json:
        from surgery.procedures.checking.report import as_json as text

        say(text(report), nl=False)
        return
    if rows:
        _table(rows, header)
    say(report.summary())


def conclude(report: "CaseReport", as_json: bool, reports: Sequence[Path]) -> None:
    """Show the report with its listed cases, and write it to files, each as its ending says."""
    from surgery.errors import printable
    from surgery.io.durable import write_file
    from surgery.procedures.checking.report import ENDINGS

    rows = [(printable(case.name), case.verdict, *case.cells) for case in report.cases() if case.listed]
    show(report, as_json, rows, report.columns)
    for path in reports:
        write_file(path, ENDINGS[path.suffix.lower()](report).encode())


def _weighted(argument: str) -> tuple[str, float]:
    name, sign, weight = argument.rpartition("=")
    if _NUMBER.fullmatch(argument) and not os.path.exists(argument):  # noqa: PTH110
        raise click.UsageError(f"{argument}: no adapter; a weight stands with its own, such as ADAPTER={argument}")
    if not sign or os.path.exists(argument):  # noqa: PTH110  # false for a name too long to be one
        return argument, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return name, value
    if os.path.exists(name):  # noqa: PTH110
        raise click.UsageError(f"{name}: its weight is {weight!r}; a finite number is wanted, such as ADAPTER=0.5")
    return argument, 1.0


def _table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in header:
        table.add_column(title, overflow="fold")  # a name is never cut
    for row in rows:
        table.add_row(*(held(cell, sys.stdout) for cell in row))
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 1 << 16  # a pipe has no width
    console.print(table)
