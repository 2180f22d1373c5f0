"""Source and sink, the two ends of every procedure, and the one function that joins them."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event
from typing import Protocol

from surgery.core.codec import Packed
from surgery.core.site import Site
from surgery.core.workers import single_threads, startable

TILE_ELEMENTS = 1 << 19  # of a weight at a time: 4 MB of float64, which bounds the memory of every procedure
GPU_TILE_ELEMENTS = 1 << 22  # the same on a GPU, where it is calls that take the time


class Source(Protocol):
    """A readable place of sites: a live model, a checkpoint, or a view over one."""

    def sites(self) -> Iterable[Site]:
        """Its sites, in the order in which reading them is cheapest."""
        ...

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        """The site's tensors; of the weight only `rows` (of the stored shape), if given."""
        ...


class Part(Protocol):
    """What a sink takes in one piece, such as a file: its sites, one after another, in their order."""

    @property
    def sites(self) -> Sequence[Site]: ...

    def tiles(self, site: Site) -> Iterator[slice]:
        """The rows of the stored weight to ask for at a time, in order, without gaps."""
        ...

    def store(self, site: Site, packed: Packed, rows: slice) -> None: ...

    def close(self) -> None:
        """Finish the part."""
        ...


class Sink(Protocol):
    """A writable place of sites."""

    def parts(self, sites: Iterable[Site]) -> Sequence[Part]:
        """`sites` by parts, which know nothing of each other and may be filled at once."""
        ...


def copy(source: Source, sink: Sink, workers: int = 1) -> None:
    """Everything of `source` into `sink`, a tile at a time, up to `workers` parts at once.

    More than one worker gives each a single thread of torch, for as long as it takes.
    """
    parts, stop = sink.parts(source.sites()), Event()
    workers = startable(min(workers, len(parts)))
    if workers < 2:
        for part in parts:
            _fill(source, part, stop)
        return
    with single_threads(), ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(_fill, source, part, stop) for part in parts]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
            for one in running:
                if one.done():
                    one.result()
        finally:
            stop.set()


def row_tiles(shape: tuple[int, ...], tile_elements: int, together: int = 1) -> Iterator[slice]:
    """Slices of the first axis that hold about `tile_elements` each; one slice for a scalar, or for no rows.

    Each but the last has a multiple of `together` rows.
    """
    if not shape or shape[0] == 0:
        yield slice(0, 0 if shape else 1)
        return
    per_row = 1
    for extent in shape[1:]:
        per_row *= extent
    step = max(together, tile_elements // max(1, per_row) // together * together)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _fill(source: Source, part: Part, stop: Event) -> None:
    """One part, unless another has failed meanwhile: then it is left as it is."""
    for site in part.sites:
        for rows in part.tiles(site):
            if stop.is_set():
                return
            part.store(site, source.load(site, rows), rows)
    part.close()
