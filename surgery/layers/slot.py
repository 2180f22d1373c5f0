"""Slot: one tensor name, such as `lora_A`, holding its tensor for each adapter."""

from torch import Tensor, nn

from surgery.layers.bare import Bare

Holder = tuple[dict[str, nn.Parameter | None], str]  # where a parameter is held, and its key there


class Slot(Bare):
    """Spelled as PEFT does: `lora_B.default.weight` and `.bias`, or `lora_embedding_A.default`, without a leaf."""

    def put(self, adapter: str, leaf: str, values: Tensor, trainable: bool) -> Holder:
        """Hold an adapter's tensor, under a name of its own if there is a `leaf`; returns what `holder` does."""
        parameter = nn.Parameter(values, requires_grad=trainable)
        if leaf and adapter not in self._modules:
            self._modules[adapter] = Slot()
        held, key = self.holder(adapter, leaf)
        held[key] = parameter
        return held, key

    def holder(self, adapter: str, leaf: str) -> Holder:
        """The dict that holds the adapter's parameter, and its key there; both stay as the model moves."""
        if not leaf:
            return self._parameters, adapter
        inner = self._modules[adapter]
        assert inner is not None
        return inner._parameters, leaf

    def remove(self, adapter: str) -> None:
        """Take away all that it holds of the adapter."""
        self._modules.pop(adapter, None)
        self._parameters.pop(adapter, None)

    def __len__(self) -> int:
        return len(self._modules) + len(self._parameters)
