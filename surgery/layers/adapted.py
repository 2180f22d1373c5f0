"""Adapted: a layer with adapters over it; any method, any op."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from surgery.core.arithmetic import float_product
from surgery.core.method import Dense, Method, Params, Product
from surgery.core.op import Op
from surgery.core.room import Room
from surgery.core.sharded import is_sharded, whole
from surgery.core.site import Site
from surgery.layers.aware import Holding, held_merge
from surgery.layers.bare import Bare
from surgery.layers.called import inputs_of
from surgery.layers.mixed import Mixed, Rows
from surgery.layers.running import Below, Fitted, Over, Swappable, effective
from surgery.layers.slot import Slot, let_go

Effective = Callable[[Dense, Product], Dense]  # what the running adapters make of a weight, by products of some kind
Laying = Callable[[Dense, Effective], Dense]


class Adapted(Bare):
    """Runs `base_layer` with the active adapters in their order; `weight` and `bias` are the effective ones.

    The outcome has the dtype that the base layer alone would give. What is not found here is looked up in
    the base layer.
    """

    site: Site
    op: Op
    fitted: dict[str, Fitted]
    active: tuple[str, ...] = ()
    enabled = True
    hashed: Any = None  # sha256 of the base weight, and which state of its memory that is of
    merged: Any = None  # what undoes the merge, while the base weight holds the active adapters
    beneath: nn.Module | None = None  # the layer that `base_layer` stands in for, while it is merged
    running: tuple[Fitted | Mixed, ...] = ()
    aware: Holding | None = None  # in what format the effective weight is held, if a running adapter asks for one
    laying: Laying | None = None  # how its effective weight is made, where it is to run on that whatever its op
    decode: Callable[[nn.Module], Tensor] | None = None  # of a base layer that holds its weight otherwise than plainly

    def __init__(self, base_layer: nn.Module, site: Site, decode: Callable[[nn.Module], Tensor] | None = None) -> None:
        super().__init__()
        # Past nn.Module's __setattr__, which looks for parameters everywhere and takes microseconds.
        self._modules["base_layer"] = base_layer
        self.__dict__.update(site=site, op=site.acting, fitted={}, decode=decode)

    def fit(  # noqa: PLR0913, PLR0917  # an adapter, and how it is held
        self,
        adapter: str,
        method: Method,
        params: Params,
        trainable: bool,
        aware: Holding | None = None,
        room: Room | None = None,
    ) -> None:
        """Lay an adapter over the layer; it is not active yet. With `room`, `params` are as they are held there."""
        slots, holders = {}, {}
        for role, spec in (method if room is None else room).tensors(self.site).items():
            name, leaf = spec.held
            slot = self._modules.get(name)
            if not isinstance(slot, Slot):
                slot = Slot()
                self._modules[name] = slot
            values, slots[role] = params[role], slot
            holders[role] = (
                slot.fix(adapter, leaf, values) if spec.fixed else slot.put(adapter, leaf, values, trainable)
            )
        shared = any(map(is_sharded, params.values()))
        if room is None:
            self.fitted[adapter] = Fitted(method, holders, slots, aware, shared)
        else:
            slots["s"].leave_out(adapter)
            self.fitted[adapter] = Swappable(method, holders, slots, aware, shared, room=room)

    def unfit(self, adapter: str) -> None:
        """Take an adapter away."""
        for slot in self.fitted.pop(adapter).slots.values():
            slot.remove(adapter)
        let_go(self._modules, {slot for one in self.fitted.values() for slot in one.slots.values()})
        self.activate(tuple(name for name in self.active if name != adapter), self.enabled)

    def retune(self, adapter: str, method: Method) -> None:
        """The adapter's method from now on is another one, with tensors of the same shapes."""
        one = self.fitted[adapter]
        self.fitted[adapter] = one.retuned(method)
        if self.fitted[adapter] is not one:
            self.activate(self.active, self.enabled)

    def activate(self, adapters: tuple[str, ...], enabled: bool) -> None:
        """Those of `adapters` that lie over this layer run from now on, in this order, if `enabled`."""
        active = tuple(name for name in adapters if name in self.fitted)
        running = active if enabled and self.merged is None else ()
        chosen = tuple(self.fitted[name] for name in running)
        aware = next((one.aware for one in chosen if one.aware is not None), None)
        self.__dict__.update(active=active, enabled=enabled, running=chosen, aware=aware)

    def mix(self, rows: Rows) -> None:
        """Each row of a batch runs under its own adapter from now on, until `activate`."""
        self.__dict__["running"] = (Mixed(self.site.name, rows, self.fitted),)

    def forward(self, *given: Any, **kwargs: Any) -> Any:
        base_layer: Any = self._modules["base_layer"]
        if not self.running:
            own = self.beneath
            return base_layer(*given, **kwargs) if own is None else self._run_stand_in(own, given, kwargs)
        if self.op.roles or self.laying is not None:  # its weights are read, and nothing else could be put in the way
            return functional_call(base_layer, self._read_weights(), given, kwargs)
        given = inputs_of(self.innermost, given, kwargs)
        if not given or (self.aware is not None and (given[1:] or kwargs)):
            return base_layer(*given, **kwargs)  # which says what is missing, or too much
        if self.aware is not None:
            return self._run_held(given[0])
        bottom = Below(self, given[1:], kwargs)
        above: Below | Over = bottom
        for one in self.running[:-1]:
            above = Over(one, above)
        out = self.running[-1].branch(given[0], above, self.op, self.training)
        return out if out.dtype == bottom.dtype or bottom.dtype is None else out.to(bottom.dtype)

    def _read_weights(self) -> dict[str, Tensor]:
        """What the base layer reads in place of its own, by its names."""
        if self.op.alone:
            return {f"{'base_layer.' * (self.depth - 1)}{self.parameter}": self._weight()}
        roles = self.op.roles or {"weight": "weight", "bias": "bias"}
        weights = {own: getattr(self, role) for role, own in roles.items()}
        return {own: values for own, values in weights.items() if values is not None}

    @property
    def parameter(self) -> str | None:
        """The name of the one parameter that it adapts, where it does not adapt a layer."""
        return self.op.roles["weight"] if self.op.alone else None

    @property
    def innermost(self) -> nn.Module:
        """The model's own module."""
        module: Any = self._modules["base_layer"]
        return module.innermost if isinstance(module, Adapted) else module

    @property
    def depth(self) -> int:
        """How many such wrappers lie over the model's own module, this one and those below it."""
        module = self._modules["base_layer"]
        return 1 + (module.depth if isinstance(module, Adapted) else 0)

    def dense(self) -> Dense:
        """The base layer's weight as a matrix, and its bias."""
        base: Any = self._modules["base_layer"]
        bias = None if self.op.alone else base._parameters.get(self.op.roles.get("bias", "bias"))
        return Dense(self.op.matrix(self._stored()), None if bias is None else whole(bias))

    def _effective(self, base: Dense, product: Product) -> Dense:
        """What the running adapters make of a weight and a bias."""
        return effective(base, self.running, self.site, product)

    def _laid(self) -> Dense:
        base = self.dense()
        return self._effective(base, float_product) if self.laying is None else self.laying(base, self._effective)

    def _run_stand_in(self, own: nn.Module, given: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer that stands in, in whatever dtype the model's own takes."""
        given = inputs_of(own, given, kwargs)
        if len(given) != 1 or kwargs:
            return own(*given, **kwargs)  # which says what is missing, or too much
        x = given[0] if self.decode is not None else given[0].to(self.base_weight.dtype)
        return self.base_layer(x).to(given[0].dtype)

    def _run_held(self, x: Tensor) -> Tensor:
        """As the merged layer will run once its weight is held in the format."""
        weight, bias = self._held()
        return self.op.apply(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)

    def _held(self) -> Dense:
        """The effective weight and bias as the merge will be held."""
        assert self.aware is not None
        return held_merge(self.aware, self.base_layer, self.dense(), self._effective)

    def _stored(self) -> Tensor:
        """The base layer's weight as floats."""
        return whole(self.base_weight) if self.decode is None else self.decode(self.base_layer)

    @property
    def base_weight(self) -> Tensor:
        """The base layer's own parameter."""
        held: Any = self.innermost if self.op.alone else self._modules["base_layer"]
        weight: Tensor = getattr(held, self.op.roles.get("weight", "weight"))
        return weight

    @property
    def weight(self) -> Tensor:
        """The stored weight with the running adapters in it, differentiable; without any, the base layer's own."""
        return self._beside("weight") if self.op.alone else self._weight()

    @property
    def bias(self) -> Tensor | None:
        """The same of the bias, if there is one."""
        if self.op.alone:
            return self._beside("bias")
        base: Any = self._modules["base_layer"]
        held: Tensor | None = base._parameters.get(self.op.roles.get("bias", "bias"))
        if held is None or not any(one.method.for_bias() for one in self.running):
            return held
        bias = (self._laid() if self.aware is None else self._held()).bias
        return None if bias is None else bias.to(held.dtype)

    def _weight(self) -> Tensor:
        if not self.running:
            return self.base_weight
        if self.aware is not None:
            return self._held().weight
        held = self._stored()
        return self.op.stored(self._laid().weight).to(held.dtype).view(held.shape)

    def _beside(self, name: str) -> Tensor:
        """A parameter of the module, of which it adapts one."""
        values: Tensor = self._weight() if name == self.parameter else getattr(self._modules["base_layer"], name)
        return values

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # while being unpickled
                raise
            for role, own in self.op.roles.items():
                if name == own:  # a caller that reads weights gets the effective ones
                    return self._weight() if self.op.alone else getattr(self, role)
            return getattr(super().__getattr__("base_layer"), name)


def base_of(module: nn.Module) -> nn.Module:
    """A module without the adapters that lie over it, if any do."""
    base: nn.Module = module.base_layer if isinstance(module, Adapted) else module
    return base
