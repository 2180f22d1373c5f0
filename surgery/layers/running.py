"""What runs at a layer: adapters over one another, the lowest over the base layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from surgery.core.arithmetic import float_product
from surgery.core.elementwise import Growth
from surgery.core.layered import layered, on_bias
from surgery.core.method import Dense, Method, Params, Product, Run
from surgery.core.op import WHOLE, Op
from surgery.core.room import Room
from surgery.core.sharded import gathered
from surgery.core.site import Site
from surgery.core.sums import sum_rows
from surgery.core.turned import tied
from surgery.layers.aware import Holding
from surgery.layers.mixed import Mixed
from surgery.layers.plain import is_plain_linear
from surgery.layers.slot import Holder, Slot


class Under(Protocol):
    """The layer that the adapters lie over."""

    op: Op
    site: Site
    training: bool
    _modules: dict[str, nn.Module | None]

    def dense(self) -> Dense:
        """The base layer's weight as a matrix, and its bias."""
        ...


@dataclass(frozen=True, eq=False)
class Fitted:
    """One adapter at this layer: its method, and where each tensor is held.

    No tuple: torch.export copies those that a module has, with all that they hold, and leaves the copies there.
    """

    method: Method
    holders: Mapping[str, Holder]
    slots: Mapping[str, Slot]
    aware: Holding | None = None  # of what it is trained to become
    shared: bool = False  # does each process hold a share of it, of which nothing but this layer knows?

    has_room: ClassVar[bool] = False  # for tensors of other shapes

    @property
    def params(self) -> Params:
        return self.own(self.held)

    @property
    def held(self) -> Params:
        """The tensors in the model."""
        found = {}
        for role, (held, key) in self.holders.items():
            values = held[key]
            assert values is not None
            found[role] = values
        return found

    def own(self, held: Params) -> Params:
        """What of tensors as they are held is the adapter's."""
        return held

    def laid(self, method: Method, p: Params, where: str) -> Params:  # noqa: ARG002  # for those with room
        """Tensors that are to take the place of these, as they are to be held."""
        return p

    def retuned(self, method: Method) -> "Fitted":
        """The same tensors under another method."""
        return self if method == self.method else replace(self, method=method)

    def branch(self, x: Tensor, below: Run, op: Op, training: bool) -> Tensor:
        """The adapted output, over the layer below."""
        return self.method.branch(x, below, op, self._running(), training)

    @property
    def computed(self) -> Params:
        """The parameters as the layer computes with them."""
        return self._whole(self.params)

    def _running(self) -> Params:
        """As `held`, without a look at each."""
        params: Any = {role: held[key] for role, (held, key) in self.holders.items()}
        return self._whole(params)

    def _whole(self, params: Params) -> Params:
        return {role: gathered(values) for role, values in params.items()} if self.shared else params


@dataclass(frozen=True, eq=False)
class Swappable(Fitted):
    """One with room for others: what is compiled reads the tensors alone, so that its method may become another."""

    room: Room = field(kw_only=True)

    has_room = True

    def own(self, held: Params) -> Params:
        return self.room.own(self.method, held)

    def laid(self, method: Method, p: Params, where: str) -> Params:
        return self.room.laid(method, p, where)

    def retuned(self, method: Method) -> Fitted:
        self.__dict__["method"] = method
        return self

    def branch(self, x: Tensor, below: Run, op: Op, training: bool) -> Tensor:
        return self.room.branch(x, below, op, self._running(), training)


@dataclass(frozen=True, eq=False)
class Tied(Fitted):
    """One that holds nothing: its tensors are those of the layer `of`, by which the two weights stay one."""

    of: str = field(kw_only=True)
    op: Op = field(kw_only=True)  # by which its own layer acts, where the other is an embedding

    @property
    def held(self) -> Params:
        return self._running()

    def _running(self) -> Params:
        return tied(self.op, super()._running())


def effective(base: Dense, running: Sequence[Fitted | Mixed], site: Site, product: Product) -> Dense:
    """What adapters make of a weight and a bias, in their order."""
    layers = []
    for one in running:
        one.method.refuse_merge(site)
        p = one.method.matrices(one.computed, site)
        if one.method.couples:
            p = one.method.told(p, sum_rows(one.method.terms(base.weight, p, WHOLE, product)))
        layers.append((one.method, p))
    return layered(base, layers, site, product)


class Below:
    """What lies under an adapter, as its branch sees it (core.method.Run): here the base layer alone."""

    __slots__ = ("args", "dtype", "kwargs", "layer")

    def __init__(self, layer: Under, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer, self.args, self.kwargs = layer, args, kwargs
        self.dtype: torch.dtype | None = None  # of what the base layer gave

    def __call__(self, x: Tensor, /) -> Tensor:
        base_layer: Any = self.layer._modules["base_layer"]
        below: Tensor = base_layer(x, *self.args, **self.kwargs)
        self.dtype = below.dtype
        return below

    def base(self) -> Dense:
        return self.layer.dense()

    def plain(self) -> Dense | None:
        base_layer: Any = self.layer._modules["base_layer"]
        given = self.args or self.kwargs
        return self.layer.dense() if not given and is_plain_linear(base_layer) else None

    def laid(self) -> Dense:
        return self.layer.dense()

    def bias(self) -> Tensor | None:
        return self.layer.dense().bias


class Over:
    """The same where other adapters lie between: the last of them, over what is below it."""

    __slots__ = ("below", "one")

    def __init__(self, one: Fitted | Mixed, below: "Below | Over") -> None:
        self.one, self.below = one, below

    @property
    def layer(self) -> Under:
        return self.below.layer

    def __call__(self, x: Tensor, /) -> Tensor:
        return self.one.branch(x, self.below, self.layer.op, self.layer.training)

    def base(self) -> Dense:
        return self.layer.dense()

    def plain(self) -> None:
        return None

    def laid(self) -> Dense:
        layers: list[Fitted | Mixed] = []
        over: Below | Over = self
        while isinstance(over, Over):
            layers.insert(0, over.one)
            over = over.below
        return effective(over.laid(), layers, self.layer.site, float_product)

    def bias(self) -> Tensor | None:
        bias, own = self.below.bias(), self.one.method.for_bias()
        if own is None:
            return bias
        base = self.base() if bias is None or own.couples or own.of_base else None
        if bias is None:  # the adapter may bring one
            assert base is not None
            bias = base.weight.new_zeros(len(base.weight))
        out = self._on(bias.unsqueeze(1), base)  # [out, 1]
        return out.squeeze(1).to(bias.dtype)

    def _on(self, column: Tensor, base: Dense | None) -> Tensor:
        """A bias, as a matrix, with what is made of it, maybe by way of the base."""
        method = self.one.method
        matrices = method.matrices(self.one.computed, self.layer.site)
        ((own, p),) = on_bias(column if base is None else base.weight, [(method, matrices)], float_product)
        step = own.steps(p, WHOLE, float_product)
        if isinstance(step, Growth):
            known = None if base is None else base.bias
            step = step.over(torch.zeros_like(column) if known is None else known.unsqueeze(1))
        return own.merge(Dense(column), p, WHOLE, float_product).weight if step is None else step.apply(column)
