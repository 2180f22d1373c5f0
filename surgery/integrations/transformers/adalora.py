"""AdaLoRA in models of transformers: its regularizer joins the loss that the model itself computes."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.hosts.tree import state_of
from surgery.procedures.live.adalora import in_training, regularizer


def regularized(root: nn.Module, output: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What a model so called has put out, with the regularizer in a loss that can be differentiated."""
    if not in_training(root):
        return output
    if torch.is_grad_enabled():
        return _regularized(root, output, given, named)
    state = state_of(root)
    assert state is not None
    state.regularized = False
    return output


def _regularized(root: nn.Module, output: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    state = state_of(root)
    assert state is not None
    plain = isinstance(output, tuple)  # return_dict=False: the loss is the first, if labels were given
    loss = (output[0] if _has_labels(root, given, named) else None) if plain else output.get("loss")
    state.regularized = False
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return output
    state.regularized = True
    with torch.autocast(loss.device.type, enabled=False):
        whole = loss + regularizer(root).to(loss.device)
    if plain:
        return (whole, *output[1:])
    output["loss"] = whole
    return output


def _has_labels(root: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Is there a loss to be computed? Labels may be given by their place."""
    told = inspect.signature(root.forward).bind_partial(*given, **named).arguments if given else named
    return told.get("labels") is not None
