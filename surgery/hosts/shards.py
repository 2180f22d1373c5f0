"""CheckpointSink: safetensors files of a layout, each written once from front to back into a staging folder."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

from surgery.core.codec import Packed
from surgery.core.site import Site
from surgery.core.source import TILE_ELEMENTS, row_tiles
from surgery.core.workers import Backlog
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.layout import Layout, OutFile
from surgery.io.octets import Tally, octets
from surgery.io.staged_file import StagedFile
from surgery.io.staging import Staging


@dataclass(frozen=True)
class Written:
    """sha256 of a file that was written, and of each tensor in it."""

    sha256: str
    tensors: Mapping[str, str]


class CheckpointSink:
    """What is stored goes where the layout has it; all that lies between is carried from `base` as bytes.

    A file is a part. `written` are those that an earlier run has finished, which are passed over; `finished` is
    called with each file that this one has, and `progress` with the number of bytes, as they are written, which
    may be up to `ahead` pieces after they are stored.
    """

    def __init__(  # noqa: PLR0913  # what is written, where to, and who is told
        self,
        base: Checkpoint,
        staging: Staging,
        layout: Layout,
        *,
        written: Mapping[str, Written] | None = None,
        finished: Callable[["FilePart"], None] | None = None,
        progress: Callable[[int], None] | None = None,
        tile_elements: int = TILE_ELEMENTS,
        ahead: int = 0,
    ) -> None:
        self.base, self.staging, self.layout = base, staging, layout
        self.tile_elements, self.ahead = tile_elements, ahead
        self.written: dict[str, Written] = dict(written or {})
        self.finished, self.progress = finished, progress
        self.files: list[FilePart] = []

    def __enter__(self) -> "CheckpointSink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files:
            file.backlog.drop()
        for file in self.files:
            file.context.__exit__(kind, value, trace)

    def parts(self, sites: Iterable[Site]) -> Sequence["FilePart"]:
        stored = {site.written: site for site in sites}
        self.files = [FilePart(self, file, stored) for file in self.layout.files if file.name not in self.written]
        return self.files

    def end(self, part: "FilePart") -> None:
        """A file is whole and on the disk."""
        self.written[part.name] = Written(part.tally.whole.hexdigest(), part.tally.tensors)
        if self.finished is not None:
            self.finished(part)


class FilePart:
    """One file of the output; `sites` are those of its weights that are stored, in the order of their bytes."""

    def __init__(self, sink: CheckpointSink, file: OutFile, stored: Mapping[str, Site]) -> None:
        self.sink, self.name, self.layout = sink, file.name, file
        self.order = [info.name for info in file.infos]
        self.sites = [stored[name] for name in self.order if name in stored]
        self.tally, self.backlog = Tally(file.raw), Backlog(sink.ahead)
        self.done = 0  # tensors of `order` that are written
        self.context = ExitStack()
        self.file: StagedFile | None = None

    def tiles(self, site: Site) -> Iterator[slice]:
        # What lies before the site goes first: the base is read in the order of its bytes, and hashed so.
        while self.order[self.done] != site.written:
            self._carry(self.order[self.done])
        yield from row_tiles(site.laid(site.weight).shape, self.sink.tile_elements, site.together)

    def store(self, site: Site, packed: Packed, rows: slice) -> None:
        self._write(octets(packed.tensors["weight"].contiguous()))
        shape = site.laid(site.weight).shape
        if not shape or rows.stop >= shape[0]:
            self._end(site.written)

    def close(self) -> None:
        """Carry what is left, and give the file its name."""
        for name in self.order[self.done :]:
            self._carry(name)
        self.backlog.catch_up()
        self._opened()
        self.context.close()
        self.sink.end(self)

    def _carry(self, name: str) -> None:
        for chunk in self.sink.base.read(name):
            self._write(chunk)
        self._end(name)

    def _write(self, data: memoryview) -> None:
        self.backlog(self._hash_and_put, data)

    def _hash_and_put(self, data: memoryview) -> None:
        self.tally.feed(data)
        self._put(self._opened(), data)

    def _end(self, name: str) -> None:
        self.backlog(self.tally.end, name)
        self.done += 1

    def _opened(self) -> StagedFile:
        if self.file is None:
            self.file = self.context.enter_context(self.sink.staging.file(self.name, self.layout.size))
            self._put(self.file, self.layout.raw)
        return self.file

    def _put(self, file: StagedFile, data: bytes | memoryview) -> None:
        file.write(data)
        if self.sink.progress is not None:
            self.sink.progress(len(data))
