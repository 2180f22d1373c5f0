"""CheckpointSink: safetensors files like a base's, each written once from front to back into a staging folder."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import BinaryIO

import torch

from surgery.core.codec import Packed
from surgery.core.site import Site
from surgery.core.source import TILE_ELEMENTS, row_tiles
from surgery.hosts.checkpoint import Checkpoint
from surgery.io.header import Header, encode_header
from surgery.io.octets import Tally, octets
from surgery.io.staging import Staging, write_all
from surgery.io.strict_json import json_bytes


class CheckpointSink:
    """What is stored replaces the base's tensor; all that lies between is carried as bytes. A file is a part.

    `dtypes` are those that differ from the base's; `headers` are raw headers by file name, where they must
    be of certain bytes.
    """

    def __init__(
        self,
        base: Checkpoint,
        staging: Staging,
        dtypes: Mapping[str, torch.dtype],
        headers: Mapping[str, bytes] | None = None,
        tile_elements: int = TILE_ELEMENTS,
    ) -> None:
        self.base, self.staging, self.tile_elements = base, staging, tile_elements
        self.dtypes, self.headers = dtypes, headers or {}
        self.files: list[FilePart] = []

    def __enter__(self) -> "CheckpointSink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files:
            file.context.__exit__(kind, value, trace)

    def parts(self, sites: Iterable[Site]) -> Sequence["FilePart"]:
        grouped: dict[int, list[Site]] = {index: [] for index in range(len(self.base.files))}
        for site in sites:
            grouped[self.base.file_of(site.weight.name)].append(site)
        self.files = [FilePart(self, index, found) for index, found in grouped.items()]
        return self.files

    @property
    def tallies(self) -> dict[str, Tally]:
        """Of what is written, by file."""
        return {file.name: file.tally for file in self.files}

    def index(self) -> bytes | None:
        """The base's index, if it has one; its size follows a change of dtype."""
        if self.base.index is None or not self.dtypes:
            return None if self.base.index is None else self.base.index_bytes
        infos = (info._replace(dtype=self.dtypes.get(info.name, info.dtype)) for info in self.base.tensors())
        metadata = dict(self.base.index.get("metadata") or {})
        metadata["total_size"] = sum(info.nbytes for info in infos)
        return json_bytes({**self.base.index, "metadata": metadata})

    def header(self, index: int) -> bytes:
        """The header that a file is written with."""
        file = self.base.files[index]
        return self.headers.get(self.base.written_name(file)) or self._derived(file.header)

    def _derived(self, header: Header) -> bytes:
        infos = [entry.info for entry in header.entries]
        if not any(info.name in self.dtypes for info in infos):
            return header.raw
        return encode_header(
            [info._replace(dtype=self.dtypes.get(info.name, info.dtype)) for info in infos], header.metadata
        )


class FilePart:
    """One file of the output; `sites` are those of its weights that are stored, in the order of their bytes."""

    def __init__(self, sink: CheckpointSink, index: int, sites: Sequence[Site]) -> None:
        source = sink.base.files[index]
        self.sites, self.base, self.staging, self.tile_elements = sites, sink.base, sink.staging, sink.tile_elements
        self.name, self.raw = sink.base.written_name(source), sink.header(index)
        self.tally = Tally(self.raw)
        self.order = [entry.info.name for entry in source.header.entries]
        self.done = 0  # tensors of `order` that are written
        self.context = ExitStack()
        self.file: BinaryIO | None = None

    def tiles(self, site: Site) -> Iterator[slice]:
        # What lies before the site goes first: the base is read in the order of its bytes, and hashed so.
        while self.order[self.done] != site.weight.name:
            self._carry(self.order[self.done])
        yield from row_tiles(site.weight.shape, self.tile_elements)

    def store(self, site: Site, packed: Packed, rows: slice) -> None:
        name, values = site.weight.name, packed.tensors["weight"].contiguous()
        self._write(octets(values))
        if not site.weight.shape or rows.stop >= site.weight.shape[0]:
            self._end(name)

    def close(self) -> None:
        """Carry what is left, and give the file its name."""
        for name in self.order[self.done :]:
            self._carry(name)
        self._opened()
        self.context.close()

    def _carry(self, name: str) -> None:
        for chunk in self.base.read(name):
            self._write(chunk)
        self._end(name)

    def _write(self, data: memoryview) -> None:
        self.tally.feed(data)
        write_all(self._opened(), data)

    def _end(self, name: str) -> None:
        self.tally.end(name)
        self.done += 1

    def _opened(self) -> BinaryIO:
        if self.file is None:
            self.file = self.context.enter_context(self.staging.file(self.name))
            write_all(self.file, self.raw)
        return self.file
