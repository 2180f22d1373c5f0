"""AdaLoRA in models of transformers: its regularizer joins the loss that the model itself computes, or its Trainer."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.hosts.tree import state_of
from surgery.procedures.live.adalora import in_training, regularizer


def regularized(root: nn.Module, output: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What a model so called has put out, with the regularizer in a loss that can be differentiated."""
    if not in_training(root):
        return output
    state = state_of(root)
    assert state is not None
    if torch.is_grad_enabled() and not state.by_trainer:
        return _regularized(root, output, given, named)
    state.regularized = False
    return output


def with_regularizer(root: nn.Module, compute: Callable[[], Any], parts: int) -> Any:
    """What `compute` gives: a loss, alone or first of several, with 1 / `parts` of the regularizer in it.

    Whatever the loss is made of; the model itself adds nothing meanwhile. Who calls orthogonal_loss has added it.
    """
    state = state_of(root)
    if state is None or not in_training(root) or not torch.is_grad_enabled():
        return compute()
    state.by_trainer = state.owed = True
    try:
        found = compute()
        loss = found[0] if isinstance(found, tuple) else found
        if not state.owed or not loss.requires_grad:
            return found
    finally:
        state.by_trainer = state.owed = False
    state.regularized = True
    whole = _sum(root, loss, parts)
    return (whole, *found[1:]) if isinstance(found, tuple) else whole


def _regularized(root: nn.Module, output: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    state = state_of(root)
    assert state is not None
    plain = isinstance(output, tuple)  # return_dict=False: the loss is the first, if labels were given
    loss = (output[0] if _has_labels(root, given, named) else None) if plain else output.get("loss")
    state.regularized = False
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return output
    state.regularized = True
    whole = _sum(root, loss, 1)
    if plain:
        return (whole, *output[1:])
    output["loss"] = whole
    return output


def _sum(root: nn.Module, loss: Tensor, parts: int) -> Tensor:
    with torch.autocast(loss.device.type, enabled=False):
        return loss + regularizer(root).to(loss.device) / parts


def _has_labels(root: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Is there a loss to be computed? Labels may be given by their place."""
    told = inspect.signature(root.forward).bind_partial(*given, **named).arguments if given else named
    return told.get("labels") is not None
