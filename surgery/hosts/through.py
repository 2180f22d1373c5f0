"""Through: a source of plain weights as they read after another format has held them, as in training."""

from collections.abc import Iterable, Mapping
from threading import Lock

import torch
from torch import Tensor

from surgery.codecs import FORMS, cut
from surgery.core.codec import Packed
from surgery.core.site import Site
from surgery.core.source import TILE_ELEMENTS, Source, row_tiles
from surgery.core.workers import default_workers
from surgery.errors import ConfigError, ValueRangeError, printable


class Through:
    """`forms` are by tensor; each such weight, in its site's dtype, is encoded by fresh scales and decoded, by rows.

    All others read as they are.
    """

    def __init__(self, source: Source, forms: Mapping[str, str]) -> None:
        self.source, self.forms = source, forms
        self._lock = Lock()
        self._recent: dict[tuple[str, torch.dtype], Packed] = {}  # the scales of those that are read

    def sites(self) -> Iterable[Site]:
        return self.source.sites()

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        if site.weight.name not in self.forms:
            return self.source.load(site, rows)
        codec, _ = FORMS[self.forms[site.weight.name]]
        rows, by = site.rows(rows), self._scales(site)
        step = codec.step(by.headers, by.settings)
        whole = slice(rows.start // step * step, min(-(-rows.stop // step) * step, site.weight.shape[0]))
        held = codec.coded(self._begun(site, whole), cut(codec, by, whole))
        decoded = codec.decode(held, site.weight.torch_dtype)
        return Packed({"weight": decoded[rows.start - whole.start : rows.stop - whole.start]})

    def _begun(self, site: Site, rows: slice) -> Tensor:
        return self.source.load(site, rows).tensors["weight"].to(site.weight.torch_dtype)

    def _scales(self, site: Site) -> Packed:
        read = site.weight.name, site.weight.torch_dtype
        with self._lock:
            if read not in self._recent:
                for old in list(self._recent)[: -default_workers()]:  # one for each that reads, and no more
                    del self._recent[old]
                self._recent[read] = self._fresh(site)
            return self._recent[read]

    def _fresh(self, site: Site) -> Packed:
        codec, settings = FORMS[self.forms[site.weight.name]]
        shape = site.weight.shape
        tiles = (self._begun(site, rows) for rows in row_tiles(shape, TILE_ELEMENTS))
        try:
            return codec.scales(tiles, shape, site.weight.torch_dtype, settings)
        except (ConfigError, ValueRangeError) as error:
            raise type(error)(f"{printable(site.weight.name)}: {error}") from error
