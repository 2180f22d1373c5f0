"""CheckpointSink: safetensors files like a base's, written once from front to back into a staging folder."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import BinaryIO

import torch

from surgery.core.codec import Packed
from surgery.core.site import Site
from surgery.core.source import TILE_ELEMENTS, row_tiles
from surgery.hosts.checkpoint import INDEX, Checkpoint
from surgery.io.header import Header, encode_header
from surgery.io.octets import Tally, octets
from surgery.io.staging import Staging, write_all
from surgery.io.strict_json import json_bytes


class CheckpointSink:
    """What is stored replaces the base's tensor; all that lies between is carried as bytes.

    Sites must be stored in the order of their bytes in `base`. `dtypes` are those that differ from the
    base's; `headers` are raw headers by file name, where they must be of certain bytes.
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
        self.tallies: dict[str, Tally] = {}  # of what is written, by file
        self.order = [info.name for info in base.tensors()]
        self.done = 0  # tensors of `order` that are written
        self.opened = -1  # the file at hand, as an index into the base's
        self.file: BinaryIO | None = None
        self.context = ExitStack()

    def __enter__(self) -> "CheckpointSink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.context.__exit__(kind, value, trace)

    def tiles(self, site: Site) -> Iterator[slice]:
        # What lies before the site goes first: the base is read in the order of its bytes, and hashed so.
        while self.order[self.done] != site.weight.name:
            self._carry(self.order[self.done])
        yield from row_tiles(site.weight.shape, self.tile_elements)

    def store(self, site: Site, packed: Packed, rows: slice) -> None:
        name, values = site.weight.name, packed.tensors["weight"].contiguous()
        self._write(name, octets(values))
        if not site.weight.shape or rows.stop >= site.weight.shape[0]:
            self._end(name)

    def close(self) -> None:
        """Carry what is left."""
        for name in self.order[self.done :]:
            self._carry(name)
        self._open(len(self.base.files))

    def index(self) -> bytes | None:
        """The base's index, if it has one; its size follows a change of dtype."""
        if self.base.index is None or not self.dtypes:
            return None if self.base.index is None else (self.base.folder / INDEX).read_bytes()
        infos = (info._replace(dtype=self.dtypes.get(info.name, info.dtype)) for info in self.base.tensors())
        metadata = dict(self.base.index.get("metadata") or {})
        metadata["total_size"] = sum(info.nbytes for info in infos)
        return json_bytes({**self.base.index, "metadata": metadata})

    def _carry(self, name: str) -> None:
        for chunk in self.base.read(name):
            self._write(name, chunk)
        self._end(name)

    def _write(self, name: str, data: memoryview) -> None:
        self._open(self.base.file_of(name))
        assert self.file is not None
        self.tally.feed(data)
        write_all(self.file, data)

    def _end(self, name: str) -> None:
        self._open(self.base.file_of(name))  # for a tensor of no bytes
        self.tally.end(name)
        self.done += 1

    def _open(self, index: int) -> None:
        """Finish the files before `index` and open that one."""
        while self.opened < index:
            self.context.close()  # the file at hand gets its name
            self.file = None
            self.opened += 1
            if self.opened == len(self.base.files):
                return
            source = self.base.files[self.opened]
            name = self.base.written_name(source)
            raw = self.headers.get(name) or self._header(source.header)
            self.file = self.context.enter_context(self.staging.file(name))
            write_all(self.file, raw)
            self.tally = self.tallies[name] = Tally(raw)

    def _header(self, header: Header) -> bytes:
        infos = [entry.info for entry in header.entries]
        if not any(info.name in self.dtypes for info in infos):
            return header.raw
        return encode_header(
            [info._replace(dtype=self.dtypes.get(info.name, info.dtype)) for info in infos], header.metadata
        )
