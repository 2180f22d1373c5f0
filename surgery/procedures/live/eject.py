"""eject: a model's own modules back in their places."""

from torch import nn

from surgery.errors import StateError
from surgery.hosts.quantized import release
from surgery.hosts.tree import is_merged, places, refuse_mixed, set_state, state_of
from surgery.layers import Adapted, Replaced
from surgery.layers.trained_bias import lift_bias
from surgery.procedures.live.merge import unmerge
from surgery.procedures.places.biases import keep_biases
from surgery.procedures.places.stacking import unstack


def eject(root: nn.Module, keep_merged: bool = False) -> None:
    """Put the model's own modules back, with their flags; merged weights are unmerged first, or kept.

    StateError if nothing is injected, or nothing merged that could be kept.
    """
    state = state_of(root)
    if state is None:
        raise StateError("eject: the model has no adapters; inject or load one first")
    refuse_mixed(root, "eject")
    merged = is_merged(root)
    if keep_merged and not merged:
        raise StateError("eject: keep_merged, but nothing is merged; merge the model first")
    if merged and not keep_merged:
        unmerge(root)
    _unwrap(root, keep_merged)
    for modules in state.biases.values():
        if keep_merged:
            keep_biases(modules.values())
        for module in modules.values():
            lift_bias(module)
    for module in root.modules():
        release(module)
    unstack(root)
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in state.trainable and parameter.is_floating_point())  # codes have no gradient
    set_state(root, None)


def _unwrap(root: nn.Module, keep_merged: bool) -> None:
    """Put what lies in each wrapper in its place."""
    for place in reversed(list(places(root))):  # of wrappers in wrappers, the inner ones first
        if isinstance(place.module, Adapted):
            place.parent._modules[place.key] = place.module.base_layer
        elif isinstance(place.module, Replaced):
            kept = place.module.running if keep_merged else place.module.original
            place.parent._modules[place.key] = kept
