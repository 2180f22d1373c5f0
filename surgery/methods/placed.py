"""Placed: W + scaling * numbers that an adapter holds as they are, each put where it belongs, without a sum."""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from surgery.core.arithmetic import exact_float64
from surgery.core.method import Additive, Params, Product
from surgery.core.op import Tile
from surgery.methods.spreads import unit_of


@dataclass(frozen=True)
class Placed(Additive):
    """A subclass writes `numbers`; one that rounds them adds to the `spread`."""

    @abstractmethod
    def numbers(self, p: Params, tile: Tile) -> Tensor:
        """[out, in] of the tile, before they are scaled, in the dtype of `p`."""

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        held = {
            role: product.held(values, role) if values.is_floating_point() else values for role, values in p.items()
        }
        return self.scaled(self.numbers(held, tile))

    def scaled(self, values: Tensor) -> Tensor:
        return values if self.scaling == 1 else values * self.scaling

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # The scaling rounds once; what is added has no other operation.
        unit = unit_of(*(values for values in p.values() if values.is_floating_point()))
        return unit * abs(self.scaling) * exact_float64(self.numbers(p, tile)).abs()
