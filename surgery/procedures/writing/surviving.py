"""Surviving: what a merge into a format would leave of each change, before anything is written."""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial, reduce

from surgery.core.source import Source
from surgery.core.survival import Bounds, Survival, total
from surgery.core.workers import in_order
from surgery.errors import CheckError, printable
from surgery.hosts.change import Change
from surgery.hosts.encoded import Encoded, tiles


def survivals(source: Source, changes: Iterable[Change], workers: int) -> Iterator[tuple[str, Survival]]:
    """By the weight, of those that a format cannot hold all of; up to `workers` of them at once."""
    adapted = (one for one in changes if (one.into or one.keep) and (one.layers or one.saved is not None))
    return in_order(partial(_survival, source), adapted, workers)


def refuse_lost(told: Mapping[str, Survival], bounds: Bounds, what: str, step: str) -> None:
    """CheckError where in all too little of the changes is left, or too much came beside them."""
    whole = total(told)
    if bounds.admit(whole):
        return
    worst = sorted(told.items(), key=lambda item: (not math.isnan(item[1].retained), item[1].retained))[:3]
    least = ", ".join(f"{printable(name)} ({one})" for name, one in worst)
    raise CheckError(
        f"{what}: {whole} of the adapters' change in all; {bounds} are wanted; least is left at {least}; {step}"
    )


def _survival(source: Source, change: Change) -> tuple[str, Survival]:
    told: list[Survival | None] = []
    view = Encoded(source, [change], lambda tile: told.append(tile.survival))
    for rows in tiles(change):
        view.load(change.site, rows)
    return change.site.weight.name, reduce(Survival.plus, [one for one in told if one is not None], Survival())
