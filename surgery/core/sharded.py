"""Tensors of which each process holds a share (DTensor, as fully_shard makes them): gathered, and shared out again.

Gathering and sharing out take all processes, in the same order.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(values: Tensor) -> bool:
    module: Any = sys.modules.get("torch.distributed.tensor")  # what nobody has imported, nobody has made
    return module is not None and isinstance(values, module.DTensor)


def whole(values: Tensor) -> Tensor:
    """The values themselves, or gathered from all processes."""
    sharded: Any = values
    return sharded.full_tensor() if is_sharded(values) else values


def fill(values: Tensor, fresh: Tensor) -> None:
    """Put whole values in place; where each process holds a share, its own."""
    if is_sharded(values):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = values
        fresh = distribute_tensor(fresh.to(values.device), sharded.device_mesh, sharded.placements)
    values.copy_(fresh)


def rest(root: nn.Module) -> None:
    """Let go of what fully_shard has gathered for a forward pass: what is written there is lost."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None or not torch.distributed.is_initialized():  # without processes nothing is gathered
        return
    for module in root.modules():
        gathered: Any = module
        if isinstance(gathered, kind):
            gathered.reshard()
