"""PackedStacks: rows of stacks that are not held plainly, whose codecs decode no less than one matrix."""

from collections import OrderedDict
from threading import Lock

import torch
from torch import Tensor

from surgery.core.site import Site
from surgery.hosts.packing import Held, Load

KEPT = 4  # matrices that stay decoded, since the tiles of one follow each other


class PackedStacks:
    """Over the files of one checkpoint, which may be read by several threads."""

    def __init__(self, load: Load) -> None:
        self.load, self.lock = load, Lock()
        self.kept: OrderedDict[tuple[str, torch.dtype, int], Tensor] = OrderedDict()

    def rows(self, site: Site, held: Held, rows: slice | None) -> Tensor:
        """Some rows of the matrices one below another, in the site's dtype."""
        wanted, total = site.rows(rows), site.laid(held.plain).shape[0]
        each = total // site.acting.stack
        experts = range(wanted.start // each, -(-wanted.stop // each))
        found = torch.cat([self._matrix(held, site.weight.torch_dtype, one) for one in experts])
        begin = wanted.start - experts.start * each
        return found[begin : begin + wanted.stop - wanted.start].clone()

    def _matrix(self, held: Held, dtype: torch.dtype, expert: int) -> Tensor:
        key = held.plain.name, dtype, expert
        with self.lock:
            found = self.kept.get(key)
        if found is None:
            packed = held.load(slice(expert, expert + 1), self.load)
            found = held.codec.decode(packed, dtype)[0]
            with self.lock:
                self.kept[key] = found
                if len(self.kept) > KEPT:
                    self.kept.popitem(last=False)
        return found
