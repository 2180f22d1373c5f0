"""Method: what an adapter computes at one site. One formula serves forward, merge and unmerge."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from surgery.core.elementwise import Elementwise, Shift
from surgery.core.op import Op, Tile
from surgery.core.site import Site
from surgery.core.spec import Spec

Params = Mapping[str, Tensor]  # the method's tensors by role, in the paper's letters


class Product(Protocol):
    """B [out, r], A [r, in], or stacks of such -> the tile of scaling * (B @ A); `fine` to more than float32 tells."""

    def __call__(self, B: Tensor, A: Tensor, tile: Tile, scaling: float, /, *, fine: bool = False) -> Tensor: ...

    def held(self, values: Tensor, role: str, /) -> Tensor:
        """Numbers of an adapter as it takes factors, for what is made of them without a product."""
        ...


class Dense(NamedTuple):
    """All that a method may see of a base: weight [out, in] and bias [out]."""

    weight: Tensor
    bias: Tensor | None = None


class Run(Protocol):
    """The layer below, base or adapters: called with an input it gives its output."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def base(self) -> Dense:
        """The base layer's own weight and bias, without what is laid over them."""
        ...

    def plain(self) -> Dense | None:
        """The same where the layer below is its op with them and nothing else, so that it need not be called."""
        ...

    def laid(self) -> Dense:
        """The weight and bias of the layer below, with what is laid over them; without what it does in training."""
        ...

    def bias(self) -> Tensor | None:
        """What the output holds whatever the input: the base layer's bias, as the adapters below leave it."""
        ...


@dataclass(frozen=True)
class Method(ABC):
    """One site's settings, patterns resolved; holds no tensor."""

    name: ClassVar[str]  # as users know it
    of_base: ClassVar[bool] = False  # does it add to what lies below what it makes of the base? Its step is a Growth
    turns: ClassVar[bool] = False  # is the same with A and B turned, in each other's place, its delta transposed?
    couples: ClassVar[frozenset[str]]  # along which axes elements depend on each other, by sums: see `terms`
    mixes: ClassVar[bool] = False  # does it make elements of several of the base's? See `Mixing`

    @property
    def leaves_weight(self) -> bool:
        """Does it change the bias alone?"""
        return False

    @property
    def replaced_rows(self) -> tuple[int, ...]:
        """Rows that it replaces by those of its only tensor, "t", whatever stood there; most replace none."""
        return ()

    @property
    def together(self) -> int:
        """Tiles hold multiples of so many rows of the stored weight, which it makes of each other."""
        return 1

    @abstractmethod
    def tensors(self, site: Site) -> Mapping[str, Spec]:
        """Its tensors at this site, by role."""

    def matrices(self, p: Params, site: Site) -> Params:  # noqa: ARG002  # for those that depend on it
        """Its tensors as `merge`, `steps` and `spread` take them: [out, r] and [r, in], in place of PEFT's shapes."""
        return p

    def work_bytes(self, site: Site) -> int:  # noqa: ARG002  # of most it is next to nothing
        """What `matrices`, and their grids, take at a site beside its tensors."""
        return 0

    def refuse_merge(self, site: Site) -> None:  # noqa: B027  # most can be merged anywhere
        """MatchError where no weight of this site's shape holds what the adapter computes."""

    def check_values(self, p: Params, site: Site, where: str) -> None:  # noqa: B027  # most can hold any
        """ValueRangeError for tensors of the file `where` that mean nothing at this site: indices beyond it."""

    def check_run(self, site: Site) -> None:  # noqa: B027  # most run anywhere
        """ConfigError for settings that could not act, or train, as they say at this site."""

    def reread(self, method: "Method", p: Params) -> Params | None:  # noqa: ARG002  # for those that have such files
        """Its tensors out of `p` of `method`, as which its files spell it; None where that is not what they spell."""
        return None

    @abstractmethod
    def init(self, site: Site, base: Callable[[], Dense]) -> Params:
        """Fresh float32 tensors that leave the site's output equal; the base is asked for only if they need it."""

    def prepared(self, p: Params, product: Product) -> Params:  # noqa: ARG002  # for those whose tiles share something
        """`p`, out of `matrices`, with what its merge makes of it once for all tiles, if these are many."""
        return p

    def terms(self, base: Tensor, p: Params, tile: Tile, product: Product) -> Tensor:  # noqa: ARG002  # for those that couple
        """[out, in] of the tile, where elements depend on each other: what of each is summed along what it couples;
        or [out, in, n], for n sums.

        `base` is the weight before any adapter, as it is of the sums that `told` takes.
        """
        return torch.zeros_like(base)

    def told(self, p: Params, sums: Tensor) -> Params:  # noqa: ARG002  # for those that couple
        """`p` with what the sums [out], or [out, n], of all terms tell: with it, the merge is one of elements."""
        return p

    @abstractmethod
    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        """The base with the adapter in it; `base` is `tile` of the whole, `p` is whole."""

    @abstractmethod
    def steps(self, p: Params, tile: Tile, product: Product) -> Elementwise | None:
        """The merge as an elementwise step of this tile; None where elements depend on what `p` does not tell."""

    def for_bias(self) -> "Method | None":
        """What it makes of the site's bias, as a matrix [out, 1]; None leaves it alone.

        The sums of one that couples are over the site's weight.
        """
        return None

    def directions(self, p: Params) -> Tensor | None:  # noqa: ARG002  # most know none
        """[r, in]: along which it looks at its inputs, where these alone matter to it."""
        return None

    def factors(self, p: Params) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002  # most add other things
        """B [out, r], scaled, and A [r, in], where what it adds is their product and nothing else."""
        return None

    @abstractmethod
    def spread(self, p: Params, tile: Tile) -> Tensor:
        """[out, in] of the tile, or what broadcasts over it: how far two correct merges in the factors' dtype may
        lie apart, beyond what rounding their outcomes explains, whatever the base is."""

    def spread_over(self, base: Tensor, outcome: Tensor, p: Params, tile: Tile, dtype: torch.dtype) -> Tensor:  # noqa: ARG002  # most depend on neither
        """The same, with what is in proportion to the base or the outcome, which are of the tile; of merges that hold
        in `dtype` what they multiply the base with."""
        return self.spread(p, tile)

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
    """W + delta. A subclass writes `delta` and its `spread`."""

    scaling: float

    couples = frozenset()

    @abstractmethod
    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        """[out, in] of the tile, scaled, by an operation of its own: one fused with another rounds differently."""

    def steps(self, p: Params, tile: Tile, product: Product) -> Shift:
        return Shift(self.delta(p, tile, product))

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        return base._replace(weight=self.steps(p, tile, product).apply(base.weight))

    def settings(self) -> Mapping[str, str]:
        return {"scaling": self.scaling.hex()}

    def weighted(self, weight: float) -> Self:
        return replace(self, scaling=self.scaling * weight)


