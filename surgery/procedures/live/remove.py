"""remove: adapters out of a live model, while others may stay."""

from collections.abc import Sequence

from torch import nn

from surgery.hosts.tree import Place, injected, places, refuse_merged
from surgery.layers import Adapted, Replaced
from surgery.layers.trained_bias import lift_bias
from surgery.procedures.live.switch import activate
from surgery.procedures.places.stacking import unstack


def remove(root: nn.Module, adapters: Sequence[str]) -> None:
    """Take adapters away; where none is left, the model's own module is back. The model stays frozen.

    StateError, and nothing changes, for one that is not there, or while adapters are merged.
    """
    state = injected(root)
    for adapter in adapters:
        state.require(adapter)
    refuse_merged(root, "delete an adapter")
    for place in reversed(list(places(root))):  # of wrappers in wrappers, the inner ones first
        if isinstance(place.module, Adapted):
            _unfit(place, place.module, adapters)
        elif isinstance(place.module, Replaced):
            _drop(place, place.module, adapters)
    for adapter in dict.fromkeys(adapters):
        del state.configs[adapter]
        for module in state.biases.pop(adapter, {}).values():
            lift_bias(module)
        state.importance.pop(adapter, None)
    if not state.configs:
        unstack(root)
    activate(root, state, tuple(name for name in state.active if name in state.configs), state.enabled)


def _unfit(place: Place, layer: Adapted, adapters: Sequence[str]) -> None:
    for adapter in set(adapters) & layer.fitted.keys():
        layer.unfit(adapter)
    if not layer.fitted:
        place.parent._modules[place.key] = layer.base_layer


def _drop(place: Place, holder: Replaced, adapters: Sequence[str]) -> None:
    for adapter in set(adapters) & holder.copies.keys():
        del holder.copies[adapter]
    if not holder.copies:
        place.parent._modules[place.key] = holder.original
