"""Source and sink, the two ends of every procedure, and the one line that joins them."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from surgery.core.codec import Packed
from surgery.core.site import Site


class Source(Protocol):
    """A readable place of sites: a live model, a checkpoint, or a view over one."""

    def sites(self) -> Iterable[Site]:
        """Its sites, in the order in which reading them is cheapest."""
        ...

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        """The site's tensors; of the weight only `rows` (of the stored shape), if given."""
        ...


class Sink(Protocol):
    """A writable place of sites."""

    def tiles(self, site: Site) -> Iterator[slice]:
        """The rows of the stored weight to ask for at a time, in order, without gaps."""
        ...

    def store(self, site: Site, packed: Packed, rows: slice) -> None: ...

    def close(self) -> None:
        """Finish: nothing has been changed for others until this returns."""
        ...


TILE_ELEMENTS = 1 << 20  # of a weight at a time: 8 MB of float64, which bounds the memory of every procedure


def copy(source: Source, sink: Sink) -> None:
    """Everything of `source` into `sink`, a tile at a time."""
    for site in source.sites():
        for rows in sink.tiles(site):
            sink.store(site, source.load(site, rows), rows)
    sink.close()


def row_tiles(shape: tuple[int, ...], tile_elements: int) -> Iterator[slice]:
    """Slices of the first axis that hold about `tile_elements` each; one slice for a scalar, or for no rows."""
    if not shape or shape[0] == 0:
        yield slice(0, 0 if shape else 1)
        return
    per_row = 1
    for extent in shape[1:]:
        per_row *= extent
    step = max(1, tile_elements // max(1, per_row))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))
