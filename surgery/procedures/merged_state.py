"""The state_dict that a live model would have, were its adapters merged and taken out."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from surgery.hosts.tree import adapted_layers, injected, places
from surgery.layers import Adapted, Replaced
from surgery.procedures.merge import merge, unmerge


@contextmanager
def merged_state(root: nn.Module) -> Iterator[dict[str, Tensor]]:
    """By the names that the model has without adapters. At the end the model is as it was, to the bit.

    Meanwhile the active adapters are merged. Raises as `merge` does; what is merged already stays so.
    """
    injected(root)
    was_merged = any(layer.merged is not None for layer in adapted_layers(root).values())
    if not was_merged:
        merge(root, "copy")
    try:
        yield plain_state(root)
    finally:
        if not was_merged:
            unmerge(root)


def plain_state(root: nn.Module) -> dict[str, Tensor]:
    """The tensors as they are, named as if no wrapper were there; those of adapters are left out."""
    inner = {}
    for place in places(root):
        if isinstance(place.module, Adapted):
            inner[place.name] = "base_layer."
        elif isinstance(place.module, Replaced):
            running = place.module.running is not place.module.original_module
            inner[place.name] = f"modules_to_save.{place.module.active[-1]}." if running else "original_module."
    found = {}
    for name, values in root.state_dict().items():
        wrapper = next((path for path in _parents(name) if path in inner), None)
        if wrapper is None:
            found[name] = values
        elif name.startswith(f"{wrapper}.{inner[wrapper]}"):
            found[f"{wrapper}." + name.removeprefix(f"{wrapper}.{inner[wrapper]}")] = values
    return found


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
