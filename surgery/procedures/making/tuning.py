"""What a tuned checkpoint has otherwise than its base: the tensors that changed, by module."""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.name_map import Part
from surgery.core.names import nearest
from surgery.core.site import Site, TensorInfo
from surgery.core.source import TILE_ELEMENTS, row_tiles
from surgery.errors import FormatError, InputError, MatchError, ShapeError, printable
from surgery.hosts.checkpoint import Checkpoint


def check_alike(base: Checkpoint, tuned: Checkpoint) -> None:
    """MatchError for names that only one has, ShapeError for another shape, FormatError for quantized weights."""
    for one in (base, tuned):
        for name in one.packed:
            raise FormatError(
                f"{printable(one.path)}: {printable(name)} is quantized; plain weights are wanted; "
                "extract from checkpoints in 16 or 32 bits"
            )
    for name in sorted(base.at.keys() ^ tuned.at.keys()):
        here, other = (base, tuned) if name in base.at else (tuned, base)
        near = ", ".join(map(printable, nearest(name, other.at)))
        raise MatchError(
            f"{printable(other.path)}: it has no {printable(name)}, as {printable(here.path)} has; checkpoints of the "
            f"same names are wanted; nearest are {near}"
        )
    for info in base.tensors():
        there = tuned.at[info.name][1].info
        if there.shape != info.shape:
            raise ShapeError(
                f"{printable(tuned.path)}: {printable(info.name)} is {list(there.shape)}, {list(info.shape)} in the "
                "base; equal shapes are wanted; a resized vocabulary cannot be extracted"
            )


def changed_modules(base: Checkpoint, tuned: Checkpoint) -> dict[str, list[TensorInfo]]:
    """The tensors that are not equal in both, by module. InputError if all are."""
    modules: dict[str, list[TensorInfo]] = {}
    for info in base.tensors():
        if _changed(base, tuned, info):
            modules.setdefault(info.name.rpartition(".")[0], []).append(info)
    if not modules:
        raise InputError(f"{printable(tuned.path)}: every tensor is as in the base; nothing can be extracted")
    return modules


class OwnNames:
    """What the model in memory calls the tensors of the files: an adapter's names are those of its modules."""

    def __init__(self, base: Checkpoint) -> None:
        self._map, self._called = base.names(), base.called()
        self._linears = cache(base.linears)

    def of(self, name: str) -> str | None:
        """None for what is held in a stack there, or called otherwise and no linear layer as far as is known."""
        found = self._called(name)
        if self._map.part(found) is not None or not (self._map.rename(name) == name or self._is_linear(found)):
            return None
        return found

    def part(self, name: str) -> Part | None:
        """Of a stack in memory; None for what is no part of one."""
        return self._map.part(self._called(name))

    def _is_linear(self, name: str) -> bool:
        told = self._linears()
        return told is not None and name.rpartition(".")[0] in told.quantized | told.others


def whole(source: Checkpoint, info: TensorInfo, rows: slice | None = None) -> Tensor:
    """A tensor, or `rows` of its first axis."""
    return source.load(Site(info.name, {"weight": info}), rows).tensors["weight"]


def of_module(source: Checkpoint, module: str) -> Iterable[TensorInfo]:
    return [info for info in source.tensors() if info.name.rpartition(".")[0] == module]


def _changed(base: Checkpoint, tuned: Checkpoint, info: TensorInfo) -> bool:
    there = tuned.at[info.name][1].info
    if {info.dtype, there.dtype} <= set(PLAIN_DTYPES):
        # All rows are read, so that the base's are hashed.
        tiles = row_tiles(info.shape, TILE_ELEMENTS)
        equal = [torch.equal(whole(base, info, one).double(), whole(tuned, there, one).double()) for one in tiles]
        return not all(equal)
    pairs = zip(base.read(info.name), tuned.read(info.name), strict=False)
    return info.dtype != there.dtype or any(one != other for one, other in pairs)
