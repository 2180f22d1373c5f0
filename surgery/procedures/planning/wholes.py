"""Wholes: the tensors of an adapter that take the place of the base's, or are added to them."""

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.core.adapter import Adapter
from surgery.core.names import Endings, Naming, nearest, owners
from surgery.core.site import RawDtype, Site, TensorInfo
from surgery.errors import FormatError, InputError, MatchError, ShapeError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.views import plainly
from surgery.procedures.places.tying import Tying, vocabulary, why_absent

EXPLAINED = 8  # of the sites that a base lacks; to find the nearest names takes time


class Whole(NamedTuple):
    """A tensor that takes the place of the base's, or is added to them."""

    info: TensorInfo  # as it stands in the output
    values: Tensor
    new: bool  # the base has none of this name and shape
    copied: bool = False  # what layers may be laid over: a copy of the resized base, or a trained bias


class Wholes:
    """By name, and what was refused: trained modules and biases, and an embedding that has grown."""

    def __init__(self, base: Checkpoint, adapter: Adapter, naming: Naming, tying: Tying | None) -> None:
        self.base, self.adapter, self.naming, self.tying = base, adapter, naming, tying
        self.refusals: list[InputError] = []
        self.by_name: dict[str, Whole] = {}
        self._copies()
        self._saved()

    @property
    def heads(self) -> list[str]:
        """The tensors that only the adapter brings."""
        return [name for name in self.by_name if self._info(name) is None]

    def _copies(self) -> None:
        """Copies of the base's own tensors: equal ones say nothing, grown ones take their place."""
        for name, values in self.adapter.copies.items():
            there = self._there(name)
            info = self._info(there)
            if info is not None and info.shape != tuple(values.shape) and _grown(info, values, self.base):
                self._put(name, Whole(info._replace(shape=tuple(values.shape)), values, True, copied=True))
            elif info is None or (self.base.info(there) is not None and not _equal(self.base, info, values)):
                self.refusals.append(self._unequal(name, info))
            elif self.base.info(there) is None:
                self._put(name, Whole(info, values, True, copied=True))

    def _saved(self) -> None:
        """Trained modules take the place of the base's; over a bias, a layer's own may be laid."""
        for name, values in self.adapter.saved.items():
            there, bias = self._there(name), name in self.adapter.biases
            info, shape = self._info(there), tuple(values.shape)
            if info is None and bias and self._is_shared(values):
                continue
            if info is None and not self._is_new(name):
                self.refusals.append(self._lacking(name))
            elif info is None:
                self._put(name, Whole(TensorInfo(there, values.dtype, shape), values, True))
            elif isinstance(info.dtype, RawDtype):
                self.refusals.append(
                    FormatError(
                        f"{printable(there)}: held as {info.dtype}, which modules_to_save cannot replace; "
                        "plain floats are wanted; dequantize the base first"
                    )
                )
            elif info.shape == shape or _grown(info, values, self.base):
                new = info.shape != shape or self.base.info(there) is None
                held = values.to(info.dtype) if bias else values  # as a live layer holds it while others lie over it
                self._put(name, Whole(info._replace(shape=shape), held, new, copied=bias))
            else:
                self.refusals.append(
                    ShapeError(
                        f"{printable(self.adapter.where)}: {printable(name)} is {list(shape)}, the base's is "
                        f"{list(info.shape)}; they must be equal; resize the base first"
                    )
                )

    def _put(self, name: str, whole: Whole) -> None:
        """A tensor of the adapter has its place, which no other may take."""
        there = whole.info.name
        if there in self.by_name:
            where = printable(self.adapter.where)
            self.refusals.append(
                MatchError(
                    f"{where}: {printable(name)} and another of its tensors are both {printable(there)}; one is wanted"
                )
            )
        self.by_name[there] = whole

    def _there(self, name: str) -> str:
        """A tensor's name as the base has it, or would have it."""
        renamed = self.naming.of(name)
        if self.base.info(renamed) is not None:
            return renamed
        return name if self._info(name) is not None else self._in_memory.get(name, name)

    @cached_property
    def _in_memory(self) -> Mapping[str, str]:
        return self.base.in_memory()

    def _info(self, name: str) -> TensorInfo | None:
        """Of the base's tensor, or of the head that is tied."""
        here = self.base.info(name)
        if here is not None:
            return here
        head = None if self.tying is None else self.tying.head.weight
        return head if head is not None and head.name == name else None

    def _is_shared(self, values: Tensor) -> bool:
        """Is it one of two tied biases, of which the base's files hold the other?"""
        others = (name for name in self.adapter.biases if self._info(self._there(name)) is not None)
        return any(torch.equal(self.adapter.saved[name], values) for name in others)

    def _is_new(self, name: str) -> bool:
        """Does the tensor belong to a module of which the base has nothing, so that only the adapter brings it?"""
        ends = Endings(self.adapter.config.modules_to_save or ())
        last = {module.rpartition(".")[2] for module in owners(name) if ends.end(module)}
        return bool(last) and not any(last & set(info.name.split(".")) for info in self.base.weights())

    def _lacking(self, name: str) -> MatchError:
        if len(self.refusals) >= EXPLAINED:
            return MatchError(f"{printable(self.adapter.where)}: {self._trained(name)} is not in the base")
        tied = why_absent(self.base, name)
        if tied:
            return MatchError(f"{printable(self.adapter.where)}: {self._trained(name)}: {tied}")
        close = ", ".join(printable(other) for other in nearest(name, [info.name for info in self.base.weights()]))
        return MatchError(
            f"{printable(self.adapter.where)}: {self._trained(name)} is not in the base; "
            f"nearest there: {close}; save the base with that module first"
        )

    def _trained(self, name: str) -> str:
        """A tensor's name, and the field by which it is there."""
        if name in self.adapter.biases:
            return printable(name)
        targeted = any(owner in self.adapter.targets for owner in owners(name))
        return printable(name) + (" of target_modules" if targeted else " of modules_to_save")

    def _unequal(self, name: str, info: TensorInfo | None) -> MatchError:
        where = printable(self.adapter.where)
        tied = why_absent(self.base, name) if info is None else ""
        if tied:
            return MatchError(f"{where}: its copy of {printable(name)}: {tied}")
        if info is None:
            return MatchError(f"{where}: it holds a copy of {printable(name)}, which the base lacks; is this its base?")
        return MatchError(
            f"{where}: its copy of {printable(name)} is not equal to the base's; "
            "it was trained or resized; name it in modules_to_save"
        )


def same(a: Tensor | None, b: Tensor) -> bool:
    """Are there values, and the same, whatever the dtype of the first?"""
    return a is not None and a.shape == b.shape and bool((a.to(b.dtype) == b).all())


def _grown(info: TensorInfo, values: Tensor, base: Checkpoint) -> bool:
    """Is it a tensor with a row for each token, that now has rows for other tokens too?"""
    rows = info.name in vocabulary(base) or base.info(info.name) is None
    return rows and values.dim() == len(info.shape) > 0 and tuple(values.shape[1:]) == info.shape[1:]


def _equal(base: Checkpoint, info: TensorInfo, values: Tensor) -> bool:
    if info.shape != tuple(values.shape):
        return False
    whole = plainly(base, Site(info.name, {"weight": info})).tensors["weight"]
    return bool((whole == values.to(whole.dtype)).all())
