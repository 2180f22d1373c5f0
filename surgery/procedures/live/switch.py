"""switch: which adapters of a live model run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from surgery.errors import StateError, UsageError
from surgery.hosts.tree import State, adapted_layers, injected, places, refuse_merged, replaced_modules, state_of
from surgery.layers import Adapted, Replaced
from surgery.layers.trained_bias import trained_bias
from surgery.procedures.places.biases import run_biases


class Switched:
    """The outcome of a switch that is made; as a context it is taken back at the end."""

    def __init__(self, root: nn.Module, before: tuple[tuple[str, ...], bool]) -> None:
        self.root, self.before = root, before

    def __enter__(self) -> None:
        """The switch is made already."""

    def __exit__(self, *_: object) -> None:
        _switch(self.root, *self.before)


def set_adapter(root: nn.Module, adapters: str | Sequence[str]) -> Switched:
    """Run these adapters, in this order. StateError for one that is not there, or while merged."""
    chosen = (adapters,) if isinstance(adapters, str) else tuple(adapters)
    state = injected(root)
    for adapter in chosen:
        state.require(adapter)
    if len(set(chosen)) != len(chosen):
        raise UsageError(f"set_adapter: {list(chosen)}; each adapter may stand once")
    for name, module in replaced_modules(root).items():
        both = [adapter for adapter in chosen if adapter in module.copies]
        if len(both) > 1:
            raise UsageError(f"set_adapter: {' and '.join(both)} both replace {name}; only one of them can run")
    return _switch(root, chosen, state.enabled)


def enable_adapters(root: nn.Module) -> Switched:
    """Run the active adapters."""
    return _switch(root, injected(root).active, True)


def disable_adapters(root: nn.Module) -> Switched:
    """Run the base alone."""
    return _switch(root, injected(root).active, False)


@contextmanager
def base_alone(root: nn.Module) -> Iterator[None]:
    """Within it no adapter runs, if there are any."""
    state = state_of(root)
    if state is None:
        yield
        return
    with _switch(root, state.active, False):
        yield


def activate(root: nn.Module, state: State, adapters: tuple[str, ...], enabled: bool) -> None:
    """Run `adapters`, in this order, wherever they lie, if `enabled`."""
    for place in places(root):
        if isinstance(place.module, Adapted | Replaced):
            place.module.activate(adapters, enabled)
    run_biases(state, adapters, enabled)
    state.active, state.enabled = adapters, enabled


def train_running(root: nn.Module) -> None:
    """The adapters that are active require gradients, if they are to be trained; no other does."""
    state = injected(root)
    trained = {name for name in state.active if not state.configs[name].inference_mode}
    for layer in adapted_layers(root).values():
        for adapter, one in layer.fitted.items():
            for values in one.held.values():
                if isinstance(values, nn.Parameter):
                    values.requires_grad_(adapter in trained)
    for holder in replaced_modules(root).values():
        for adapter, module in holder.copies.items():
            module.requires_grad_(adapter in trained)
    for adapter, modules in state.biases.items():
        for module in modules.values():
            trained_bias(module).requires_grad_(adapter in trained)


def refuse_untrained(root: nn.Module) -> None:
    """StateError where nothing but adapters could be trained, and none of them is."""
    state, layers = state_of(root), adapted_layers(root).values()
    if state is None or not state.configs:
        return
    refuse_merged(root, "train")
    mine = {id(values) for layer in layers for one in layer.fitted.values() for values in one.held.values()}
    mine |= {id(values) for holder in replaced_modules(root).values() for values in holder.copies.parameters()}
    trained = [id(one) for one in root.parameters() if one.requires_grad]
    if not trained:
        raise StateError("nothing is to be trained: load the adapter with trainable=True, or inject a fresh one")
    if not state.enabled and mine.issuperset(trained):
        raise StateError("nothing is to be trained while adapters are disabled; enable_adapters first")


def _switch(root: nn.Module, adapters: tuple[str, ...], enabled: bool) -> Switched:
    refuse_merged(root, "switch adapters")
    state = injected(root)
    before = state.active, state.enabled
    activate(root, state, adapters, enabled)
    return Switched(root, before)
