"""switch: which adapters of a live model run."""

from collections.abc import Sequence

from torch import nn

from surgery.errors import StateError, UsageError
from surgery.hosts.tree import State, replaced_modules, state_of
from surgery.procedures.adapter_files import known
from surgery.procedures.inject import activate
from surgery.procedures.merge import refuse_merged


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
    state = _state(root)
    for adapter in chosen:
        known(state, adapter)
    if len(set(chosen)) != len(chosen):
        raise UsageError(f"set_adapter: {list(chosen)}; each adapter may stand once")
    for name, module in replaced_modules(root).items():
        both = [adapter for adapter in chosen if adapter in module.modules_to_save]
        if len(both) > 1:
            raise UsageError(f"set_adapter: {' and '.join(both)} both replace {name}; only one of them can run")
    return _switch(root, chosen, state.enabled)


def enable_adapters(root: nn.Module) -> Switched:
    """Run the active adapters."""
    return _switch(root, _state(root).active, True)


def disable_adapters(root: nn.Module) -> Switched:
    """Run the base alone."""
    return _switch(root, _state(root).active, False)


def _switch(root: nn.Module, adapters: tuple[str, ...], enabled: bool) -> Switched:
    refuse_merged(root, "switch adapters")
    state = _state(root)
    before = state.active, state.enabled
    activate(root, state, adapters, enabled)
    return Switched(root, before)


def _state(root: nn.Module) -> State:
    state = state_of(root)
    if state is None:
        raise StateError("the model has no adapters; inject or load one first")
    return state
