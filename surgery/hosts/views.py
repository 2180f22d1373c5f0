"""Merged and Unmerged: a host as it reads with adapters laid over it, or taken off again."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.codecs import codec_of
from surgery.core.adapter import Layer
from surgery.core.arithmetic import all_finite, exact_product, round_once
from surgery.core.codec import Packed
from surgery.core.method import Dense, Elementwise
from surgery.core.site import Site
from surgery.core.source import Source
from surgery.core.undo import Restorer, accumulate
from surgery.errors import ValueRangeError, printable


@dataclass(frozen=True)
class Change:
    """What becomes of one weight: layers in the order they apply, or a tensor that takes its place."""

    site: Site
    dtype: torch.dtype  # of the outcome
    layers: tuple[Layer, ...] = ()
    saved: Tensor | None = None


class MergedTile(NamedTuple):
    """Some rows of a weight as they were and as they became."""

    change: Change
    rows: slice  # of the stored weight
    original: Tensor
    merged: Tensor
    steps: Sequence[Elementwise] | None  # None where the merge is not a chain of elementwise steps

    @property
    def first(self) -> bool:
        """Is it the weight's first tile?"""
        return bool(self.rows.start == 0)

    @property
    def last(self) -> bool:
        """Is it the weight's last tile?"""
        shape = self.change.site.weight.shape
        return not shape or self.rows.stop >= shape[0]


Watch = Callable[[MergedTile], None]  # sees each tile of a merge, in order


class Merged:
    """The changed weights of `source`, computed a tile at a time in float64 and rounded once."""

    def __init__(self, source: Source, changes: Iterable[Change], watch: Watch | None = None) -> None:
        self.source, self.watch = source, watch
        self.changes = {change.site.name: change for change in changes}

    def sites(self) -> Iterable[Site]:
        return [change.site for change in self.changes.values()]

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        """ValueRangeError where the base or the outcome is not finite."""
        change = self.changes[site.name]
        packed = self.source.load(site, rows)
        rows = site.rows(rows)
        steps: list[Elementwise] | None
        if change.saved is not None:
            laid, steps = change.saved.view(site.weight.shape)[rows if site.weight.shape else ...], None
        else:
            weight = codec_of(packed, printable(site.weight.name)).decode(packed, torch.float64)
            laid, steps = _lay(change, rows, weight)
        outcome = _encode(laid, packed, change)
        if not all_finite(outcome.tensors["weight"]):
            raise _non_finite(site, packed.tensors["weight"], outcome.tensors["weight"])
        if self.watch is not None:
            self.watch(MergedTile(change, rows, packed.tensors["weight"], outcome.tensors["weight"], steps))
        return outcome


@dataclass(frozen=True)
class Undo:
    """What one weight needs to come back: index streams by bits each, or the original itself."""

    dtype: torch.dtype
    streams: Mapping[int, bytes] | None = None
    kept: Tensor | None = None


class Unmerged:
    """The weights of `source`, a merged host, as they were before `changes`; each is read once, in order."""

    def __init__(self, source: Source, changes: Iterable[Change], undo: Callable[[Change], Undo]) -> None:
        self.source, self.undo = source, undo
        self.changes = {change.site.name: change for change in changes}
        self.begun: dict[str, tuple[Undo, Restorer]] = {}  # the weights of which some tiles are read

    def sites(self) -> Iterable[Site]:
        return [change.site for change in self.changes.values()]

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        """CheckError where the record does not fit the merged weight."""
        merged = self.source.load(site, rows).tensors["weight"]
        change, rows = self.changes[site.name], site.rows(rows)
        if site.name not in self.begun:
            undo = self.undo(change)
            self.begun[site.name] = undo, Restorer(undo.streams or {})
        undo, restorer = self.begun[site.name]
        if not site.weight.shape or rows.stop >= site.weight.shape[0]:
            del self.begun[site.name]
        if undo.kept is not None:
            return Packed({"weight": undo.kept[rows if site.weight.shape else ...]})
        steps = elementwise(change, rows)
        assert steps is not None  # what has no steps is kept
        return Packed({"weight": restorer.restore(merged, steps, undo.dtype)})


def elementwise(change: Change, rows: slice) -> list[Elementwise] | None:
    """The layers as steps over `rows` of the stored weight; None if one of them is not elementwise."""
    steps = []
    for layer in change.layers:
        op = change.site.acting
        try:
            step = layer.method.steps(layer.params, op.tile(rows), exact_product)
        except ValueRangeError as error:
            raise ValueRangeError(f"{printable(change.site.name)}: {error}") from error
        if step is None:
            return None
        steps.append(Elementwise(op.stored(step.shift)))
    return steps


def _lay(change: Change, rows: slice, weight: Tensor) -> tuple[Tensor, list[Elementwise] | None]:
    steps = elementwise(change, rows)
    if steps is not None:
        return accumulate(weight, steps), steps
    op = change.site.acting
    for method, params in change.layers:
        base = Dense(op.matrix(weight))
        weight = op.stored(method.merge(base, params, op.tile(rows), exact_product).weight)
    return weight, None


def _encode(laid: Tensor, packed: Packed, change: Change) -> Packed:
    """`laid` held as `packed` is, or plainly where the dtype is another."""
    if packed.tensors["weight"].dtype == change.dtype:
        return codec_of(packed, change.site.name).encode(laid.to(torch.float64), like=packed)
    return Packed({"weight": round_once(laid.to(torch.float64), change.dtype)})


def _non_finite(site: Site, base: Tensor, merged: Tensor) -> ValueRangeError:
    what, values = ("the merged weight", merged) if all_finite(base) else ("the base weight", base)
    dtype = str(values.dtype).removeprefix("torch.")
    return ValueRangeError(
        f"{printable(site.name)}: {what} holds NaN or infinity in {dtype}; "
        "finite numbers are wanted; check the base, or choose a --dtype of wider range"
    )
