"""Placing: an adapter's tensors beside the weight that they lie over, on its device and shared out as it is."""

from collections.abc import Iterable

import torch
from torch import Tensor

from surgery.core.method import Params
from surgery.core.op import Op
from surgery.core.sharded import has_shares, is_sharded, shared_along
from surgery.errors import StateError, printable
from surgery.procedures.places.model_tree import Tree


def placed(params: Params, weight: Tensor, op: Op, whole: bool = False) -> Params:
    """In the weight's dtype, or in float32 where that is a half type: small steps survive.

    Beside a weight that is shared out by rows B is so too, by columns A is; so each process has all that its share of
    the change is made of. Everything else, and all of it if `whole`, is whole in each, and everywhere it is as process
    0 has made it.
    """
    half = weight.dtype.itemsize < 4
    dtype = torch.float32 if half else weight.dtype
    found = {
        role: values.to(weight.device, dtype if values.is_floating_point() else None) for role, values in params.items()
    }
    if not is_sharded(weight):
        return found
    row = slice(0, 1)
    outputs, inputs = (0, 1) if op.tile(row)[0] == row else (1, 0)  # the axes of the weight
    axes = {} if whole else {"A": {inputs: 1}, "B": {outputs: 0}}  # [r, in], [out, r]
    return {role: shared_along(values, weight, axes.get(role, {})) for role, values in found.items()}


def refuse_shares(tree: Tree, names: Iterable[str], why: str) -> None:
    """StateError where each process holds a share of what would be copied, or read in a format."""
    for name in names:
        if has_shares(tree.modules[name]):
            raise StateError(
                f"{printable(name)}: {why}, and each process holds a share of it; inject or load first, then "
                "fully_shard"
            )
