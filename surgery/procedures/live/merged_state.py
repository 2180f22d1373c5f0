"""The state_dict that a live model would have, were its adapters merged and taken out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from surgery.hosts.quantized import is_quantized
from surgery.hosts.tree import adapted_layers, injected, is_merged, places
from surgery.layers import Adapted, Replaced
from surgery.layers.trained_bias import OWN, TRAINED
from surgery.procedures.live.held_layers import Landing
from surgery.procedures.live.merge import merge, unmerge
from surgery.procedures.live.standing_in import decode_others
from surgery.procedures.planning.treatment import Treatment

_BESIDE = (OWN, TRAINED)


@contextmanager
def merged_state(root: nn.Module) -> Iterator[dict[str, Tensor]]:
    """By the names that the model has without adapters. At the end the model is as it was, to the bit.

    Meanwhile the active adapters are merged, and what is quantized is decoded. Raises as `merge` does; what is merged
    already stays so.
    """
    injected(root)
    was_merged = is_merged(root)
    if not was_merged:
        quantized = any(is_quantized(layer.base_layer) for layer in adapted_layers(root).values() if layer.running)
        merge(root, "copy", Landing(Treatment(into="16bit" if quantized else None)))
    try:
        state = plain_state(root)
        decode_others(root, state)
        yield state
    finally:
        if not was_merged:
            unmerge(root)


def plain_state(root: nn.Module) -> dict[str, Tensor]:
    """The tensors as they are, named as if no wrapper were there; those of adapters are left out."""
    inner: dict[str, str] = {}
    for place in places(root):
        if isinstance(place.module, Adapted) and place.module.parameter is not None:
            owner = place.name.rpartition(".")[0]
            inner[owner] = inner.get(owner, "") + "base_layer."
        elif isinstance(place.module, Adapted):
            inner[place.name] = "base_layer."
        elif isinstance(place.module, Replaced):
            own, copies = place.module.spelled
            running = place.module.running is not place.module.original
            inner[place.name] = f"{copies}.{place.module.active[-1]}." if running else f"{own}."
    named = ((_plain(name, inner), values) for name, values in root.state_dict().items())
    return {name: values for name, values in named if name is not None and name.rpartition(".")[2] not in _BESIDE}


def _plain(name: str, inner: Mapping[str, str]) -> str | None:
    """A name without what wrappers, by the paths they stand at, put into it; None for what is an adapter's own."""
    path, rest = "", name
    while "." in rest:
        head, _, rest = rest.partition(".")
        path += head
        if path in inner:
            if not rest.startswith(inner[path]):
                return None
            rest = rest.removeprefix(inner[path])
        path += "."
    return path + rest
