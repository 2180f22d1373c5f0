"""Grade: what became of one tensor of a merge, told a tile at a time.

bits: derived again to the same bytes. rounding: within what correct merges may differ by. different: neither.
untouched: the bytes of the base. recorded: of the sha256 that the receipt tells.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.core.adapter import Started
from surgery.core.arithmetic import exact_float64
from surgery.core.elementwise import Elementwise, grounded
from surgery.core.method import Dense, Mixing
from surgery.core.rounding import ulp
from surgery.core.source import Source
from surgery.core.survival import Survival
from surgery.errors import ValueRangeError
from surgery.hosts.change import Change, MergedTile, by_layer
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.views import Merged
from surgery.procedures.checking.spans import read_span

GRADES = ("bits", "rounding", "untouched", "recorded", "different")
_BADNESS = {"bits": 0, "untouched": 0, "recorded": 0, "rounding": 1, "different": 2}
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Grade(NamedTuple):
    """What became of one tensor, and how far off its worst element is."""

    grade: str
    max_abs_error: float = 0.0
    why: str = ""
    survival: Survival | None = None  # of what adapters change, where its format cannot hold all of it

    def worse(self, other: "Grade") -> "Grade":
        """Of two tiles of a tensor: the worse grade, its reason, the larger error."""
        worst = other if _BADNESS[other.grade] > _BADNESS[self.grade] else self
        survived = [one.survival for one in (self, other) if one.survival is not None]
        return worst._replace(
            max_abs_error=max(self.max_abs_error, other.max_abs_error, key=_size),
            survival=reduce(Survival.plus, survived) if survived else None,
        )

    @property
    def is_measured(self) -> bool:
        """False for what differs by its bytes or header alone: no error of it was taken."""
        return self.grade != "different" or self.max_abs_error != 0.0

    def to_json(self) -> dict[str, Any]:
        """Its fields; an error that is no number, or was not measured, is null: JSON has no NaN."""
        error = self.max_abs_error if self.is_measured and math.isfinite(self.max_abs_error) else None
        survived = {} if self.survival is None else self.survival.to_json()
        return {"grade": self.grade, "max_abs_error": error, "why": self.why, **survived}


UNTOUCHED = "no adapter touches it, yet it is not the base's"


def carried(base: Checkpoint, out: Checkpoint, name: str, span: slice, why: str = UNTOUCHED) -> Grade:
    """Grade a span that no adapter touches: by its bytes; `why` it is different, if it is."""
    same = read_span(base, name, span) == read_span(out, name, span)
    return Grade("untouched") if same else Grade("different", why=why)


def derived(base: Source, out: Checkpoint, change: Change, started: Started, rows: slice) -> Grade:
    """Grade some rows of a change: their bytes first, the tolerance only where these are others."""
    tiles: list[MergedTile] = []
    found = out.load(change.site, rows).tensors["weight"]
    try:
        Merged(base, [change], tiles.append, {change.site.name: started}).load(change.site, rows)
    except ValueRangeError as error:
        return Grade("different", why=f"it cannot be derived: {error}")
    apart = _integers(found) != _integers(tiles[0].merged)
    return _within(tiles[0], found, apart.nonzero().squeeze(1)) if bool(apart.any()) else Grade("bits")


def reach(tile: MergedTile) -> tuple[Tensor, Tensor]:
    """What each element is before it is rounded, and how far from that a correct merge may come."""
    if tile.change.mixes:
        return _mixed(tile)
    steps = _steps(tile)
    start = exact_float64(tile.merged if steps is None else _start(tile))
    value, allowed = _rounded(start, steps or (), tile.change)
    return value, allowed + _spread(tile, steps or ())


def _integers(values: Tensor) -> Tensor:
    """The bytes of floats, flat, a whole number for each."""
    return values.flatten().view(_INTEGER[values.itemsize])


def _within(tile: MergedTile, found: Tensor, where: Tensor) -> Grade:
    """Whether each element of flat `where` lies within what rounding each step explains, plus the spread."""
    if tile.change.mixes:
        value, allowed = (one.flatten()[where] for one in _mixed(tile))
        return _judged((exact_float64(found.flatten()[where]) - value).abs(), allowed)
    steps = _steps(tile)
    start = exact_float64((tile.merged if steps is None else _start(tile)).flatten()[where])
    value, allowed = _rounded(start, [step.at(where) for step in steps or ()], tile.change)
    apart = (exact_float64(found.flatten()[where]) - value).abs()
    if not bool((apart <= allowed).all()):  # costly, and seldom needed
        allowed += _spread(tile, steps or ()).flatten()[where]
    return _judged(apart, allowed)


def _judged(apart: Tensor, allowed: Tensor) -> Grade:
    close = bool((apart <= allowed).all())  # false for NaN
    why = "" if close else "further off than rounding explains"
    return Grade("rounding" if close else "different", float(apart.max()), why)


def _mixed(tile: MergedTile) -> tuple[Tensor, Tensor]:
    """What each element is before it is rounded, where a layer mixes them, and how far from that correct merges may
    come: layer by layer over the whole tile, for each element carries on what others were off by."""
    change, op = tile.change, tile.change.site.acting
    part, held = op.tile(tile.rows), change.site.weight.torch_dtype
    value = op.matrix(exact_float64(_start(tile)))
    allowed = torch.zeros_like(value)
    for layer, product in change.started():
        method, p, before = layer.method, layer.told, value
        step = method.steps(p, part, product)
        value = method.merge(Dense(before), p, part, product).weight
        if isinstance(method, Mixing):
            allowed = method.strayed(before, allowed, p, part) + method.held_off(before, p, part, held)
        elif step is not None:
            allowed = step.carried(allowed) + ulp(step.rounded(before, value)[0], held) / 2
            allowed = allowed + method.spread_over(before, value, p, part, held)
        allowed = allowed + ulp(value, change.dtype) / 2
    return op.stored(value), op.stored(allowed)


def _rounded(value: Tensor, steps: Sequence[Elementwise], change: Change) -> tuple[Tensor, Tensor]:
    """The outcome of the steps, and how far from it their rounding may lead: half an ulp for each that is taken."""
    allowed = torch.zeros_like(value) if steps else ulp(value, change.dtype) / 2
    for step in steps:
        before, value = value, step.apply(value)
        held, outcome = step.rounded(before, value)
        allowed = step.carried(allowed) + ulp(held, change.site.weight.torch_dtype) / 2 + ulp(outcome, change.dtype) / 2
    return value, allowed


def _steps(tile: MergedTile) -> Sequence[Elementwise] | None:
    """From what the tile begins as to its outcome, one for each layer; None if a layer is not elementwise."""
    if tile.steps is not None and len(tile.steps) == len(tile.change.layers):
        return tile.steps
    steps = by_layer(tile.change, tile.rows)
    return None if steps is None else grounded(steps, exact_float64(_start(tile)))


def _start(tile: MergedTile) -> Tensor:
    """What the steps begin from: the base, or what takes its place."""
    change, shape = tile.change, tile.change.site.laid(tile.change.site.weight).shape
    if change.saved is not None:
        return change.saved.view(shape)[tile.rows if shape else ...]
    assert tile.original is not None
    return tile.original


def _spread(tile: MergedTile, steps: Sequence[Elementwise]) -> Tensor:
    """What the methods themselves leave open; each step carries on what those before it do."""
    total, op = torch.zeros(tile.merged.shape, dtype=torch.float64), tile.change.site.op
    held = tile.change.site.weight.torch_dtype
    value = start = exact_float64(_start(tile)) if steps else total
    for index, (layer, _) in enumerate(tile.change.started()):
        assert op is not None
        if steps:
            total, value = steps[index].carried(total), steps[index].apply(value)
        part, base, outcome = op.tile(tile.rows), op.matrix(start), op.matrix(value)
        total = total + op.stored(layer.method.spread_over(base, outcome, layer.told, part, held))
    return total


def _size(error: float) -> float:
    """NaN is larger than any error."""
    return math.inf if math.isnan(error) else error
