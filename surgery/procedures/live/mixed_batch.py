"""mixed_batch: each row of a batch under an adapter of its own, told by the first axis of each layer's input."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from torch import nn

from surgery.core.op import Op
from surgery.errors import StateError, UsageError, printable
from surgery.hosts.recognition import op_of
from surgery.hosts.tree import State, adapted_layers, injected, refuse_merged, replaced_modules, state_of
from surgery.layers import BASE, Replaced, Rows
from surgery.procedures.live.adalora import trained_of
from surgery.procedures.live.switch import activate
from surgery.procedures.places.biases import run_biases


@contextmanager
def mixed_batch(root: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Run each row under the adapter named for it; at the end, those that were active.

    Raises UsageError or StateError, and nothing changes, for names that cannot be and rows that cannot be told.
    """
    state, names = injected(root), _checked(root, adapter_names)
    try:
        _mix(root, state, names)
        yield
    finally:
        state.mixed = ()
        activate(root, state, state.active, state.enabled)


@contextmanager
def rows_kept(root: nn.Module) -> Iterator[None]:
    """What `repeat_rows` does within it is taken back."""
    state = state_of(root)
    before = () if state is None else state.mixed
    try:
        yield
    finally:
        if state is not None and state.mixed != before:
            _mix(root, state, before)


def repeat_rows(root: nn.Module, times: int) -> None:
    """Each row of a mixed batch stands `times` times from now on, one after another."""
    state = state_of(root)
    if state is not None and state.mixed and times > 1:
        _mix(root, state, tuple(name for name in state.mixed for _ in range(times)))


def _mix(root: nn.Module, state: State, names: tuple[str, ...]) -> None:
    rows_of = cache(lambda here: Rows(names, here))  # most layers hold the same adapters
    activate(root, state, state.active, state.enabled)
    state.mixed = names
    run_biases(state, (), state.enabled)
    for name, holder in replaced_modules(root).items():
        op = _op_of_copies(holder)
        if op is None:  # none of its adapters is named
            holder.activate((), state.enabled)
        else:
            holder.mix(name, op, rows_of(frozenset(holder.copies)))
    for layer in adapted_layers(root).values():
        if layer.op.roles:
            layer.activate((), state.enabled)
        else:
            layer.mix(rows_of(frozenset(layer.fitted)))


def _op_of_copies(holder: Replaced) -> Op | None:
    """The op of a module that is nothing else, so that its rows are told as those of an adapted layer."""
    op = op_of(holder.original)
    return None if op is None or op.roles else op


def _checked(root: nn.Module, adapter_names: Sequence[str]) -> tuple[str, ...]:
    state = injected(root)
    if isinstance(adapter_names, str) or not adapter_names:
        raise UsageError(f"adapter_names: {printable(adapter_names)!r}; a list of a name for each row is wanted")
    names = tuple(adapter_names)
    for name in dict.fromkeys(names):
        if name != BASE:
            state.require(name)
    refuse_merged(root, "mix a batch")
    if not state.enabled:
        raise StateError("adapter_names: the adapters are disabled; enable_adapters first")
    chosen = set(names) - {BASE}
    _refuse_ranks_in_training(root, state, chosen)
    _refuse_whole_batches(root, chosen)
    return names


def _refuse_ranks_in_training(root: nn.Module, state: State, chosen: set[str]) -> None:
    trained = trained_of(state, [*state.active, *sorted(chosen)])
    if root.training and trained:
        raise StateError(
            f"adapter_names: {', '.join(map(printable, trained))}: an AdaLoRA in training, whose regularizer "
            "and ranks are of whole batches; call eval() first, or train it by itself"
        )


def _refuse_whole_batches(root: nn.Module, chosen: set[str]) -> None:
    """StateError where an adapter acts on no rows, or rows do not come first."""
    for adapter, modules in injected(root).biases.items():
        if adapter in chosen:
            raise StateError(_told(next(iter(modules)), {adapter}, "its bias is trained, which no rows are known of"))
    for name, holder in replaced_modules(root).items():
        both = chosen & holder.copies.keys()
        if both and _op_of_copies(holder) is None:
            kind = type(holder.original).__name__
            raise StateError(_told(name, both, f"a copy stands in for this {kind}, of which no rows are known"))
    for name, layer in adapted_layers(root).items():
        both = chosen & layer.fitted.keys()
        if layer.op.roles and both:
            raise StateError(_told(name, both, f"an {layer.op.name} layer, whose weights are read, not called"))
        if any(layer.fitted[adapter].shared for adapter in both):
            raise StateError(_told(name, both, "each process holds a share, and gathers only what its own rows need"))
    for name, module in root.named_modules() if chosen else ():
        if module.__dict__.get("batch_first") is False:
            raise StateError(_told(name, chosen, "batch_first is False, so that rows need not be the first axis"))


def _told(name: str, chosen: set[str], why: str) -> str:
    where, which = printable(name) or "the model", ", ".join(map(printable, sorted(chosen)))
    return f"{where}: {why}; a mixed batch cannot run {which} there; run each adapter's rows by themselves"
