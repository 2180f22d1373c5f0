"""Slot: one tensor name, such as `lora_A`, holding its tensor for each adapter."""

from torch import Tensor, nn


class Slot(nn.Module):
    """Spelled as PEFT does: `lora_A.default.weight`, or `lora_embedding_A.default` where there is no leaf."""

    def put(self, adapter: str, leaf: str, values: Tensor, trainable: bool) -> None:
        """Hold an adapter's tensor, under a name of its own if there is a `leaf`."""
        parameter = nn.Parameter(values, requires_grad=trainable)
        if not leaf:
            self._parameters[adapter] = parameter
            return
        holder = Slot()
        holder._parameters[leaf] = parameter
        self._modules[adapter] = holder

    def holder(self, adapter: str) -> tuple[dict[str, nn.Parameter | None], str]:
        """The dict that holds the adapter's parameter, and its key there; both stay as the model moves."""
        inner = self._modules.get(adapter)
        if inner is None:
            return self._parameters, adapter
        return inner._parameters, next(iter(inner._parameters))

    def remove(self, adapter: str) -> None:
        del (self._modules if adapter in self._modules else self._parameters)[adapter]

    def __len__(self) -> int:
        return len(self._modules) + len(self._parameters)
