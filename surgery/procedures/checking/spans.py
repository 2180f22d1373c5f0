"""Spans: stretches of a tensor's elements, as they lie in a checkpoint's file, whatever its shape and dtype."""

from collections.abc import Iterator

from surgery.core.site import TensorInfo, bits_of
from surgery.core.source import TILE_ELEMENTS
from surgery.hosts.checkpoint import Checkpoint


def spans(info: TensorInfo) -> Iterator[slice]:
    """The elements of a tensor, a tile's at a time; one empty span where it has none."""
    count = info.nbits // bits_of(info.dtype)
    for start in range(0, count, TILE_ELEMENTS):
        yield slice(start, min(start + TILE_ELEMENTS, count))
    if count == 0:
        yield slice(0, 0)


def read_span(source: Checkpoint, name: str, span: slice) -> bytearray:
    """The bytes of those elements."""
    index, entry = source.at[name]
    bits = bits_of(entry.info.dtype)
    start, stop = bits * span.start // 8, -(-bits * span.stop // 8)  # a span begins at a whole byte
    return source.files[index].read(entry.start + start, stop - start)
