"""Encoded: a merge as it reads where some of its weights are held in a format, by scales of their own.

The scales are found first, in one pass over the weight; then its codes, some rows at a time. What is in memory of a
weight are its scales.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.codecs import FORMS, codec_of, cut
from surgery.core.arithmetic import all_finite
from surgery.core.codec import Codec, Headers, Packed, Settings, TiledCodec, as_stored
from surgery.core.feedback import Feedback
from surgery.core.rounding import round_once
from surgery.core.site import CODES, Site, TensorInfo
from surgery.core.source import TILE_ELEMENTS, Source, row_tiles
from surgery.errors import ConfigError, ValueRangeError, printable
from surgery.hosts.change import Change, MergedTile, Watch, ends
from surgery.hosts.rounding import feedback_of, rounded
from surgery.hosts.views import Merged, plainly


class _Begun(NamedTuple):
    """Of a weight of which some codes are made: by what."""

    outcome: Packed  # its scales
    reference: Packed | None  # those of the weight as it was, where what is left of the change is asked for
    feedback: Feedback | None


class Encoded:
    """The changes over `source`.

    What a form leaves of a change is measured against the weight as it was, held in the same form.
    """

    def __init__(self, source: Source, changes: Iterable[Change], watch: Watch | None = None) -> None:
        self.plain, self.watch = Merged(source, changes, watch), watch
        held = [one for one in self.plain.changes.values() if one.into]
        self.beside = {info.name: one for one in held for info in standing(one)[1:]}
        self.begun: dict[str, _Begun] = {}  # by site, until the last of its tensors is read

    def sites(self) -> Iterable[Site]:
        yield from self.plain.sites()
        for change in self.plain.changes.values():
            if change.into:
                yield from (Site(info.name, {"weight": info}) for info in standing(change)[1:])

    def reads(self, tensor: str) -> Sequence[str]:
        """The tensors of the source that one of the outcome depends on."""
        return self.plain.reads(self.beside[tensor].site.written if tensor in self.beside else tensor)

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        """ValueRangeError where the base or the outcome is not finite, or the form cannot hold it."""
        rows = site.rows(rows)
        if site.name in self.beside:
            return self._scales(self.beside[site.name], site, rows)
        change = self.plain.changes[site.name]
        if not change.into:
            return self.plain.load(site, rows)
        codec, _ = FORMS[change.into]
        found = self.coded(change, rows).tensors[next(iter(codec.endings))]
        if ends(change.site, rows) and len(standing(change)) == 1:
            del self.begun[change.site.name]
        return Packed({"weight": found})

    def encoded(self, change: Change) -> Packed:
        """The outcome of one change, whole; tells `watch` of its tiles."""
        codec, _ = FORMS[change.into]
        role = next(iter(codec.endings))
        parts = [self.coded(change, rows).tensors[role] for rows in tiles(change)]
        return as_stored(with_codes(codec, self.by(change).outcome, parts))

    def coded(self, change: Change, rows: slice) -> Packed:
        """Some rows of the outcome of a change, asked for in order; tells `watch` of them."""
        codec, by = FORMS[change.into][0], self.by(change)
        before, laid = self.plain.exact(change.site, rows)
        held = _coded(codec, _rounded(change, laid), by.outcome, rows)
        if by.feedback is not None:
            held = rounded(codec, laid, held, by.feedback)
        if self.watch is None:
            return held
        merged, was = codec.decode(held, torch.float64), round_once(before, change.dtype)
        if by.reference is None:
            self.watch(MergedTile(change, rows, was, merged, None))
        else:
            begin = codec.decode(_coded(codec, was, by.reference, rows), torch.float64)
            self.watch(MergedTile(change, rows, begin, merged, None, begin + (laid - before)))
        return held

    def by(self, change: Change) -> _Begun:
        """The scales of a change's outcome, found when they are first asked for."""
        name = change.site.name
        if name not in self.begun:
            adapted = bool(change.layers) or change.saved is not None
            outcome = _fresh(change, lambda rows: self.plain.exact(change.site, rows)[1])
            reference = _fresh(change, lambda rows: self._was(change, rows)) if self.watch and adapted else None
            self.begun[name] = _Begun(outcome, reference, feedback_of(change, change.started()))
        return self.begun[name]

    def _was(self, change: Change, rows: slice) -> Tensor:
        """Rows of the weight before the change."""
        assert change.origin is not None  # what the host lacks goes into no form
        return plainly(self.plain.source, change.origin, rows).tensors["weight"].to(torch.float64)

    def _scales(self, change: Change, site: Site, rows: slice) -> Packed:
        """Rows of a tensor that stands beside the codes."""
        named = dict(beside(change, self.by(change).outcome))
        if site.name == list(named)[-1] and ends(site, rows):
            del self.begun[change.site.name]
        values = named[site.name]
        return Packed({"weight": values[rows] if values.shape else values})


