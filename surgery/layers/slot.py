"""Slot: one tensor name, such as `lora_A`, holding its tensor for each adapter."""

from torch import Tensor, nn


class Slot(nn.Module):
    """Spelled as PEFT does: `lora_A.default.weight`, or `lora_embedding_A.default` where there is no leaf."""

    leaf = ""  # the name below the adapter's, if there is one

    def __init__(self, leaf: str = "") -> None:
        super().__init__()
        if leaf:
            self.__dict__["leaf"] = leaf  # past nn.Module's __setattr__, see Adapted

    def put(self, adapter: str, values: Tensor, trainable: bool) -> None:
        parameter = nn.Parameter(values, requires_grad=trainable)
        if not self.leaf:
            self._parameters[adapter] = parameter
            return
        holder = Slot()
        holder._parameters[self.leaf] = parameter
        self._modules[adapter] = holder

    def holder(self, adapter: str) -> tuple[dict[str, nn.Parameter | None], str]:
        """The dict that holds the adapter's parameter, and its key there; both stay as the model moves."""
        if not self.leaf:
            return self._parameters, adapter
        inner = self._modules[adapter]
        assert inner is not None
        return inner._parameters, self.leaf

    def remove(self, adapter: str) -> None:
        del (self._modules if self.leaf else self._parameters)[adapter]

    def __len__(self) -> int:
        return len(self._modules if self.leaf else self._parameters)
