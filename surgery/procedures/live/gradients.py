"""Gradients: what the loss of an example makes of a base's weights, which stay frozen."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.starter import Observer
from surgery.errors import StateError, UsageError, printable
from surgery.hosts.quantized import is_quantized
from surgery.procedures.checking.outputs import call, placed
from surgery.procedures.places.model_tree import Tree

Loss = Callable[[Any, Any], Tensor]  # of what the model gives, and the batch that it was called with


@contextmanager
def gradients_told(tree: Tree, observers: Mapping[str, Observer], loss: Loss | None) -> Iterator[Callable[[Any], None]]:
    """Within it, what runs the model on a batch and lets each observer see the gradient of its layer's weight."""
    _refuse_inference(observers)
    weights = {name: _weight(tree, name, one.start) for name, one in observers.items()}
    matrices = {name: tree.site(name).acting.matrix for name in observers}

    def run(given: Any) -> None:
        given = placed(given, tree.root)
        found = _loss_of(call(tree.root, given), given, loss)
        if not found.requires_grad:
            return  # it depends on none of them
        for (name, one), gradient in zip(
            observers.items(), torch.autograd.grad(found, list(weights.values()), allow_unused=True), strict=True
        ):
            if gradient is not None:
                one.see(matrices[name](gradient))

    with _learning(tree.root, weights.values()), torch.enable_grad():
        yield run


def _refuse_inference(observers: Mapping[str, Observer]) -> None:
    """StateError where nothing has a gradient, whatever is asked for."""
    if torch.is_inference_mode_enabled():
        start = next(one.start for one in observers.values())
        raise StateError(
            f"examples: torch.inference_mode is on, in which nothing has a gradient, and init_lora_weights {start!r} "
            "starts from those of the weights; call inject outside of it"
        )


def _weight(tree: Tree, name: str, start: str) -> nn.Parameter:
    if is_quantized(tree.plain(name)):
        raise StateError(
            f"{printable(name)}: its weight is quantized, which has no gradient, and init_lora_weights {start!r} "
            "starts from it; load the model in 16 or 32 bits, or start with 'pissa'"
        )
    weight = tree.held(name)["weight"]
    assert weight is not None
    return weight


@contextmanager
def _learning(root: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """These require gradients and no others do; afterwards all is as it was."""
    before = [(one, one.requires_grad) for one in root.parameters()]
    try:
        root.requires_grad_(False)
        for one in weights:
            one.requires_grad_(True)
        yield
    finally:
        for one, required in before:
            one.requires_grad_(required)


def _loss_of(outcome: Any, given: Any, loss: Loss | None) -> Tensor:
    """One number. UsageError where there is none."""
    own = outcome.get("loss") if isinstance(outcome, Mapping) else getattr(outcome, "loss", None)
    found: Any = own if loss is None else loss(outcome, given)
    if isinstance(found, Tensor) and found.numel() == 1:
        return found
    told = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise UsageError(
        f"examples: the loss of one is {printable(told)}; one number is wanted, in a tensor; give batches with labels "
        "to a model that makes a loss of them, or a loss=, which is called with what the model gives and the batch"
    )
