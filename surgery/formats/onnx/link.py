"""link: the initializers of a graph are the bytes of tensors in safetensors files beside it.

A graph knows nothing but places: the hashes of the headers go into its metadata.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from surgery.errors import FormatError, printable
from surgery.formats.onnx.links import HEADERS
from surgery.formats.onnx.quantized import Quantized, put
from surgery.formats.onnx.stored import Stored, Weights, initializer, onnx_dtype
from surgery.formats.onnx.trace import PREFIX

_NEXT = "the weights of the model that was traced are wanted; `surgery inspect` lists those that are there"
_CASTS = {torch.bfloat16, torch.float16}


def link(
    model: Any, weights: Weights, names: Mapping[str, Sequence[str]], quantized: Mapping[str, Quantized] | None = None
) -> None:
    """Every initializer without a value is stored, under its own name or the others that `names` has for it.

    What is stored in half is cast to what the graph computes in; for what is `quantized`, by the name it is stored
    under, there are nodes that decode it. FormatError, naming it, for an initializer that is not there, or has another
    shape or dtype.
    """
    held = quantized or {}
    for value in list(model.graph.initializers.values()):
        if value.const_value is None:
            name = value.name.removeprefix(PREFIX)
            found = _found(name, names.get(name, ()), weights.stored)
            if found.info.name in held:
                _check_shape(value, held[found.info.name].shape)
                put(model, value, held[found.info.name])
            else:
                _link(model, value, found)
    used = {value.const_value.location for value in model.graph.initializers.values() if _external(value.const_value)}
    model.metadata_props[HEADERS] = json.dumps({name: weights.headers[name] for name in sorted(used)})


def _found(name: str, names: Sequence[str], stored: Mapping[str, Stored]) -> Stored:
    for one in (name, *names):
        if one in stored:
            return stored[one]
    raise FormatError(f"{printable(name)}: no tensor of this name is among the {len(stored)} that are stored; {_NEXT}")


def _link(model: Any, value: Any, found: Stored) -> None:
    """The initializer is that tensor, cast if need be."""
    import onnx_ir as ir

    _check_shape(value, found.info.shape)
    name, wanted, held = value.name.removeprefix(PREFIX), ir.DataType(value.dtype), onnx_dtype(found.info)
    if held is None or (held != wanted and not (found.info.dtype in _CASTS and wanted == ir.DataType.FLOAT)):
        raise FormatError(
            f"{printable(name)}: it is stored in {found.info.dtype}, the graph wants {wanted.name}; {_NEXT}"
        )
    model.graph.initializers.pop(value.name)
    whole = stored = initializer(model, found)
    if held != wanted:
        whole = _cast(model, stored, wanted)
    ir.convenience.replace_all_uses_with(value, whole, replace_graph_outputs=True)


def _check_shape(value: Any, held: tuple[int, ...]) -> None:
    shape = tuple(int(extent) for extent in value.shape)
    if shape != held:
        name = printable(value.name.removeprefix(PREFIX))
        raise FormatError(f"{name}: it is stored as {list(held)}, the graph wants {list(shape)}; {_NEXT}")


def _cast(model: Any, stored: Any, wanted: Any) -> Any:
    import onnx_ir as ir

    node = ir.node("Cast", [stored], {"to": int(wanted)}, name=f"{stored.name}.cast")
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{stored.name}.{wanted.name.lower()}", stored.shape, ir.TensorType(wanted)
    model.graph.insert_before(model.graph[0], node)
    return out


def _external(value: Any) -> bool:
    import onnx_ir as ir

    return isinstance(value, ir.ExternalTensor)
