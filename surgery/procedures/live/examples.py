"""Examples run through a live model's base, for an adapter that starts from what its layers make of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.config import AdapterConfig
from surgery.core.starter import Observer
from surgery.errors import MatchError, StateError, UsageError, printable
from surgery.procedures.checking.outputs import call, evaluating, placed
from surgery.procedures.live.gradients import Loss, gradients_told
from surgery.procedures.live.switch import base_alone
from surgery.procedures.places.model_tree import Tree

MOST_BATCHES = 1000  # of which several rounds over the same examples may consist


@dataclass(frozen=True)
class Examples:
    """Batches, each what the model is called with: a tensor, several in a list or tuple, or keyword arguments."""

    batches: Iterable[Any]
    name: str = "examples"  # of the argument that they are given as
    loss: Loss | None = None  # where the model itself makes none of a batch

    def __post_init__(self) -> None:
        if not isinstance(self.batches, Iterable) or isinstance(self.batches, Tensor | Mapping | str):
            raise UsageError(
                f"{self.name}: a {type(self.batches).__name__}; an iterable of batches is wanted, such as a list or a "
                "DataLoader; put a single one into a list"
            )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    @property
    def runs_once(self) -> bool:
        """Are they gone once they have been iterated over?"""
        return isinstance(self.batches, Iterator)


def observe(tree: Tree, config: AdapterConfig, observers: Mapping[str, Observer], examples: Examples) -> None:
    """Let each observer see what comes to its layer, or back to it, by the layers' names, with no adapter running.

    UsageError for examples that do not do, MatchError for a layer that none of them reaches.
    """
    _refuse_processes()
    root = tree.root
    refuse_meta(root)
    with ExitStack() as stack:
        stack.enter_context(evaluating(root))
        stack.enter_context(base_alone(root))
        if any(one.sees == "gradients" for one in observers.values()):
            run = stack.enter_context(gradients_told(tree, observers, examples.loss))
        else:
            run = stack.enter_context(_watched(tree, observers))
        _run_all(config, observers, examples, run)


class Batch:
    """What runs now."""

    given: Any = None

    def run(self, root: nn.Module, given: Any) -> None:
        """Call the model with it, on the model's device."""
        self.given = placed(given, root)
        call(root, self.given)

    def counted(self, x: Tensor, left_out: int | None = None) -> Tensor:
        """The rows [rows, in] of a layer's input, without padding and what has the label `left_out`."""
        rows = x.reshape(-1, x.shape[-1])
        mask = _mask(self.given, left_out)
        if mask is None or x.shape[:-1] not in (mask.shape, (mask.numel(),)):
            return rows
        return rows[mask.flatten().to(rows.device)]


def _run_all(
    config: AdapterConfig, observers: Mapping[str, Observer], examples: Examples, run: Callable[[Any], None]
) -> None:
    """Until the observers are content, or once where they want all."""
    until_settled, ran = any(one.until_settled for one in observers.values()), 0
    while True:
        before = ran
        for given in examples:
            run(given)
            ran += 1
            if until_settled and config.settled(observers):
                return
        if ran == before:
            raise UsageError("examples: there are none; give batches that the model can be called with")
        _refuse_unseen(observers)
        if not until_settled:
            return
        if examples.runs_once or ran >= MOST_BATCHES:
            again = "an iterator runs once: give a list or a DataLoader" if examples.runs_once else "give others"
            raise UsageError(
                f"examples: after {ran} batches the directions of inputs still turn from one to the next; {again}, or "
                "ask for less (a smaller tau or r)"
            )


def _refuse_unseen(observers: Mapping[str, Observer]) -> None:
    for name, one in observers.items():
        if not one.seen():
            raise MatchError(
                f"{printable(name)}: none of the examples came to it, and init_lora_weights {one.start!r} starts from "
                "what does; give other examples, or exclude it"
            )


@contextmanager
def _watched(tree: Tree, observers: Mapping[str, Observer]) -> Iterator[Callable[[Any], None]]:
    """Within it, what runs the model on a batch, with hooks on the layers; they are gone afterwards."""
    batch = Batch()
    hooks = [
        tree.plain(name).register_forward_pre_hook(partial(_see, one, batch), with_kwargs=True)
        for name, one in observers.items()
    ]
    try:
        with torch.no_grad():
            yield partial(batch.run, tree.root)
    finally:
        for hook in hooks:
            hook.remove()


def _see(one: Observer, batch: Batch, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    del module
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    one.see(batch.counted(x.detach(), one.left_out))


def _mask(given: Any, left_out: int | None) -> Tensor | None:
    """Which positions count, of a batch that says so; None where all do."""
    if not isinstance(given, Mapping):
        return None
    attention, labels = given.get("attention_mask"), given.get("labels")
    mask = attention.bool() if isinstance(attention, Tensor) and attention.dim() == 2 else None
    if left_out is None or not isinstance(labels, Tensor) or labels.dim() != 2:
        return mask
    labelled = labels != left_out
    return labelled if mask is None else mask & labelled


def refuse_meta(root: nn.Module) -> None:
    """StateError for a model that lacks weights, and has no hooks of accelerate that bring them."""
    if any("_hf_hook" in module.__dict__ for module in root.modules()):
        return
    for name, values in chain(root.named_parameters(), root.named_buffers()):
        if values.is_meta:
            raise StateError(
                f"{printable(name)}: it is on the meta device, so that nothing can be run; give the model its weights "
                "first"
            )


def _refuse_processes() -> None:
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if together and torch.distributed.get_world_size() > 1:
        raise StateError(
            "examples: there are several processes, each of which would start from examples of its own; inject "
            "before they begin, or start with init_lora_weights=True"
        )
