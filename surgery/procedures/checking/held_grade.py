"""The grades of weights that are held in a format, and what is left there of the adapters.

bits: the codes and scales that the merge gives. rounding: those of a weight as near as correct merges are, by scales of
such a weight, each code the nearest. different: neither.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.codecs import FORMS, codec_of
from surgery.core.codec import Codec, Packed
from surgery.core.rounding import ulp
from surgery.core.source import Source
from surgery.errors import ValueRangeError
from surgery.hosts.change import Change, MergedTile
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.encoded import Encoded, beside, tiles
from surgery.hosts.views import Merged, plainly
from surgery.io.octets import octets
from surgery.procedures.checking.grade import Grade, reach

_STEPS = 2  # ulps, of the largest of a block: of its sum and of the delta


class _Rows(NamedTuple):
    """Of a weight in a form, as the merge gives them, and as they were found."""

    tile: MergedTile
    wanted: Packed
    found: Packed


def kept(base: Checkpoint, out: Checkpoint, change: Change) -> Grade:
    """Grade the codes of a weight that keeps its format."""
    seen: list[MergedTile] = []
    view, grade = Merged(base, [change], seen.append), Grade("bits")
    try:
        for rows in tiles(change):
            wanted, found = view.load(change.site, rows), out.load(change.site, rows)
            grade = grade.worse(_kept_rows(base, seen.pop(), wanted.tensors["weight"], found))
    except ValueRangeError as error:
        return Grade("different", why=f"it cannot be derived: {error}")
    return grade


def encoded(base: Source, out: Checkpoint, change: Change) -> Grade:
    """Grade a weight that went into a form."""
    seen: list[MergedTile] = []
    view, grade = Encoded(base, [change], seen.append), Grade("bits")
    try:
        scales = _scales_same(out, change, view)
        for rows in tiles(change):
            wanted, found = view.coded(change, rows), out.load(change.site, rows)
            grade = grade.worse(_encoded_rows(view, _Rows(seen.pop(), wanted, found), scales))
    except ValueRangeError as error:
        return Grade("different", why=f"it cannot be derived: {error}")
    return grade


def _kept_rows(base: Checkpoint, tile: MergedTile, codes: Tensor, found: Packed) -> Grade:
    """`codes` are those that the merge gives."""
    change = tile.change
    codec = codec_of(found, change.site.name)
    after = codec.decode(found, torch.float64)
    survival = tile._replace(merged=after).survival
    if _same(_codes(codec, found), codes):
        return Grade("bits", survival=survival)
    apart = float((after - tile.merged).abs().max())
    # Others decode to what the base computes in, add, and round to that.
    dtype = base.packed[change.site.weight.name].plain.torch_dtype
    plain = change.site.weight._replace(dtype=dtype)
    site = replace(change.site, tensors={**change.site.tensors, "weight": plain})
    value, allowed = reach(tile._replace(change=replace(change, site=site, dtype=dtype)))
    assert tile.original is not None
    near = not change.feedback and _are_nearest(codec, found, value, allowed + ulp(tile.original, dtype) / 2, dtype)
    why = "" if near else "its codes are not the nearest ones by the base's scales"
    return Grade("rounding" if near else "different", apart, why, survival)


def _encoded_rows(view: Encoded, rows: _Rows, scales: bool) -> Grade:
    """`scales`: are those of the whole weight the same?"""
    tile, wanted, found = rows
    change, merged = tile.change, tile.merged
    codec, _ = FORMS[change.into]
    after = codec.decode(found, torch.float64)
    survival = tile._replace(merged=after).survival
    if scales and _same(_codes(codec, found), _codes(codec, wanted)):
        return Grade("bits", survival=survival)
    apart = float((after - merged).abs().max())
    original = plainly(view.plain.source, change.origin or change.site, tile.rows).tensors["weight"]
    _, laid = view.plain.exact(change.site, tile.rows)
    value, allowed = reach(MergedTile(change, tile.rows, original, laid, None))
    if codec.made_in is not None:
        allowed = allowed + ulp(value, codec.made_in) / 2
    why = ""
    if not scales and not _scales_near(codec, wanted, found, change.dtype):
        why = "its scales are not those of the merged weight"
    elif change.feedback or not _are_nearest(codec, found, value, allowed, change.dtype):
        why = f"its codes in {change.into} are not those of the merged weight"
    return Grade("different" if why else "rounding", apart, why, survival)


def _codes(codec: Codec, packed: Packed) -> Tensor:
    return packed.tensors[next(iter(codec.endings))]


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(*(one.contiguous().flatten().view(torch.uint8) for one in (left, right)))


def _scales_same(out: Checkpoint, change: Change, view: Encoded) -> bool:
    """To the byte, and all else that stands beside the codes."""
    named = beside(change, view.by(change).outcome)
    return all(name in out.at and b"".join(out.read(name)) == octets(values.contiguous()) for name, values in named)


def _scales_near(codec: Codec, wanted: Packed, found: Packed, dtype: torch.dtype) -> bool:
    """Do equal codes mean the same by both, to some ulps of `dtype`, and a step of scales that are codes themselves?"""
    role, theirs = next(iter(codec.endings)), _codes(codec, found)
    codes = _codes(codec, wanted).flatten().view(torch.uint8).view(theirs.dtype).view(theirs.shape)
    value = codec.decode(wanted, torch.float64)
    apart = codec.decode(found._replace(tensors={**found.tensors, role: codes}), torch.float64) - value
    room = _STEPS * torch.finfo(dtype).eps * value.abs()
    for shifted in _shifted(codec, wanted):
        room = torch.maximum(room, (codec.decode(shifted, torch.float64) - value).abs().nan_to_num(0.0))
    return bool((apart.abs() <= room).all())


def _shifted(codec: Codec, packed: Packed) -> Iterator[Packed]:
    """The same by the next lower and the next higher scales, where these are held in a byte each."""
    assert packed.rows is not None
    roles = codec.spans(packed.headers, packed.settings, packed.rows).keys() & packed.tensors.keys()
    for role in sorted(roles - {next(iter(codec.endings))}):
        held = packed.tensors[role]
        for step in (-1, 1) if held.itemsize == 1 else ():
            moved = (held.view(torch.uint8).to(torch.int16) + step).clamp(0, 255).to(torch.uint8).view(held.dtype)
            yield packed._replace(tensors={**packed.tensors, role: moved})


def _are_nearest(codec: Codec, found: Packed, value: Tensor, allowed: Tensor, dtype: torch.dtype) -> bool:
    """Is each code the nearest to something that lies so near to `value`?

    Quotients by the scale are rounded too, at worst in `dtype`.
    """
    held, (below, above) = codec.decode(found, torch.float64), codec.grid(found)
    allowed = allowed + torch.finfo(dtype).eps * held.abs()
    low = torch.where(below < held, (below + held) / 2, -torch.inf)
    high = torch.where(above > held, (held + above) / 2, torch.inf)
    return bool(((value >= low - allowed) & (value <= high + allowed)).all())