def told_in_headers(changes: Iterable[Change], called: Callable[[], Callable[[str], str]]) -> Mapping[str, str]:
    """What headers of the output say of the weights that go into a form, as a model in memory calls them.

    What it calls them is asked for only if there are such: it takes a second, and transformers.
    """
    held = [change for change in changes if change.into]
    if not held:
        return {}
    (codec, _), names = FORMS[held[0].into], called()  # one for all
    return codec.metadata({names(one.site.weight.name): (one.site.weight.shape, one.dtype) for one in held})


def reheld(view: Merged, change: Change, packed: Packed) -> Packed:
    """The outcome of a change that keeps its format, of which `packed` is the whole weight as it was."""
    codec, site = codec_of(packed, printable(change.site.name)), change.site
    return with_codes(codec, packed, [view.load(site, rows).tensors["weight"] for rows in tiles(change)])


def with_codes(codec: Codec, packed: Packed, parts: Sequence[Tensor]) -> Packed:
    """The same with other codes, given by tiles of whole elements."""
    role = next(iter(codec.endings))
    codes = packed.tensors[role]
    joined = torch.cat([part.view(torch.uint8).flatten() for part in parts])
    return packed._replace(tensors={**packed.tensors, role: joined.view(codes.dtype).view(codes.shape)})


def held_in(change: Change, form: str) -> Change:
    """The change of a weight that goes into `form`; its codes are written in the place of the first of its tensors."""
    made = made_as(form, change.site.weight.shape, change.dtype)
    change = replace(change, into=form, keep=False)
    together = math.lcm(change.site.together, FORMS[form][0].step(made.headers, made.settings))
    tensors = {**change.site.tensors, CODES: standing(change)[0]}
    return replace(change, site=replace(change.site, tensors=tensors, together=together))


def tiles(change: Change) -> Iterator[slice]:
    """The rows of the weight that are held in a format, so many at a time as share nothing with others."""
    return row_tiles(change.site.laid(change.site.weight).shape, TILE_ELEMENTS, change.site.together)


def standing(change: Change) -> list[TensorInfo]:
    """The tensors that hold the outcome of a change; one where it goes into no form."""
    weight = change.site.weight
    if not change.into:
        return [weight._replace(dtype=change.dtype)]
    headers = made_as(change.into, weight.shape, change.dtype).headers
    return [TensorInfo(name, *headers[role]) for role, name in _names(change, headers)]


def beside(change: Change, packed: Packed) -> Iterator[tuple[str, Tensor]]:
    """The tensors that stand beside a weight's codes, by their names in the files."""
    _, *others = _names(change, packed.headers)
    return ((name, packed.tensors[role]) for role, name in others)


def _names(change: Change, headers: Headers) -> Iterator[tuple[str, str]]:
    """Roles and names, in the order in which they are written: codes first."""
    codec, _ = FORMS[change.into]
    stem = change.site.weight.name.removesuffix(codec.plain_ending)
    return ((role, stem + ending) for role, ending in codec.endings.items() if role in headers)


class Made(NamedTuple):
    """What any weight of a shape and dtype is held in."""

    headers: Headers
    settings: Settings
    dtype: torch.dtype | None  # that it tells


@cache
def made_as(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> Made:
    """ConfigError where it cannot be."""
    codec, settings = FORMS[form]
    zeros = (torch.zeros(part.stop - part.start, *shape[1:], dtype=dtype) for part in row_tiles(shape, TILE_ELEMENTS))
    packed = as_stored(codec.scales(zeros, shape, dtype, settings))
    return Made(packed.headers, packed.settings, codec.dtype(packed.settings))


def _fresh(change: Change, exact: Callable[[slice], Tensor]) -> Packed:
    """The scales of a weight that `exact` gives some rows of, in float64."""
    codec, settings = FORMS[change.into]
    shape, where = change.site.weight.shape, printable(change.site.weight.name)
    values = (_rounded(change, exact(rows)) for rows in row_tiles(shape, TILE_ELEMENTS, change.site.together))
    try:
        return codec.scales(values, shape, change.dtype, settings)
    except (ConfigError, ValueRangeError) as error:
        told = str(error).startswith((f"{printable(change.site.name)}:", f"{where}:"))
        raise error if told else type(error)(f"{where}: {error}") from error


def _rounded(change: Change, exact: Tensor) -> Tensor:
    weight = round_once(exact, change.dtype)
    if not all_finite(weight):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueRangeError(
            f"{printable(change.site.weight.name)}: the merged weight is not finite in {dtype}; choose a `dtype` of "
            "wider range"
        )
    return weight


def _coded(codec: TiledCodec, weight: Tensor, by: Packed, rows: slice) -> Packed:
    return codec.coded(weight, cut(codec, by, rows))
