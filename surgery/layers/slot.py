"""Slot: one tensor name, such as `lora_A`, holding its tensor for each adapter."""

from collections.abc import Collection, ItemsView, Iterator, KeysView, Mapping, MutableMapping, ValuesView
from typing import Any

from torch import Tensor, nn

from surgery.layers.bare import Bare

Holder = tuple[Mapping[str, Tensor | None], str]  # where a tensor is held, and its key there


class Slot(Bare):
    """Spelled as PEFT does: `lora_B.default.weight` and `.bias`, or `lora_embedding_A.default`, without a leaf."""

    def __getitem__(self, adapter: str) -> Any:
        """As PEFT's layers are asked: `lora_A["default"].weight`."""
        return self._held[adapter]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def keys(self) -> KeysView[str]:
        """The adapters."""
        return self._held.keys()

    def values(self) -> ValuesView[Any]:
        """What it holds for each."""
        return self._held.values()

    def items(self) -> ItemsView[str, Any]:
        """Both."""
        return self._held.items()

    @property
    def _held(self) -> dict[str, Any]:
        return {**self._modules, **self._parameters, **self._buffers}

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._modules or adapter in self._parameters or adapter in self._buffers

    def extra_repr(self) -> str:
        """The shapes that it holds by itself."""
        held = {**self._parameters, **self._buffers}
        return ", ".join(f"{name}: {list(values.shape)}" for name, values in held.items() if values is not None)

    def put(self, adapter: str, leaf: str, values: Tensor, trainable: bool) -> Holder:
        """Hold an adapter's tensor, under a name of its own if there is a `leaf`.

        Returns the dict that holds it, and its key there; both stay as the model moves.
        """
        owner, key = self._owner(adapter, leaf)
        owner._parameters[key] = nn.Parameter(values, requires_grad=trainable)
        return owner._parameters, key

    def fix(self, adapter: str, leaf: str, values: Tensor) -> Holder:
        """The same of a tensor that is never trained: a buffer."""
        owner, key = self._owner(adapter, leaf)
        owner._buffers[key] = values
        return owner._buffers, key

    def leave_out(self, adapter: str) -> None:
        """No state_dict has what it holds of the adapter by itself, which the adapter's settings tell."""
        self._non_persistent_buffers_set.add(adapter)

    def _owner(self, adapter: str, leaf: str) -> tuple[nn.Module, str]:
        if not leaf:
            return self, adapter
        if adapter not in self._modules:
            self._modules[adapter] = Slot()
        inner = self._modules[adapter]
        assert inner is not None
        return inner, leaf

    def remove(self, adapter: str) -> None:
        """Take away all that it holds of the adapter."""
        self._modules.pop(adapter, None)
        self._parameters.pop(adapter, None)
        self._buffers.pop(adapter, None)
        self._non_persistent_buffers_set.discard(adapter)

    def holder(self, adapter: str, leaf: str) -> Holder:
        """Where an adapter's tensor is held already."""
        owner, key = self._owner(adapter, leaf)
        return (owner._parameters if key in owner._parameters else owner._buffers), key

    def __len__(self) -> int:
        return len(self._modules) + len(self._parameters) + len(self._buffers)


class SharedSlot(Slot):
    """One that many layers have: what came first for an adapter is the tensor of all of them, as PEFT has it."""

    def put(self, adapter: str, leaf: str, values: Tensor, trainable: bool) -> Holder:
        return self.holder(adapter, leaf) if adapter in self else super().put(adapter, leaf, values, trainable)

    def fix(self, adapter: str, leaf: str, values: Tensor) -> Holder:
        return self.holder(adapter, leaf) if adapter in self else super().fix(adapter, leaf, values)


def shared_slots(layer: nn.Module) -> dict[str, SharedSlot]:
    """Those that a layer has, by name."""
    return {name: one for name, one in layer._modules.items() if isinstance(one, SharedSlot)}


def let_go(modules: MutableMapping[str, nn.Module | None], used: Collection[nn.Module]) -> None:
    """Take away shared slots that are not `used`; other layers may have them still."""
    for name in [name for name, one in modules.items() if isinstance(one, SharedSlot) and one not in used]:
        del modules[name]
