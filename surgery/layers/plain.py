"""Whether a layer does anything beside its forward, so that another may compute in its place."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain_linear(module: nn.Module) -> bool:
    """Is it nn.Linear's forward of a weight of its own, which nothing watches?"""
    held = module.__dict__
    return (
        type(module) is nn.Linear
        and "forward" not in held  # as accelerate's hooks put it
        and not any(held[hooks] for hooks in _HOOKS)
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
    )
