"""Encoded: a merge as it reads where some of its weights are held in a format, by scales of their own."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from surgery.codecs import FORMS, codec_of, cut
from surgery.core.arithmetic import all_finite, round_once
from surgery.core.codec import Codec, Headers, Packed
from surgery.core.site import Site, TensorInfo
from surgery.core.source import TILE_ELEMENTS, Source, row_tiles
from surgery.errors import SurgeryError, ValueRangeError, printable
from surgery.hosts.change import Change, MergedTile, Watch, ends
from surgery.hosts.rounding import FED_ELEMENTS, feedback_of, rounded
from surgery.hosts.views import Merged


class Encoded:
    """The changes over `source`; one that goes into a form is encoded whole, when its first tensor is asked for.

    What the form leaves of a change is measured against the weight as it was, held in the same form.
    """

    def __init__(self, source: Source, changes: Iterable[Change], watch: Watch | None = None) -> None:
        self.plain, self.watch = Merged(source, changes, watch), watch
        self.of = {info.name: one for one in self.plain.changes.values() for info in standing(one) if one.into}
        self.held: dict[str, Mapping[str, Tensor]] = {}  # by the weights of which some tensors are read

    def sites(self) -> Iterable[Site]:
        yield from (site for site in self.plain.sites() if not self.plain.changes[site.name].into)
        for change in self.plain.changes.values():
            if change.into:
                yield from (Site(info.name, {"weight": info}) for info in standing(change))

    def reads(self, tensor: str) -> Sequence[str]:
        """The tensors of the source that one of the outcome depends on."""
        return self.plain.reads(self.of[tensor].site.written if tensor in self.of else tensor)

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        """ValueRangeError where the base or the outcome is not finite, or the form cannot hold it."""
        change, rows = self.of.get(site.name), site.rows(rows)
        if change is None:
            return self.plain.load(site, rows)
        held = self.held.get(change.site.name)
        if held is None:
            held = self.held[change.site.name] = dict(named(change, self.encoded(change)))
        if site.name == list(held)[-1] and ends(site, rows):
            del self.held[change.site.name]
        values = held[site.name]
        return Packed({"weight": values[rows] if values.shape else values})

    def encoded(self, change: Change) -> Packed:
        """The outcome of one change; tells `watch` of its tiles."""
        site, adapted = change.site, bool(change.layers) or change.saved is not None
        was = became = torch.empty(0)
        for rows in _tiles(site):
            before, laid = self.plain.exact(site, rows)
            if rows.start == 0:  # on whatever device it is
                was, became = (before.new_empty(site.weight.shape, dtype=change.dtype) for _ in range(2))
            was[rows], became[rows] = round_once(before, change.dtype), round_once(laid, change.dtype)
        outcome = self._fed(change, _fresh(change, became))
        if self.watch is None:
            return outcome
        codec, _ = FORMS[change.into]
        reference = _fresh(change, was) if adapted else None
        for rows in _tiles(site):
            merged = codec.decode(cut(codec, outcome, rows), torch.float64)
            if reference is None:
                self.watch(MergedTile(change, rows, was[rows], merged, None))
            else:
                before, laid = self.plain.exact(site, rows)
                held = codec.decode(cut(codec, reference, rows), torch.float64)
                self.watch(MergedTile(change, rows, held, merged, None, held + (laid - before)))
        return outcome

    def _fed(self, change: Change, nearest: Packed) -> Packed:
        """By the same scales, where other codes than the nearest are asked for."""
        feedback = feedback_of(change, change.started())
        if feedback is None:
            return nearest
        codec, _ = FORMS[change.into]
        role, parts = next(iter(codec.endings)), []
        together = codec.step(nearest.headers, nearest.settings)
        for rows in row_tiles(change.site.weight.shape, FED_ELEMENTS, together):
            _, laid = self.plain.exact(change.site, rows)
            parts.append(rounded(codec, laid, cut(codec, nearest, rows), feedback).tensors[role])
        return with_codes(codec, nearest, parts)


def reheld(view: Merged, change: Change, packed: Packed) -> Packed:
    """The outcome of a change that keeps its format, of which `packed` is the whole weight as it was."""
    codec, site = codec_of(packed, printable(change.site.name)), change.site
    tiles = row_tiles(site.weight.shape, TILE_ELEMENTS, site.together)
    return with_codes(codec, packed, [view.load(site, rows).tensors["weight"] for rows in tiles])


def with_codes(codec: Codec, packed: Packed, parts: Sequence[Tensor]) -> Packed:
    """The same with other codes, given by tiles of whole elements."""
    role = next(iter(codec.endings))
    codes = packed.tensors[role]
    joined = torch.cat([part.view(torch.uint8).flatten() for part in parts])
    return packed._replace(tensors={**packed.tensors, role: joined.view(codes.dtype).view(codes.shape)})


def standing(change: Change) -> list[TensorInfo]:
    """The tensors that hold the outcome of a change; one where it goes into no form."""
    weight = change.site.weight
    if not change.into:
        return [weight._replace(dtype=change.dtype)]
    headers, _ = made_as(change.into, weight.shape, change.dtype)
    return [TensorInfo(name, *headers[role]) for role, name in _names(change, headers)]


def named(change: Change, packed: Packed) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a weight, by their names in the files."""
    return ((name, packed.tensors[role]) for role, name in _names(change, packed.headers))


def _names(change: Change, headers: Headers) -> Iterator[tuple[str, str]]:
    """Roles and names, in the order in which they are written."""
    codec, _ = FORMS[change.into]
    stem = change.site.weight.name.removesuffix(codec.plain_ending)
    return ((role, stem + ending) for role, ending in codec.endings.items() if role in headers)


@cache
def made_as(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Headers, torch.dtype | None]:
    """What any such weight is held in, and the dtype that it tells. ConfigError where it cannot be."""
    codec, settings = FORMS[form]
    packed = codec.fresh(torch.zeros(shape, dtype=dtype), settings)
    return packed.headers, codec.dtype(packed.settings)


def _fresh(change: Change, weight: Tensor) -> Packed:
    codec, settings = FORMS[change.into]
    where = printable(change.site.weight.name)
    if not all_finite(weight):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueRangeError(f"{where}: the merged weight is not finite in {dtype}; choose a --dtype of wider range")
    try:
        return codec.fresh(weight, settings)
    except SurgeryError as error:
        raise type(error)(f"{where}: {error}") from error


def _tiles(site: Site) -> Iterator[slice]:
    return row_tiles(site.weight.shape, TILE_ELEMENTS)
