"""Bias: the vector [out] that a layer adds, as a matrix [out, 1] that acts on the number 1."""

from dataclasses import dataclass

from torch import Tensor

from surgery.core.op import Tile
from surgery.core.site import Site
from surgery.ops.multiplying import Multiplying


@dataclass(frozen=True)
class Bias(Multiplying):
    """No module of its own: a method that changes a site's bias meets it so."""

    name = "bias"

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.unsqueeze(1)  # [out] -> [out, 1]

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.squeeze(1)  # [out, 1] -> [out]

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        return stored[0], 1

    def tile(self, rows: slice) -> Tile:
        return rows, slice(None)


def bias_site(site: Site) -> Site | None:
    """The bias of a site, as one of its own; None if it has none."""
    held = site.tensors.get("bias")
    return None if held is None else Site(held.name, {"weight": held}, Bias())
