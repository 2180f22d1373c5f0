"""How far a command has come, on stderr: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.procedures.writing.filling import OnProgress, Progress

EVERY_S = 5.0  # between two lines; a command that is done before says nothing


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
        done, total = progress.done_bytes / 1e6, progress.total_bytes / 1e6
        with suppress(OSError):  # the work goes on, whoever hears of it
            print(f"{what}: {done:,.0f} of {total:,.0f} MB, {share} %", file=sys.stderr, flush=True)

    return told


@contextmanager
def _bar(what: str) -> Iterator["OnProgress"]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda now: bar.update(task, completed=now.done_bytes, total=now.total_bytes)
