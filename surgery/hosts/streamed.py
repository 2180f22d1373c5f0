"""Streamed: a model whose weights are read as its layers run, and let go of again.

It takes the memory of the weights of one layer; of a linear layer or an embedding, of some rows of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.core.source import row_tiles
from surgery.hosts.twin import twin

Read = Callable[[str, slice | None], Tensor]  # a tensor of the model by its name, or rows of it
Values = Callable[..., Tensor]  # the same, cast
_READING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # they read the weights of layers within them
_ELEMENTS = 1 << 22  # of a weight at a time


def streamed(root: nn.Module, read: Read, dtype: torch.dtype) -> nn.Module:
    """A copy of a model without weights, which computes in `dtype` with those that `read` gives."""

    def cast(held: Tensor) -> Tensor:
        return held.to(dtype) if held.is_floating_point() else held

    def values(name: str, rows: slice | None = None) -> Tensor:
        return cast(read(name, rows))

    found = twin(root, cast)
    for name in found.state_dict().keys() - dict(found.named_parameters(remove_duplicate=False)).keys():
        owner, _, own = name.rpartition(".")
        found.get_submodule(owner)._buffers[own] = values(name)
    whole = ""
    for name, module in found.named_modules():
        if not (whole and name.startswith(whole)):
            _stream(name, module, values)
            whole = f"{name}." if isinstance(module, _READING) else ""
    return found


def held_elements(root: nn.Module) -> int:
    """How many elements of weights lie in memory at once, at most."""
    return max((_held(module) for module in root.modules()), default=0)


def _in_rows(name: str, layer: nn.Linear, read: Values, x: Tensor) -> Tensor:
    """A linear layer's forward, some outputs at a time."""
    tiles = row_tiles(tuple(layer.weight.shape), _ELEMENTS)
    out = torch.cat([functional.linear(x, read(f"{name}.weight", rows)) for rows in tiles], -1)
    return out if layer.bias is None else out.add_(read(f"{name}.bias"))


def _looked_up(name: str, read: Values, ids: Tensor) -> Tensor:
    """An embedding's forward, with the rows that are asked for."""
    chosen, places = torch.unique(ids, return_inverse=True)
    return torch.cat([read(f"{name}.weight", slice(one, one + 1)) for one in chosen.tolist()])[places]


def _stream(name: str, module: nn.Module, read: Values) -> None:
    """Others may ask for its weight's dtype, so that it stays what it is."""
    if type(module) is nn.Linear:
        module.__dict__["forward"] = partial(_in_rows, name, module, read)
    elif type(module) is nn.Embedding:
        module.__dict__["forward"] = partial(_looked_up, name, read)
    else:
        _stream_whole(name, module, read)


def _stream_whole(name: str, module: nn.Module, read: Values) -> None:
    """Its own parameters are there while it runs, or all that are within it if it reads them."""
    away = dict(module.named_parameters(recurse=isinstance(module, _READING)))

    def take(*_: Any) -> None:
        for own in away:
            _put(module, own, nn.Parameter(read(f"{name}.{own}".lstrip(".")), requires_grad=False))

    def let_go(*_: Any) -> None:
        for own, held in away.items():
            _put(module, own, held)

    if away:
        module.register_forward_pre_hook(take)
        module.register_forward_hook(let_go)


def _put(module: nn.Module, name: str, held: nn.Parameter) -> None:
    owner, _, own = name.rpartition(".")
    module.get_submodule(owner)._parameters[own] = held


def _held(module: nn.Module) -> int:
    own = sum(held.numel() for held in module.parameters(recurse=isinstance(module, _READING)))
    return min(own, _ELEMENTS) if type(module) in (nn.Linear, nn.Embedding) else own
