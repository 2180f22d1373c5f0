"""slots: low-rank factors as optional inputs of a graph, which onnxruntime fills from .onnx_adapter files.

A slot adds (x A) B to what a linear layer gives; A is [in, r], B is [r, out]. By default r is 0. Each layer has a
rank of its own, so that an adapter may lack some and have others of any rank.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.formats.onnx.example import Example, Sizes

Held = dict[str, Tensor]


class Slot(NamedTuple):
    """At a layer, by its path: what its two inputs are called, and how many numbers come in and go out."""

    layer: str
    a: str
    b: str
    shape: tuple[int, int]  # in, out

    @property
    def rank(self) -> str:
        return f"{self.layer}.rank"

    def sized(self, r: int) -> Held:
        """Factors of rank `r`, of zeros."""
        return {self.a: torch.zeros(self.shape[0], r), self.b: torch.zeros(r, self.shape[1])}


def slot_of(layer: str, shape: tuple[int, int], names: str) -> Slot:
    """`names` "hf": as PEFT calls the factors; "genai": as onnxruntime-genai's model builder does."""
    if names == "genai":
        path = layer.replace(".self_attn.", ".attn.")
        return Slot(layer, f"{path}.lora_A.MatMul.weight", f"{path}.lora_B.MatMul.weight", shape)
    return Slot(layer, f"{layer}.lora_A.weight", f"{layer}.lora_B.weight", shape)


def with_slots(module: nn.Module, slots: Sequence[Slot], example: Example) -> Example:
    """Lay slots over the layers of a module that is to be traced; returns the example with their inputs."""
    held: Held = {}
    for slot in slots:
        module.get_submodule(slot.layer).register_forward_hook(partial(_add, held, slot))
    axes = {name: told for slot in slots for name, told in ((slot.a, {1: slot.rank}), (slot.b, {0: slot.rank}))}
    inputs = {name: values for slot in slots for name, values in slot.sized(2).items()}
    return example._replace(
        inputs={**example.inputs, **inputs},
        axes={**example.axes, **axes},
        make=partial(_made, example, slots),
        call=partial(_call, example.call, held, frozenset(inputs)),
    )


def default_to_nothing(model: Any, slots: Sequence[Slot]) -> None:
    """The slots' inputs need not be given: by default they are of rank 0."""
    import onnx_ir as ir

    inputs = {value.name: value for value in model.graph.inputs}
    for slot in slots:
        for name, values in slot.sized(0).items():
            inputs[name].const_value = ir.tensor(values.numpy(), name=name)
            model.graph.initializers[name] = inputs[name]


def write_adapter(path: Path, factors: Mapping[str, Tensor]) -> None:
    """A file for onnxruntime's LoraAdapter, of float32 factors by the names of a graph's inputs."""
    import onnxruntime

    adapter = onnxruntime.AdapterFormat()
    held = {name: values.float().contiguous().numpy() for name, values in factors.items()}
    adapter.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(values) for name, values in held.items()})
    adapter.export_adapter(str(path))


def _add(held: Held, slot: Slot, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
    del module
    return out + (given[0] @ held[slot.a]) @ held[slot.b]


def _made(example: Example, slots: Sequence[Slot], sizes: Sizes, seed: int) -> dict[str, Tensor]:
    factors = {name: values for slot in slots for name, values in slot.sized(sizes[slot.rank]).items()}
    return {**example.sized(sizes, seed), **factors}


def _call(
    call: Callable[..., Any], held: Held, names: frozenset[str], module: nn.Module, inputs: Mapping[str, Any]
) -> Any:
    held.update({name: values for name, values in inputs.items() if name in names})
    try:
        return call(module, {name: values for name, values in inputs.items() if name not in names})
    finally:
        held.clear()
