"""Tensors of which each process holds a share (DTensor, as fully_shard makes them): gathered, and shared out again.

Gathering and sharing out take all processes, in the same order.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(values: Tensor) -> bool:
    module: Any = sys.modules.get("torch.distributed.tensor")  # what nobody has imported, nobody has made
    return module is not None and isinstance(values, module.DTensor)


def gathering() -> tuple[type[Any], ...]:
    """The class that fully_shard puts before those of modules, if it is there."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return () if kind is None else (kind,)


def is_gathering(module: nn.Module) -> bool:
    """Has fully_shard been given the very module?"""
    return isinstance(module, gathering())


def axes_of_processes(values: Tensor) -> int:
    """Of the mesh that a sharded tensor is shared out over."""
    sharded: Any = values
    axes: int = sharded.device_mesh.ndim
    return axes


def whole(values: Tensor) -> Tensor:
    """The values themselves, or gathered from all processes, which all compute the same with them."""
    sharded: Any = values
    return sharded.full_tensor() if is_sharded(values) else values


def gathered(values: Tensor) -> Tensor:
    """The same where each process computes with rows of its own: the gradient is the mean of theirs, in shares."""
    found: Tensor = _Gathered.apply(values) if is_sharded(values) else values  # type: ignore[no-untyped-call]
    return found


def shared_as(fresh: Tensor, values: Tensor) -> Tensor:
    """Whole values, of which process 0's count, shared out as `values` are."""
    sharded: Any = values
    return _distributed(fresh, values, sharded.placements) if is_sharded(values) else fresh


def shared_along(fresh: Tensor, weight: Tensor, axes: Mapping[int, int]) -> Tensor:
    """The same beside a weight: where that is shared out along an axis of which `axes` knows, along its own.

    Everything else is whole in each process.
    """
    if not is_sharded(weight):
        return fresh
    from torch.distributed.tensor import Replicate, Shard

    sharded: Any = weight
    own = [axes.get(one.dim) if isinstance(one, Shard) else None for one in sharded.placements]
    return _distributed(fresh, weight, [Replicate() if axis is None else Shard(axis) for axis in own])


def fill(values: Tensor, fresh: Tensor) -> None:
    """Put whole values in place; where each process holds a share, its own."""
    values.copy_(shared_as(fresh, values))


def has_shares(root: nn.Module) -> bool:
    """Does each process hold a share of some parameter?"""
    return any(map(is_sharded, root.parameters()))


@contextmanager
def written_by_one(root: nn.Module) -> Iterator[bool]:
    """Is it for this process to write what all of them have gathered? They go on when it is written."""
    if not has_shares(root):
        yield True
        return
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        torch.distributed.barrier()


def rest(root: nn.Module) -> None:
    """Let go of what fully_shard has gathered for a forward pass: what is written there is lost."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return  # without processes nothing is gathered
    for module in root.modules():
        if is_gathering(module):
            gathering: Any = module
            gathering.reshard()


def _distributed(fresh: Tensor, like: Tensor, placements: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(fresh.to(like.device), sharded.device_mesh, placements)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Any) -> Tensor:
        ctx.mesh, ctx.placements = values.device_mesh, values.placements
        found: Tensor = values.full_tensor()
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        mesh = ctx.mesh
        parts = DTensor.from_local(grad / mesh.size(), mesh, [Partial()] * mesh.ndim)
        return parts.redistribute(mesh, ctx.placements)
