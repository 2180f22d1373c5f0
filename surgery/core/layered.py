"""Layered: what methods over one another make of a weight, where one of them adds to the base below the others."""

from collections.abc import Sequence

from surgery.core.elementwise import chained
from surgery.core.method import Dense, Method, Params, Product
from surgery.core.op import WHOLE
from surgery.core.site import Site
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
    return dense._replace(weight=weight)


def refuse_over(methods: Sequence[Method], site: Site) -> None:
    """MatchError where one adds to the base over others, of methods whose merge is not elementwise."""
    for at, over in enumerate(methods):
        if at and over.of_base:
            below = ", ".join(one.name for one in methods[:at])
            raise MatchError(
                f"{printable(site.name)}: {over.name} adds to the base, over {below}, and not every method here is "
                f"merged element by element; give {over.name} first, or merge them apart"
            )
