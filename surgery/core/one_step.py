"""One step: whether a computation may be a step of autograd of its own, in place of the operations it is made of."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def may_be_one_step(*given: Tensor) -> bool:
    """Are these plain tensors of one dtype, and is there nothing that looks for the separate operations?

    Half types are left to these, which round as PEFT's do.
    """
    x = given[0]
    return (
        x.dtype.itemsize >= 4
        and all(type(one) in (Tensor, nn.Parameter) and one.dtype == x.dtype for one in given)
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )
