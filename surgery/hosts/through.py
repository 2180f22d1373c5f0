"""Through: a source of plain weights as they read after another format has held them, as in training."""

from collections.abc import Iterable, Mapping
from threading import Lock

from surgery.codecs import FORMS, cut
from surgery.core.codec import Packed
from surgery.core.site import Site
from surgery.core.source import Source
from surgery.core.workers import default_workers
from surgery.errors import SurgeryError, printable


class Through:
    """`forms` are by tensor; each such weight, in its site's dtype, is encoded whole by fresh scales and decoded by
    rows. All others read as they are."""

    def __init__(self, source: Source, forms: Mapping[str, str]) -> None:
        self.source, self.forms = source, forms
        self._lock = Lock()  # one at a time is encoded, for that takes memory
        self._recent: dict[str, Packed] = {}

    def sites(self) -> Iterable[Site]:
        return self.source.sites()

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        if site.weight.name not in self.forms:
            return self.source.load(site, rows)
        codec, _ = FORMS[self.forms[site.weight.name]]
        packed = cut(codec, self._encoded(site), site.rows(rows))
        return Packed({"weight": codec.decode(packed, site.weight.torch_dtype)})

    def _encoded(self, site: Site) -> Packed:
        name = site.weight.name
        with self._lock:
            if name not in self._recent:
                for old in list(self._recent)[: -default_workers()]:  # one for each that reads, and no more
                    del self._recent[old]
                self._recent[name] = self._fresh(site)
            return self._recent[name]

    def _fresh(self, site: Site) -> Packed:
        codec, settings = FORMS[self.forms[site.weight.name]]
        weight = self.source.load(site).tensors["weight"].to(site.weight.torch_dtype)
        try:
            return codec.fresh(weight, settings)
        except SurgeryError as error:
            raise type(error)(f"{printable(site.weight.name)}: {error}") from error
