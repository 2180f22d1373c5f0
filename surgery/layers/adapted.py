"""Adapted: a layer with adapters over it; any method, any op."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.core.adapter import Layer
from surgery.core.arithmetic import float_product
from surgery.core.method import Dense, Method, Params
from surgery.core.op import WHOLE, Op
from surgery.core.site import Site
from surgery.layers.slot import Slot

Holder = tuple[dict[str, nn.Parameter | None], str]


class Fitted(NamedTuple):
    """One adapter at this layer: its method, and where each tensor is held."""

    method: Method
    holders: Mapping[str, Holder]
    slots: Mapping[str, Slot]

    @property
    def params(self) -> Params:
        found = {}
        for role, (held, key) in self.holders.items():
            values = held[key]
            assert values is not None
            found[role] = values
        return found


class Adapted(nn.Module):
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
    running: tuple[Fitted, ...] = ()

    def __init__(self, base_layer: nn.Module, site: Site) -> None:
        super().__init__()
        # Past nn.Module's __setattr__, which looks for parameters everywhere and takes microseconds.
        self._modules["base_layer"] = base_layer
        self.__dict__.update(site=site, op=site.acting, fitted={})

    def fit(self, adapter: str, method: Method, params: Params, trainable: bool) -> None:
        """Lay an adapter over the layer; it is not active yet."""
        slots = {}
        for role, spec in method.tensors(self.site).items():
            name, _, leaf = spec.spelling.partition(".")
            slot = self._modules.get(name)
            if not isinstance(slot, Slot):
                slot = self._modules[name] = Slot()
            slot.put(adapter, leaf, params[role], trainable)
            slots[role] = slot
        holders = {role: slot.holder(adapter) for role, slot in slots.items()}
        self.fitted[adapter] = Fitted(method, holders, slots)

    def unfit(self, adapter: str) -> None:
        """Take an adapter away."""
        for slot in self.fitted.pop(adapter).slots.values():
            slot.remove(adapter)
        self.activate(tuple(name for name in self.active if name != adapter), self.enabled)

    def retune(self, adapter: str, method: Method) -> None:
        """The adapter's method from now on is another one, with tensors of the same shapes."""
        if self.fitted[adapter].method != method:
            self.fitted[adapter] = self.fitted[adapter]._replace(method=method)
            self.activate(self.active, self.enabled)

    def activate(self, adapters: tuple[str, ...], enabled: bool) -> None:
        """Those of `adapters` that lie over this layer run from now on, in this order, if `enabled`."""
        active = tuple(name for name in adapters if name in self.fitted)
        running = active if enabled and self.merged is None else ()
        chosen = tuple(self.fitted[name] for name in running)
        self.__dict__.update(active=active, enabled=enabled, running=chosen)

    def layers(self) -> tuple[Layer, ...]:
        """The active adapters' methods with their tensors."""
        chosen = [self.fitted[name] for name in self.active]
        return tuple(Layer(one.method, {r: p.detach() for r, p in one.params.items()}) for one in chosen)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base_layer: Any = self._modules["base_layer"]
        if not self.running:
            out: Tensor = base_layer(x, *args, **kwargs)
            return out
        dtype: torch.dtype | None = None

        def run(x: Tensor) -> Tensor:
            nonlocal dtype
            below: Tensor = base_layer(x, *args, **kwargs)
            dtype = below.dtype
            return below

        above: Callable[[Tensor], Tensor] = run
        for one in self.running[:-1]:
            above = self._over(one, above)
        out = self._branch(self.running[-1], x, above)
        return out if out.dtype == dtype or dtype is None else out.to(dtype)

    def _over(self, one: Fitted, below: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: self._branch(one, x, below)

    def _branch(self, one: Fitted, x: Tensor, below: Callable[[Tensor], Tensor]) -> Tensor:
        params: Any = {role: held[key] for role, (held, key) in one.holders.items()}
        out: Tensor = one.method.branch(x, below, self.op, params, self.training)
        return out

    def _effective(self) -> Dense:
        base: Any = self._modules["base_layer"]
        dense = Dense(self.op.matrix(base.weight), base.bias if "bias" in base._parameters else None)
        for one in self.running:
            dense = one.method.merge(dense, one.params, WHOLE, float_product)
        return dense

    @property
    def base_weight(self) -> Tensor:
        """The base layer's own stored weight."""
        held: Any = self._modules["base_layer"]
        weight: Tensor = held.weight
        return weight

    @property
    def weight(self) -> Tensor:
        """The stored weight with the running adapters in it, differentiable."""
        held = self.base_weight
        return self.op.stored(self._effective().weight).to(held.dtype) if self.running else held

    @property
    def bias(self) -> Tensor | None:
        """The same of the bias, if there is one."""
        base: Any = self._modules["base_layer"]
        held: Tensor | None = base._parameters.get("bias")
        if held is None or not any(one.method.for_bias() for one in self.running):
            return held
        bias = self._effective().bias
        return None if bias is None else bias.to(held.dtype)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # while being unpickled
                raise
            return getattr(super().__getattr__("base_layer"), name)
