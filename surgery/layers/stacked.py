"""Stacked: a model's layers in another order, some left out, some several times; copies that share the weights."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch import nn

_NUMBER = "layer_idx"  # by which layers of transformers find their keys and values in a cache


class Stacked(nn.ModuleList):
    """Stands in the place of the list `own`, which is no part of the model meanwhile, and follows it all the same."""

    own: nn.ModuleList
    order: tuple[int, ...]  # of the layers of `own`
    told: Mapping[str, Any]  # what the model's config says of those

    def __init__(self, own: nn.ModuleList, order: Sequence[int], told: Mapping[str, Any]) -> None:
        super().__init__(_numbered(_sharing(own[at]), number) for number, at in enumerate(order))
        self.__dict__.update(own=own, order=tuple(order), told=told)

    def __getitem__(self, at: Any) -> Any:  # a slice, as decoders take of their layers, is a list like others
        return nn.ModuleList(self._modules.values())[at] if isinstance(at, slice) else super().__getitem__(at)

    def train(self, mode: bool = True) -> Self:
        self.own.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:  # to another device or dtype
        self.own._apply(fn, recurse)  # type: ignore[no-untyped-call]
        found: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return found


def _sharing(layer: nn.Module) -> nn.Module:
    """A copy that holds the very parameters."""
    return copy.deepcopy(layer, {id(one): one for one in layer.parameters()})


def _numbered(layer: nn.Module, number: int) -> nn.Module:
    for module in layer.modules():
        if _NUMBER in module.__dict__:
            module.__dict__[_NUMBER] = number
    return layer
