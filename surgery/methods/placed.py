"""Placed: W + scaling * numbers that an adapter holds as they are, each put where it belongs, without a sum."""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from surgery.core.arithmetic import exact_float64, require_finite
from surgery.core.elementwise import Shift
from surgery.core.method import Additive, Dense, Params, Product
from surgery.core.op import Tile
from surgery.methods.spreads import unit_of


@dataclass(frozen=True)
class Placed(Additive):
    """A subclass writes `numbers`; one that rounds them adds to the `spread`."""

    @abstractmethod
    def numbers(self, p: Params, tile: Tile) -> Tensor:
        """[out, in] of the tile, before they are scaled."""

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:  # noqa: ARG002  # no product in it
        return self.scaled(self.numbers(p, tile))

    def scaled(self, values: Tensor) -> Tensor:
        return values if self.scaling == 1 else values * self.scaling

    def steps(self, p: Params, tile: Tile, product: Product) -> Shift:
        for role, values in p.items():
            require_finite(values, role)
        wide = {role: exact_float64(values) if values.is_floating_point() else values for role, values in p.items()}
        return Shift(self.delta(wide, tile, product))

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        return base._replace(weight=base.weight + self.delta(p, tile, product))

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # The scaling rounds once; what is added has no other operation.
        unit = unit_of(*(values for values in p.values() if values.is_floating_point()))
        return unit * abs(self.scaling) * exact_float64(self.numbers(p, tile)).abs()
