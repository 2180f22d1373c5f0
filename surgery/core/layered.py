"""Layered: what methods over one another make of a weight, where one of them adds to the base below the others."""

from collections.abc import Sequence

from torch import Tensor

from surgery.core.elementwise import Elementwise, chained
from surgery.core.method import Dense, Method, Params, Product
from surgery.core.op import WHOLE
from surgery.core.site import Site
from surgery.core.sums import sum_rows
from surgery.errors import MatchError, printable


def layered(base: Dense, layers: Sequence[tuple[Method, Params]], site: Site, product: Product) -> Dense:
    """The whole base with these in it, in their order; each with all that it has to be told."""
    dense = base
    for method, p in layers:
        dense = method.merge(dense, p, WHOLE, product)
    if not any(method.of_base for method, _ in layers[1:]):
        return dense
    weight, steps = base.weight, []
    for method, p in layers:
        step = method.steps(p, WHOLE, product)
        if step is None:
            refuse_over([one for one, _ in layers], site)
            return dense
        steps.append(step)
    for step in chained(steps):
        weight = step.apply(weight)
    return Dense(weight, None if base.bias is None else laid_on_bias(base.weight, base.bias, layers, product))


def laid_on_bias(weight: Tensor, bias: Tensor, layers: Sequence[tuple[Method, Params]], product: Product) -> Tensor:
    """The base's bias [out] with what these methods over its weight make of it, in their order."""
    steps, column = chained(bias_steps(weight, layers, product)), bias.unsqueeze(1)  # [out, 1]
    for step in steps:
        column = step.apply(column)
    return column.squeeze(1) if steps else bias


def bias_steps(weight: Tensor, layers: Sequence[tuple[Method, Params]], product: Product) -> list[Elementwise]:
    """What methods over the base's weight do to a bias [out, 1]: a step for each that does something."""
    steps = []
    for method, p in layers:
        on_bias = method.for_bias()
        if on_bias is not None:
            told = on_bias.told(p, sum_rows(on_bias.terms(weight, p, WHOLE, product))) if on_bias.couples else p
            step = on_bias.steps(told, WHOLE, product)
            assert step is not None  # all that is done to a bias is elementwise
            steps.append(step)
    return steps


def refuse_over(methods: Sequence[Method], site: Site) -> None:
    """MatchError where one adds to the base over others, of methods whose merge is not elementwise."""
    for at, over in enumerate(methods):
        if at and over.of_base:
            below = ", ".join(one.name for one in methods[:at])
            raise MatchError(
                f"{printable(site.name)}: {over.name} adds to the base, over {below}, and not every method here is "
                f"merged element by element; give {over.name} first, or merge them apart"
            )
