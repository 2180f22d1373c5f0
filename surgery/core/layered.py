"""Layered: what methods over one another make of a weight, where one of them adds to the base below the others."""

from collections.abc import Sequence

from torch import Tensor

from surgery.core.elementwise import Elementwise, chained
from surgery.core.method import Dense, Method, Params, Product
from surgery.core.op import WHOLE
from surgery.core.site import Site
from surgery.core.sums import sum_rows
from surgery.errors import MatchError, printable

Layers = Sequence[tuple[Method, Params]]  # in their order; each with all that it has to be told


def layered(base: Dense, layers: Layers, site: Site, product: Product) -> Dense:
    """The whole base with these in it."""
    if not any(method.of_base for method, _ in layers[1:]):
        for method, p in layers:
            base = method.merge(base, p, WHOLE, product)
        return base
    steps = [method.steps(p, WHOLE, product) for method, p in layers]
    if None in steps:
        refuse_over([one for one, _ in layers], site)
    bias = None if base.bias is None else laid_on_bias(base.weight, base.bias, layers, product)
    return Dense(_by_steps(base.weight, steps), bias)


def laid_on_bias(weight: Tensor, bias: Tensor, layers: Layers, product: Product) -> Tensor:
    """The base's bias [out] with what these methods over its weight make of it, in their order."""
    own, column = on_bias(weight, layers, product), bias.unsqueeze(1)  # [out, 1]
    if any(method.of_base for method, _ in own[1:]):
        return _by_steps(column, [method.steps(p, WHOLE, product) for method, p in own]).squeeze(1)
    for method, p in own:
        column = method.merge(Dense(column), p, WHOLE, product).weight
    return column.squeeze(1) if own else bias


def on_bias(weight: Tensor, layers: Layers, product: Product) -> Layers:
    """What methods over the base's weight do to a bias, as a matrix [out, 1]: one for each that does something."""
    found = []
    for method, p in layers:
        own = method.for_bias()
        if own is not None:
            sums = sum_rows(own.terms(weight, p, WHOLE, product)) if own.couples else None
            found.append((own, p if sums is None else own.told(p, sums)))
    return found


def _by_steps(values: Tensor, steps: Sequence[Elementwise | None]) -> Tensor:
    known = [one for one in steps if one is not None]
    assert len(known) == len(steps)  # what mixes is refused over others, and the rest has been told all
    for step in chained(known):
        values = step.apply(values)
    return values


def refuse_over(methods: Sequence[Method], site: Site) -> None:
    """MatchError where one adds to the base over others, of methods whose merge is not elementwise."""
    for at, over in enumerate(methods):
        if at and over.of_base:
            below = ", ".join(one.name for one in methods[:at])
            raise MatchError(
                f"{printable(site.name)}: {over.name} adds to the base, over {below}, and not every method here is "
                f"merged element by element; give {over.name} first, or merge them apart"
            )
