"""How far a command has come, on stderr: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.procedures.writing.filling import OnProgress, Progress

EVERY_S = 5.0  # between two lines; a command that is done before says nothing
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))


@contextmanager
def shown(what: str) -> Iterator["OnProgress"]:
    """What to call as bytes are written."""
    if sys.stderr.isatty():
        with _bar(what) as told:
            yield told
    else:
        yield lines(what, time.monotonic)


def lines(what: str, clock: Callable[[], float]) -> "OnProgress":
    """Prints a line at most every EVERY_S seconds."""
    last = clock()

    def told(progress: "Progress") -> None:
        nonlocal last
        if clock() - last < EVERY_S:
            return
        last = clock()
        share = 100 * progress.done_bytes // max(1, progress.total_bytes)
        with suppress(OSError):  # the work goes on, whoever hears of it
            print(f"{what}: {_sizes(*progress)}, {share} %", file=sys.stderr, flush=True)

    return told


def _sizes(done_bytes: int, total_bytes: int) -> str:
    """How much of how much, in the largest unit of which the total has a hundred, so that a part of it is seen."""
    unit, name = next(one for one in _UNITS if total_bytes >= 100 * one[0] or one[0] == 1)
    return f"{done_bytes / unit:,.0f} of {total_bytes / unit:,.0f} {name}"


@contextmanager
def _bar(what: str) -> Iterator["OnProgress"]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda now: bar.update(task, completed=now.done_bytes, total=now.total_bytes)
