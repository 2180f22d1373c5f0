"""link: the initializers of a graph are the bytes of tensors in safetensors files beside it.

In a file a tensor begins at 8 + the header's length + its data_offset; external data may begin anywhere, so that
any file serves as it is. A graph knows nothing but places: the hashes of the headers go into its metadata.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from surgery.core.site import TensorInfo
from surgery.errors import FormatError, printable
from surgery.formats.onnx.trace import PREFIX
from surgery.io.tensor_file import TensorFile

STORED = "weights/"  # so that no name of a tensor is one of an input or a node
HEADERS = "surgery.header_sha256"  # in the metadata: JSON, by file
_CASTS = {torch.bfloat16, torch.float16}


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: str
    start: int
    info: TensorInfo


class Weights(NamedTuple):
    """The files beside a graph: their tensors by name, and the sha256 of each file's header."""

    stored: Mapping[str, Stored]
    headers: Mapping[str, str]

    def __or__(self, other: "Weights") -> "Weights":
        return Weights({**self.stored, **other.stored}, {**self.headers, **other.headers})


def weights_of(*files: TensorFile) -> Weights:
    """All tensors of the files."""
    stored = {name: Stored(one.path.name, at.start, at.info) for one in files for name, at in one.entries.items()}
    return Weights(stored, {one.path.name: hashlib.sha256(one.header.raw).hexdigest() for one in files})


def link(model: Any, weights: Weights, names: Mapping[str, Sequence[str]]) -> None:
    """Every initializer without a value is stored, under its own name or the others that `names` has for it.

    What is stored in half is cast to what the graph computes in. FormatError, naming it, for an initializer that is
    not there, or has another shape or dtype.
    """
    for value in list(model.graph.initializers.values()):
        if value.const_value is None:
            name = value.name.removeprefix(PREFIX)
            _link(model, value, _found(name, names.get(name, ()), weights.stored))
    used = {value.const_value.location for value in model.graph.initializers.values() if _external(value.const_value)}
    model.metadata_props[HEADERS] = json.dumps({name: weights.headers[name] for name in sorted(used)})


def _found(name: str, names: Sequence[str], stored: Mapping[str, Stored]) -> Stored:
    for one in (name, *names):
        if one in stored:
            return stored[one]
    raise FormatError(
        f"{printable(name)}: no tensor of this name is among the {len(stored)} that are stored; the weights of the "
        "model that was traced are wanted"
    )


def _link(model: Any, value: Any, found: Stored) -> None:
    """The initializer is that tensor, cast if need be."""
    import onnx_ir as ir

    name, wanted = value.name.removeprefix(PREFIX), ir.DataType(value.dtype)
    shape = tuple(int(extent) for extent in value.shape)
    if shape != found.info.shape:
        raise FormatError(f"{printable(name)}: it is stored as {list(found.info.shape)}, the graph wants {list(shape)}")
    held = _dtype(found.info)
    if held is None or (held != wanted and not (found.info.dtype in _CASTS and wanted == ir.DataType.FLOAT)):
        raise FormatError(f"{printable(name)}: it is stored in {found.info.dtype}, the graph wants {wanted.name}")
    model.graph.initializers.pop(value.name)
    whole = stored = _initializer(model, found, held)
    if held != wanted:
        whole = _cast(model, stored, wanted)
    ir.convenience.replace_all_uses_with(value, whole, replace_graph_outputs=True)


def _initializer(model: Any, found: Stored, held: Any) -> Any:
    """The tensor as an initializer of its own name, once."""
    import onnx_ir as ir

    shape, name = ir.Shape(found.info.shape), STORED + found.info.name
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    stored = ir.Value(name=name, shape=shape, type=ir.TensorType(held))
    stored.const_value = ir.ExternalTensor(found.file, found.start, found.info.nbytes, held, shape=shape, name=name)
    model.graph.initializers.add(stored)
    return stored


def _cast(model: Any, stored: Any, wanted: Any) -> Any:
    import onnx_ir as ir

    node = ir.node("Cast", [stored], {"to": int(wanted)}, name=f"{stored.name}.cast")
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{stored.name}.{wanted.name.lower()}", stored.shape, ir.TensorType(wanted)
    model.graph.insert_before(model.graph[0], node)
    return out


def _dtype(info: TensorInfo) -> Any:
    """What ONNX calls the dtype; None where it has no such."""
    import onnx_ir as ir

    names = {
        torch.float64: "DOUBLE",
        torch.float32: "FLOAT",
        torch.bfloat16: "BFLOAT16",
        torch.float16: "FLOAT16",
        torch.int64: "INT64",
        torch.int32: "INT32",
        torch.int16: "INT16",
        torch.int8: "INT8",
        torch.uint8: "UINT8",
        torch.bool: "BOOL",
    }
    name = names.get(info.dtype) if isinstance(info.dtype, torch.dtype) else None
    return None if name is None else ir.DataType[name]


def _external(value: Any) -> bool:
    import onnx_ir as ir

    return isinstance(value, ir.ExternalTensor)
