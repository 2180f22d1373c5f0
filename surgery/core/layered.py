"""Layered: what methods over one another make of a weight, where one of them adds to the base below the others."""

from collections.abc import Sequence

from torch import Tensor

from surgery.core.elementwise import chained
from surgery.core.method import Dense, Method, Params, Product
from surgery.core.op import WHOLE
from surgery.core.site import Site
from surgery.errors import MatchError, printable

Layers = Sequence[tuple[Method, Params]]  # in their order; each with all that it has to be told


def layered(base: Dense, layers: Layers, site: Site, product: Product) -> Dense:
    """The whole base with these in it."""
    if any(method.of_base for method, _ in layers[1:]):
        return Dense(_by_steps(base.weight, layers, site, product), _bias(base.bias, layers, product))
    for method, p in layers:
        base = method.merge(base, p, WHOLE, product)
    return base


def _by_steps(weight: Tensor, layers: Layers, site: Site, product: Product) -> Tensor:
    steps = [method.steps(p, WHOLE, product) for method, p in layers]
    if any(one is None for one in steps):
        refuse_over([one for one, _ in layers], site)
    for step in chained([one for one in steps if one is not None]):
        weight = step.apply(weight)
    return weight


def _bias(bias: Tensor | None, layers: Layers, product: Product) -> Tensor | None:
    """[out]"""
    for method, p in layers:
        on_bias = method.for_bias()
        if on_bias is not None and bias is not None:
            bias = on_bias.merge(Dense(bias.unsqueeze(1)), p, WHOLE, product).weight.squeeze(1)
    return bias


def refuse_over(methods: Sequence[Method], site: Site) -> None:
    """MatchError where one adds to the base over others, of methods whose merge is not elementwise."""
    for at, over in enumerate(methods):
        if at and over.of_base:
            below = ", ".join(one.name for one in methods[:at])
            raise MatchError(
                f"{printable(site.name)}: {over.name} adds to the base, over {below}, and not every method here is "
                f"merged element by element; give {over.name} first, or merge them apart"
            )
