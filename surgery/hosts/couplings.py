"""Couplings: the sums over a whole weight that some methods ask for, gathered a tile at a time."""

from collections.abc import Callable, Iterable
from itertools import groupby

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
    """The sums for the layers over one weight, of that weight or of the one beside it.

    Where its stored rows hold all inputs of some outputs, those rows are enough for these. Where they hold some
    inputs of all outputs, or are of the other weight, the whole is read first, once.
    """

    def __init__(self, site: Site, started: Started, beside: Site | None = None) -> None:
        self.site, self.started, self.apart = beside or site, started, beside is not None
        self.asking = [index for index, (layer, _) in enumerate(started) if layer.method.couples]
        self.sums: dict[int, Tensor] = {}
        self.whole = False

    def told(self, rows: slice, load: Load) -> Started:
        """The layers with the sums that `rows` of the stored weight need; with all, after its last rows."""
        tiles: Iterable[slice] = () if self.whole else [rows]
        if not self.whole and (self.apart or self.site.acting.tile(rows)[1] != slice(None)):
            tiles = row_tiles(self.site.weight.shape, TILE_ELEMENTS, self.site.together)
            self.whole = True
        for outputs, of_these in groupby(tiles, lambda one: self.site.acting.tile(one)[0]):
            self._gather(outputs, of_these, load)
        found = ((one._replace(sums=self.sums.get(i, one.sums)), by) for i, (one, by) in enumerate(self.started))
        return tuple(found)

    def _gather(self, outputs: slice, tiles: Iterable[slice], load: Load) -> None:
        trees = {index: TreeSum() for index in self.asking}
        for rows in tiles:
            matrix, tile = self.site.acting.matrix(load(rows)), self.site.acting.tile(rows)
            for index, tree in trees.items():
                layer, product = self.started[index]
                tree.feed(layer.method.terms(matrix, layer.params, tile, product).transpose(0, 1))
        for index, tree in trees.items():
            total = tree.total().cpu()
            if index not in self.sums:
                self.sums[index] = total.new_full((self.site.shape[0], *total.shape[1:]), torch.nan)
            self.sums[index][outputs] = total
