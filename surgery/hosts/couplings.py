"""Couplings: the sums over a whole weight that some methods ask for, gathered a tile at a time."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from surgery.core.adapter import Layer, Started
from surgery.core.site import Site
from surgery.core.source import TILE_ELEMENTS, row_tiles
from surgery.core.sums import TreeSum

Load = Callable[[slice], Tensor]  # rows of the stored weight before any layer, in float64


def coupled(layers: Iterable[Layer]) -> bool:
    """Does one of them ask for sums that are not there?"""
    return any(layer.method.couples and layer.sums is None for layer in layers)


class Couplings:
    """The sums for the layers over one weight.

    Where its stored rows hold all inputs of some outputs, those rows are enough for these. Where they hold some
    inputs of all outputs, the whole weight is read first, once.
    """

    def __init__(self, site: Site, started: Started) -> None:
        self.site, self.started = site, started
        unknown = torch.full((site.shape[0],), torch.nan, dtype=torch.float64)
        self.sums = {i: unknown.clone() for i, (layer, _) in enumerate(started) if layer.method.couples}
        self.whole = False

    def told(self, rows: slice, load: Load) -> Started:
        """The layers with the sums that `rows` of the stored weight need; with all, after its last rows."""
        outputs, inputs = self.site.acting.tile(rows)
        if inputs == slice(None):
            self._gather(outputs, [rows], load)
        elif not self.whole:
            self._gather(outputs, row_tiles(self.site.weight.shape, TILE_ELEMENTS), load)
            self.whole = True
        found = ((one._replace(sums=self.sums.get(i, one.sums)), by) for i, (one, by) in enumerate(self.started))
        return tuple(found)

    def _gather(self, outputs: slice, tiles: Iterable[slice], load: Load) -> None:
        trees = {index: TreeSum() for index in self.sums}
        for rows in tiles:
            matrix, tile = self.site.acting.matrix(load(rows)), self.site.acting.tile(rows)
            for index, tree in trees.items():
                layer, product = self.started[index]
                tree.feed(layer.method.terms(matrix, layer.params, tile, product).T)
        for index, tree in trees.items():
            self.sums[index][outputs] = tree.total().to(self.sums[index].device)
