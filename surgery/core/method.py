"""Method: what an adapter computes at one site. One formula serves forward, merge and unmerge."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Self

from torch import Tensor

from surgery.core.op import Op, Tile
from surgery.core.site import Site

Params = Mapping[str, Tensor]  # the method's tensors by role, in the paper's letters
Product = Callable[[Tensor, Tensor], Tensor]  # [out, r], [r, in] -> [out, in]
Run = Callable[[Tensor], Tensor]


class Dense(NamedTuple):
    """All that a method may see of a base: weight [out, in] and bias [out]."""

    weight: Tensor
    bias: Tensor | None = None


class Spec(NamedTuple):
    """A method's tensor as PEFT spells it: `lora_A.weight`, and its shape."""

    spelling: str
    shape: tuple[int, ...]


class Elementwise(NamedTuple):
    """What a merge does to each element by itself: w + shift. Never decreasing in w."""

    shift: Tensor  # [out, in] of a tile, scaled

    def apply(self, w: Tensor) -> Tensor:
        return w + self.shift

    def undo(self, w: Tensor) -> Tensor:
        return w - self.shift

    def at(self, where: Tensor) -> "Elementwise":
        """The same for the elements at flat positions `where`."""
        return Elementwise(self.shift.flatten().index_select(0, where))


@dataclass(frozen=True)
class Method(ABC):
    """One site's settings, patterns resolved; holds no tensor."""

    reproducible: ClassVar[bool]
    undo: ClassVar[Literal["index", "residual", "copy"]]
    couples: ClassVar[frozenset[str]]

    @abstractmethod
    def tensors(self, site: Site) -> Mapping[str, Spec]:
        """Its tensors at this site, by role."""

    @abstractmethod
    def init(self, site: Site) -> Params:
        """Fresh float32 tensors that leave the site's output equal."""

    @abstractmethod
    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        """The base with the adapter in it; `base` is `tile` of the whole, `p` is whole."""

    @abstractmethod
    def steps(self, p: Params, tile: Tile, product: Product) -> Elementwise | None:
        """The merge as an elementwise step of this tile; None where elements depend on each other."""

    @abstractmethod
    def spread(self, p: Params, tile: Tile) -> Tensor:
        """[out, in] of the tile: how far two correct merges in the factors' dtype may lie apart."""

    @abstractmethod
    def settings(self) -> Mapping[str, str]:
        """What makes its merge differ from another's with the same tensors, for reports; floats as hex."""

    @abstractmethod
    def weighted(self, weight: float) -> Self:
        """The same method at `weight` times its strength."""

    @abstractmethod
    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        """The adapted output, in activation space; `run(x)` is the layer below."""


@dataclass(frozen=True)
class Additive(Method):
    """W + scaling * delta. A subclass writes `delta`, unscaled, and its `spread`."""

    scaling: float

    reproducible = True
    undo = "index"
    couples = frozenset()

    @abstractmethod
    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        """[out, in] of the tile, before scaling."""

    def steps(self, p: Params, tile: Tile, product: Product) -> Elementwise:
        # The scaling is an operation of its own: fused with the addition it would round differently.
        return Elementwise(self.scaling * self.delta(p, tile, product))

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        return base._replace(weight=self.steps(p, tile, product).apply(base.weight))

    def settings(self) -> Mapping[str, str]:
        return {"scaling": self.scaling.hex()}

    def weighted(self, weight: float) -> Self:
        return replace(self, scaling=self.scaling * weight)
