"""Scattered: W + scaling * S, where S is zero but for a few numbers, no two of them in one place."""

from dataclasses import dataclass

from torch import Tensor

from surgery.core.method import Params
from surgery.core.op import Tile
from surgery.methods.placed import Placed
from surgery.methods.sparse import laid_in


@dataclass(frozen=True)
class Scattered(Placed):
    """Its `matrices` give v, rows and columns, [numbers] each, and a frame [out, in, 0] of the weight's shape."""

    def numbers(self, p: Params, tile: Tile) -> Tensor:
        return laid_in(tile, p["v"], p["rows"], p["columns"], p["frame"].shape[:2])
