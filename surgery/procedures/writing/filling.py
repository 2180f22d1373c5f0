"""Filling: a view of a checkpoint written into a staging folder, file by file, so that a run cut short can go on."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple, Protocol

from surgery.core.source import TILE_ELEMENTS, Source, copy
from surgery.core.workers import default_workers, single_threads
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.layout import Layout
from surgery.hosts.reading import Reading
from surgery.hosts.shards import CheckpointSink, FilePart, Written
from surgery.io.staging import Staging


class Progress(NamedTuple):
    """How much of an output is written."""

    done_bytes: int
    total_bytes: int


OnProgress = Callable[[Progress], None]
_AHEAD = 8  # pieces that hashing and writing may lag behind, where there are threads to spare


@dataclass(frozen=True)
class Pace:
    """How the work is done; none of it affects the bytes. `progress` is called from several threads, one at a time."""

    workers: int = field(default_factory=default_workers)  # files at once
    tile_elements: int = TILE_ELEMENTS
    progress: OnProgress | None = None


class View(Source, Protocol):
    """A checkpoint as it reads with something done to it."""

    def reads(self, tensor: str) -> Sequence[str]:
        """The tensors of the checkpoint that one of the output depends on."""
        ...


class Ledger(Protocol):
    """What else is to be known of each finished file."""

    def beside(self, parts: Collection[str]) -> int:
        """Bytes that are written besides, at least, where these files are still to be."""
        ...

    def close(self, part: str) -> Mapping[str, str]:
        """The file is whole; returns what else was written for it, with sha256 by name."""
        ...

    def told(self, part: FilePart) -> Any:
        """As JSON."""
        ...

    def take(self, part: str, told: Any) -> None:
        """An earlier run has told this."""
        ...


def fill(  # noqa: PLR0913, PLR0917  # from where, to where, and who keeps the books
    base: Checkpoint, view: View, staging: Staging, layout: Layout, ledger: Ledger, pace: Pace
) -> tuple[Sequence[Reading], Mapping[str, Written]]:
    """Write all files of `layout`; returns the hashes of what was read of `base` and of what was written.

    InputError if a file of `base` changes meanwhile.
    """
    ahead = _AHEAD if pace.workers >= 2 * len(layout.files) else 0
    readings = base.hash_reads(ahead)
    written = _taken(base, readings, staging, ledger)
    lacking = {file.name: file.size for file in layout.files if file.name not in written}
    staging.require_room(sum(lacking.values()) + ledger.beside(lacking))
    meter = _Meter(layout, written, pace.progress)

    def finished(part: FilePart) -> None:
        files = {**ledger.close(part.name), part.name: part.tally.whole.hexdigest()}
        weights = (weight for one in part.order for weight in view.reads(one))
        read = {name: _read_of(base, readings, name) for one in weights for name in base.holding(one)}
        told = {"tensors": part.tally.tensors, "read": read, "more": ledger.told(part)}
        staging.finish(part.name, files, told)

    filled = CheckpointSink(
        base,
        staging,
        layout,
        written=written,
        finished=finished,
        progress=meter.add,
        tile_elements=pace.tile_elements,
        ahead=ahead,
    )
    # Beside threads that hash, those of torch would only wait for one another.
    with filled as sink, single_threads() if ahead else nullcontext():
        copy(view, sink, pace.workers)
    base.check_unchanged()
    return readings, sink.written


def _taken(base: Checkpoint, readings: Sequence[Reading], staging: Staging, ledger: Ledger) -> dict[str, Written]:
    """What an earlier run has finished, if the base is still the one that it has read."""
    written = {}
    for part, (files, told) in list(staging.finished.items()):
        for index in {base.file_of(name) for name in told["read"]}:
            if not readings[index].tensors:
                readings[index].read_again()
        if all(_read_of(base, readings, name) == digest for name, digest in told["read"].items()):
            written[part] = Written(files[part], told["tensors"])
            ledger.take(part, told["more"])
        else:
            staging.forget(part)
    return written


def _read_of(base: Checkpoint, readings: Sequence[Reading], name: str) -> str | None:
    """sha256 of a tensor of the base as it was read; None if it was not."""
    return readings[base.file_of(name)].tensors.get(name)


class _Meter:
    """Adds up what the parts write."""

    def __init__(self, layout: Layout, written: Mapping[str, Written], told: OnProgress | None) -> None:
        self.lock, self.told, self.total = Lock(), told, sum(file.size for file in layout.files)
        self.done = sum(file.size for file in layout.files if file.name in written)

    def add(self, count: int) -> None:
        if self.told is None:
            return
        with self.lock:
            self.done += count
            self.told(Progress(self.done, self.total))
