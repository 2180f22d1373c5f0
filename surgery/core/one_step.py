"""One step: whether a computation may be a step of autograd of its own, in place of the operations it is made of."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def is_eager(*given: Tensor) -> bool:
    """Is there nothing that looks for separate operations: no subclass of Tensor, no compiler, tracer or transform?"""
    return (
        all(type(one) in (Tensor, nn.Parameter) for one in given)
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def may_be_one_step(*given: Tensor) -> bool:
    """Is it so, and are these in one dtype? Half types are left to the operations, which round as PEFT's do."""
    x = given[0]
    alike = x.dtype.itemsize >= 4 and all(one.dtype == x.dtype for one in given)
    return alike and not torch.is_autocast_enabled(x.device.type) and is_eager(*given)