@dataclass(frozen=True)
class AtStrength(Method):
    """One that at another strength than 1 goes so much of the way from the base to its merge."""

    strength: float = field(default=1.0, kw_only=True)

    def settings(self) -> Mapping[str, str]:
        return {"strength": self.strength.hex()}

    def weighted(self, weight: float) -> Self:
        return replace(self, strength=self.strength * weight)


@dataclass(frozen=True)
class Mixing(Method):
    """One whose every element of the outcome is made of several of the base's, by products.

    Its `merge` takes tiles of whole rows of the stored weight, within which it mixes, or of groups of rows, `together`,
    among which. It has no steps, for nothing tells an element back from its outcome: undo keeps the weight. A subclass
    writes `merge`, `prepared` and `strayed`.
    """

    couples = frozenset()
    mixes = True

    def steps(self, p: Params, tile: Tile, product: Product) -> None:  # noqa: ARG002  # whatever they are
        return None

    @abstractmethod
    def strayed(self, base: Tensor, error: Tensor, p: Params, tile: Tile) -> Tensor:
        """[out, in] of the tile: how far from its outcome a correct merge in the factors' dtype may lie, of a base
        that is off by `error`. What rounding the outcome explains comes besides."""

    def held_off(self, base: Tensor, p: Params, tile: Tile, dtype: torch.dtype) -> Tensor | float:  # noqa: ARG002  # most have none
        """The same besides, of merges that hold in `dtype` what they multiply with."""
        return 0.0

    def spread(self, p: Params, tile: Tile) -> Tensor:  # noqa: ARG002  # the same
        return torch.zeros(1, 1, dtype=torch.float64)  # `strayed` tells all
