"""The model that torch.compile, DDP or DataParallel was given: what they put around it has no part in its names."""

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from surgery.errors import StateError


def within(root: nn.Module) -> nn.Module:
    """The model itself, of however many that lie around it."""
    inner = _given_to(root)
    return root if inner is None else within(inner)


def trainable_within(root: nn.Module) -> nn.Module:
    """The same, for what is to be trained over it. StateError within DDP, which knows no parameter that comes later."""
    inner, wrapper = within(root), root
    while wrapper is not inner:
        if isinstance(wrapper, DistributedDataParallel):
            raise StateError(
                "the model is wrapped by DistributedDataParallel, which would leave an adapter's gradients in each "
                "process; an adapter that is to be trained comes first: lay it over the .module, then wrap that anew"
            )
        wrapper = _given_to(wrapper) or inner
    return inner


def _given_to(wrapper: nn.Module) -> nn.Module | None:
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")  # what nobody has imported, nobody has compiled by
    if isinstance(wrapper, DistributedDataParallel | DataParallel):
        found: nn.Module = wrapper.module
        return found
    return wrapper._modules["_orig_mod"] if dynamo and isinstance(wrapper, dynamo.OptimizedModule) else None
