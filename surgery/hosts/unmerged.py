"""Unmerged: a merged host as it reads with the adapters taken off again."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.core.adapter import Started
from surgery.core.codec import Packed
from surgery.core.site import Site
from surgery.core.source import Source
from surgery.core.undo import Restorer
from surgery.hosts.change import Change, elementwise, ends, reads_of


@dataclass(frozen=True)
class Undo:
    """What one weight needs to come back: index streams by bits each, or the original itself."""

    dtype: torch.dtype
    streams: Mapping[int, bytes] | None = None
    kept: Callable[[slice], Tensor] | None = None  # rows of it


def kept_whole(original: Tensor) -> Callable[[slice], Tensor]:
    """The rows of an original that is in memory; a scalar counts as one row."""
    return lambda rows: original[rows if original.dim() else ...]


class Unmerged:
    """The weights of `source`, a merged host, as they were before `changes`; each is read once, in order."""

    def __init__(self, source: Source, changes: Iterable[Change], undo: Callable[[Change], Undo]) -> None:
        self.source, self.undo = source, undo
        self.changes = {change.site.name: change for change in changes}
        self.begun: dict[str, tuple[Undo, Restorer, Started]] = {}  # where some tiles are read

    def sites(self) -> Iterable[Site]:
        return [change.site for change in self.changes.values()]

    def reads(self, tensor: str) -> Sequence[str]:
        """The tensors of the source that one of the outcome depends on."""
        return reads_of(self.changes, tensor)

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        """CheckError where the record does not fit the merged weight."""
        change, rows = self.changes[site.name], site.rows(rows)
        merged = None if change.new else self.source.load(site, rows).tensors["weight"]
        if site.name not in self.begun:
            undo = self.undo(change)
            self.begun[site.name] = undo, Restorer(undo.streams or {}), change.started()
        undo, restorer, started = self.begun[site.name]
        if ends(site, rows):
            del self.begun[site.name]
        if undo.kept is not None:
            return Packed({"weight": undo.kept(rows)})
        steps = elementwise(change, rows, started)
        assert merged is not None
        assert steps is not None  # what has no steps is kept
        return Packed({"weight": restorer.restore(merged, steps, undo.dtype)})
