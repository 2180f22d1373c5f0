"""Change: what becomes of one weight; and the tiles of it that a merge tells of."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.core.adapter import Layer, Started
from surgery.core.arithmetic import ExactProduct
from surgery.core.as_peft import PeftMerge
from surgery.core.elementwise import Elementwise, chained
from surgery.core.feedback import Feedback
from surgery.core.layered import refuse_over
from surgery.core.op import Op
from surgery.core.site import Site
from surgery.core.survival import Survival
from surgery.errors import ValueRangeError, printable


@dataclass(frozen=True)
class Change:
    """What becomes of one weight: it begins as it is, or as another, and layers are laid over it in their order.

    What is not held plainly is decoded to the dtype of its site first.
    """

    site: Site
    dtype: torch.dtype  # of the outcome
    layers: tuple[Layer, ...] = ()
    saved: Tensor | None = None  # what it begins as instead
    begins: Site | None = None  # the weight of the host that it begins as instead
    new: bool = False  # the host has no weight of this name and shape
    held: str = ""  # the codec by which the host holds the weight, where that is not plain
    through: str = ""  # the form that the host's plain weight was held in while its layers were trained
    keep: bool = False  # by that codec and its scales the outcome is held too; `dtype` is then not its own
    into: str = ""  # the form that the outcome, in `dtype`, is held in, by scales of its own
    feedback: bool = False  # of its codes those are looked for that the inputs which matter tell least from it
    calibrated: Callable[[], Feedback] | None = None  # which inputs matter, where that is known beside the layers
    probes: int = 0  # inputs by which is measured what the codes do to the outputs
    as_peft: PeftMerge | None = None  # how the layers are merged, where that is not exactly

    def __post_init__(self) -> None:
        together = math.lcm(self.site.together, *(layer.method.together for layer in self.layers))
        if together != self.site.together:
            object.__setattr__(self, "site", replace(self.site, together=together))

    @property
    def origin(self) -> Site | None:
        """The host's weight that the outcome is compared with; None if there is none."""
        return self.begins or (None if self.new else self.site)

    @property
    def beside(self) -> Site | None:
        """The weight whose sums its layers ask for, where that is another than its own."""
        return next((layer.beside for layer in self.layers if layer.beside is not None), None)

    def started(self) -> Started:
        """Its layers with their tensors in memory, as matrices, and what the tiles of the weight share."""
        return tuple(self._started(one, ExactProduct()) for one in self.layers)

    def _started(self, layer: Layer, product: ExactProduct) -> tuple[Layer, ExactProduct]:
        held = layer.method.matrices(dict(layer.params), self.site)
        with told_where(self.site):
            return layer._replace(params=layer.method.prepared(held, product)), product

    @property
    def mixes(self) -> bool:
        """Does a layer make elements of several others, so that none is told back from its outcome?"""
        return any(layer.method.mixes for layer in self.layers)


class MergedTile(NamedTuple):
    """Some rows of a weight as they were and as they became."""

    change: Change
    rows: slice  # of the stored weight
    original: Tensor | None  # None where the host has no weight of this shape
    merged: Tensor
    steps: Sequence[Elementwise] | None  # None where no chain of elementwise steps leads from one to the other
    laid: Tensor | None = None  # what was wanted, in float64, where the outcome's format cannot hold all of it
    near_ties: Tensor | None = None  # see Rounding, where it is known

    @property
    def survival(self) -> Survival | None:
        """What is left of the change, where that is not all."""
        if self.laid is None or self.original is None:
            return None
        return Survival.of(self.original, self.laid, self.merged, probes_of(self.change))

    @property
    def first(self) -> bool:
        """Is it the weight's first tile?"""
        return bool(self.rows.start == 0)

    @property
    def last(self) -> bool:
        """Is it the weight's last tile?"""
        return ends(self.change.site, self.rows)


def directions_of(change: Change, started: Started | None = None) -> Tensor | None:
    """[r, in]: those along which its layers look at their inputs, of all that know them, in float64."""
    known = (layer.method.directions(layer.params) for layer, _ in started or change.started())
    found = [one.to(torch.float64) for one in known if one is not None]
    return torch.cat(found) if found else None


def importance_of(change: Change, started: Started | None = None) -> Feedback | None:
    """Which inputs matter: those it is calibrated by, else those along its layers' directions; None: nothing tells."""
    if change.calibrated is not None:
        return change.calibrated()
    directions = directions_of(change, started)
    return None if directions is None else Feedback.along(directions)


def probes_of(change: Change) -> Tensor | None:
    """Inputs [in, n] of a linear map, always the same; half of their energy lies along the layers' directions.

    Where it is calibrated, they have the second moment that is known.
    """
    if not change.probes or change.site.op is None or change.site.op.name != "linear":
        return None
    drawn = torch.Generator().manual_seed(0)
    white = torch.randn(change.site.shape[1], change.probes, generator=drawn, dtype=torch.float64)
    known = importance_of(change)
    if known is None:
        return white
    r = known.columns.shape[1]
    return known.inputs(white, torch.randn(r, change.probes, generator=drawn, dtype=torch.float64))


@contextmanager
def told_where(site: Site) -> Iterator[None]:
    """A ValueRangeError of arithmetic names the site."""
    try:
        yield
    except ValueRangeError as error:
        raise ValueRangeError(f"{printable(site.name)}: {error}") from error


Watch = Callable[[MergedTile], None]  # sees each tile of a merge, in order


def elementwise(change: Change, rows: slice, started: Started | None = None) -> list[Elementwise] | None:
    """The layers as steps over `rows` of the stored weight; None if one of them is not elementwise."""
    steps = by_layer(change, rows, started)
    return None if steps is None else chained(steps)


def by_layer(change: Change, rows: slice, started: Started | None = None) -> list[Elementwise] | None:
    """The same, a step for each: one over others may ask for the base, see Growth."""
    if change.mixes:
        refuse_over([one.method for one in change.layers], change.site)
        return None
    steps = []
    shape = change.site.laid(change.site.weight).rows(rows).shape
    for layer, product in started or change.started():
        op = change.site.acting
        with told_where(change.site):
            step = layer.method.steps(layer.told, op.tile(rows), product)
        if step is None:
            refuse_over([one.method for one in change.layers], change.site)
            return None
        steps.append(_stored(step, op, shape))
    return steps


def _stored(step: Elementwise, op: Op, shape: tuple[int, ...]) -> Elementwise:
    """A step of a tile of the matrix, for the same tile as it is stored."""
    return step.seen(lambda values: op.stored(values).expand(shape))


def reads_of(written: Mapping[str, Change], tensor: str) -> Sequence[str]:
    """The tensors of the source that one of the outcome depends on; `written` are the changes by what is written."""
    change = written.get(tensor)
    if change is None:
        return (tensor,)
    return [one.weight.name for one in (change.origin, change.beside) if one is not None]


def ends(site: Site, rows: slice) -> bool:
    """Do `rows` end the weight?"""
    shape = site.laid(site.weight).shape
    return not shape or bool(rows.stop >= shape[0])
